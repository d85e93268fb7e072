"""How tokens reach their experts and come back: one function each, entered in `DISPATCHES`.

All of them compute the same thing, the gated sum of each token's experts; they differ in what they
move and multiply for it. The last argument, `room`, is the size of a buffer: the tokens of one
expert for `capacity`, the choices of all experts for `dropless`; the others have none.
"""

from collections.abc import Callable

import jax

from moe_jax.models.dispatch import capacity, dense, dropless, gather

DISPATCHES: dict[str, Callable[..., jax.Array]] = {
  'dense': dense.dispatch,
  'dropless': dropless.dispatch,
  'capacity': capacity.dispatch,
  'gather': gather.dispatch,
}
