"""Who goes where: a router is one function in one file, named in `config_moe.ROUTERS`.

How to add one: `moe_jax/models/README.md`.
"""

import importlib

import jax

from moe_jax import config_moe, errors
from moe_jax.models.routers import routing

ROUTERS: dict[str, routing.Router] = {
  name: importlib.import_module(f'{__name__}.{name}').ROUTER for name in config_moe.ROUTERS
}


def register(name: str, router: routing.Router):
  """Makes a router from outside of the library known to this process, as `model.moe.router`=name.

  For notebooks and experiments; a router that stays gets a file of its own. Registering the name
  once more replaces the router and forgets what was compiled with the old one.

  Raises:
    errors.InputError: the library has a router of that name.
  """
  errors.require(
    name not in config_moe.ROUTERS,
    f'router {name!r} is one of the library ({", ".join(config_moe.ROUTERS)}); choose another name',
  )
  if name in ROUTERS:
    jax.clear_caches()
  else:
    config_moe.REGISTERED.append(name)
  ROUTERS[name] = router
