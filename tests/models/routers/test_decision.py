import jax
import jax.numpy as jnp
import numpy as np

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


def test_recorded_choices_get_the_present_scores_of_their_experts_as_gates():
  cfg = routes.make(norm_topk_prob=True)
  own = routes.route(cfg)
  tokens = routes.tokens_of(1, 3, mask=[[1, 1, 0]])
  recorded = jnp.array([[[2, 3], [0, 1], [1, 2]]], jnp.int32)
  got = decision.replayed(cfg, own, recorded, tokens)
  np.testing.assert_array_equal(got.expert_idx, [[[2, 3], [0, 1], [4, 4]]])
  want = [[[2 / 3, 1 / 3], [1 / 3, 2 / 3], [0, 0]]]
  np.testing.assert_allclose(got.gates, want, **routes.EXACT)

  def gate(scores):
    return decision.replayed(cfg, own._replace(scores=scores), recorded, tokens).gates[0, 0, 0]

  assert jnp.abs(jax.grad(gate)(own.scores)[0, 0, 2:]).min() > 0.1
