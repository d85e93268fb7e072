import jax
import jax.numpy as jnp

from moe_jax.models.routers import decision
from tests import tiny
from tests.models.routers import routes


def test_router_logits_are_products_of_float32_at_full_precision():
  """What no CPU shows: GPUs and TPUs round the inputs of a product of default precision."""
  cfg = routes.make()
  x, kernel = jnp.ones((1, 3, 8), jnp.bfloat16), jnp.ones((8, 4), jnp.float32)
  arguments = (x, kernel, routes.tokens_of(1, 3), jnp.int32(0))
  traced = jax.make_jaxpr(lambda *a: decision.logits_of(cfg, True, *a))(*arguments)
  (product,) = [e for e in tiny.equations(traced.jaxpr) if e.primitive.name == 'dot_general']
  assert product.params['precision'] == (jax.lax.Precision.HIGHEST,) * 2
  assert {v.aval.dtype for v in product.invars} == {jnp.dtype('float32')}
