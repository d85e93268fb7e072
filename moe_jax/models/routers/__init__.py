"""Who goes where: a router is one function in one file, named in `router_traits.LIBRARY`.

How to add one: `moe_jax/models/README.md`.
"""

import importlib

import jax

from moe_jax import errors
from moe_jax.config import router_traits
from moe_jax.models.routers import routing

ROUTERS: dict[str, routing.Router] = {
  name: importlib.import_module(f'{__name__}.{name}').ROUTER for name in router_traits.LIBRARY
}


def register(name: str, router: routing.Router):
  """Makes a router from outside of the library known to this process, as `model.moe.router`=name.

  For notebooks and experiments; a router that stays gets a file of its own. Everything else treats
  it by its traits. Registering the name once more replaces the router and forgets what was compiled
  with the old one.

  Raises:
    errors.InputError: the library has a router of that name.
  """
  errors.require(
    name not in router_traits.LIBRARY,
    f'router {name!r} is one of the library ({", ".join(router_traits.LIBRARY)}); choose another '
    'name',
  )
  if name in ROUTERS:
    jax.clear_caches()
  ROUTERS[name] = router
  router_traits.REGISTERED[name] = router.traits
