import jax
import jax.numpy as jnp
import numpy as np
import optax

from moe_jax.models import transformer
from moe_jax.training import objective
from tests import tiny


def test_load_counts_the_real_tokens(whole):
  real = int((tiny.batch()['segment_ids'] > 0).sum())
  np.testing.assert_array_equal(
    whole[0].stats.sums.load.sum(-1), [real * 2] * 2
  )  # K = 2, two MoE layers


def test_accumulation_equals_the_whole_batch_with_ragged_rows(first, whole):
  state, got = first
  np.testing.assert_array_equal(got.stats.sums.load, whole[0].stats.sums.load)
  # Four float32 sums added instead of one.
  np.testing.assert_allclose(got.loss, whole[0].main, rtol=1e-5)
  # Adam's first moment after one step is (1 - beta1) times the gradient, nothing being clipped.
  mu = optax.tree.get(state.opt_state, 'mu')
  grads = jax.tree.map(lambda m: m / np.float32(1 - 0.9), mu)
  tiny.assert_trees_close(grads, whole[1], rtol=1e-3, atol=1e-5)


def test_loss_is_cross_entropy_per_real_target_plus_weighted_z_and_balance_losses():
  rows = tiny.batch(((16,), (7, 3)))
  cfg = tiny.make(train__z_loss_weight=0.5, model__moe__balance__expert_level__weight=0.25)
  params = tiny.params(cfg.model)
  num_targets, num_tokens = tiny.num_targets(rows), 26

  def parts(params):
    batch = rows | {'row': jnp.arange(2)}
    totals = objective.Totals(num_targets, num_tokens)
    total, loss = objective.batch_loss(cfg, params, {}, batch, jnp.uint32(0), totals)
    model = transformer.Transformer(cfg.model)
    args = (rows[k] for k in ('tokens', 'positions', 'segment_ids'))
    return total, loss.main, model.apply({'params': params}, *args)

  total, cross_entropy, out = tiny.jit(parts)(params)
  real = rows['targets'] >= 0
  log_p = np.asarray(jax.nn.log_softmax(out.logits))
  picked = np.take_along_axis(log_p, np.maximum(rows['targets'], 0)[..., None], -1)[..., 0]
  np.testing.assert_allclose(cross_entropy, -picked[real].mean(), rtol=1e-5)
  z = np.square(np.asarray(jax.nn.logsumexp(out.logits, axis=-1)))[real].mean()
  # Per layer the token-weighted mean over sequences, summed over the layers.
  balance_loss = np.asarray(out.stats.losses['expert_level']).sum() / num_tokens
  assert 1 < balance_loss / 2 < 4  # about 1 per layer, E / K = 4 at most
  want = cross_entropy + 0.5 * z + 0.25 * balance_loss
  np.testing.assert_allclose(total, want, rtol=1e-5)


def test_accumulation_reports_losses_of_the_whole_batch_also_those_without_weight():
  scope = {'model__moe__balance__squared_deviation__scope': 'global_batch'}
  params = tiny.params(tiny.make().model)
  whole, _ = tiny.gradients(**scope)(params, tiny.batch())
  parts, _ = tiny.gradients(**scope, train__micro_batch_size=2)(params, tiny.batch())
  for name in ('squared_deviation', 'expert_level'):
    np.testing.assert_allclose(
      parts.stats.losses[name], whole.stats.losses[name], rtol=1e-4, err_msg=name
    )
  np.testing.assert_allclose(parts.aux, whole.aux, rtol=1e-5)


def test_gradients_of_micro_batches_add_up_in_float32():
  """1 and 511 times 2^-9: in bfloat16 the sum would stay 1."""
  parts = jnp.full((512, 1), 2.0**-9).at[0].set(1.0)

  def share(micro):
    return {'g': micro.sum().astype(jnp.bfloat16), 'count': jnp.int32(1)}

  got = objective._accumulate(share, parts)
  assert got['g'].dtype == jnp.float32 and got['count'].dtype == jnp.int32
  assert float(got['g']) == 1 + 511 * 2.0**-9 and int(got['count']) == 512
