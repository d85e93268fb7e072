"""Who goes where: a router is one function in one file, named in `config_moe.ROUTERS`.

How to add one: `moe_jax/models/README.md`.
"""

import importlib

from moe_jax import config_moe
from moe_jax.models.routers import routing

ROUTERS: dict[str, routing.Router] = {
  name: importlib.import_module(f'{__name__}.{name}').ROUTER for name in config_moe.ROUTERS
}
