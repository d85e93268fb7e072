"""Who goes where: a router is one pure function in one file, entered in `ROUTERS` by name.

It maps float32 logits [B, L, E] and the layer's `MoEConfig` to a `Routing`. It never sees other
tokens' gates, the dispatch, or the loss: those are separate rooms.
"""

from collections.abc import Callable

import jax

from moe_jax import config
from moe_jax.models.routers import gshard, softmax_topk, switch
from moe_jax.models.routers.routing import Routing

ROUTERS: dict[str, Callable[[jax.Array, config.MoEConfig], Routing]] = {
  'softmax_topk': softmax_topk.route,
  'gshard_top2': gshard.route,
  'switch_top1': switch.route,
}
