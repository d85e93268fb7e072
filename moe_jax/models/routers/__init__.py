"""Who goes where: a router is one function in one file, named in `moe_config.ROUTERS`.

How to add one: `moe_jax/models/README.md`.
"""

import importlib

import jax

from moe_jax import errors
from moe_jax.config import moe_config
from moe_jax.models.routers import routing

ROUTERS: dict[str, routing.Router] = {
  name: importlib.import_module(f'{__name__}.{name}').ROUTER for name in moe_config.ROUTERS
}


def register(name: str, router: routing.Router):
  """Makes a router from outside of the library known to this process, as `model.moe.router`=name.

  For notebooks and experiments; a router that stays gets a file of its own. Registering the name
  once more replaces the router and forgets what was compiled with the old one.

  Raises:
    errors.InputError: the library has a router of that name.
  """
  errors.require(
    name not in moe_config.ROUTERS,
    f'router {name!r} is one of the library ({", ".join(moe_config.ROUTERS)}); choose another name',
  )
  if name in ROUTERS:
    jax.clear_caches()
  else:
    moe_config.REGISTERED.append(name)
  ROUTERS[name] = router
