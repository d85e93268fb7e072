"""GRPO's loss against closed forms, an independent formula and an enumerated vocabulary."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import schema
from moe_jax.models import transformer
from moe_jax.training import objective, policy_loss
from tests import tiny

POLICY = tiny.make().objective.policy
# Two answers in a row, with a question token each, and padding.
TARGETS = np.array([[-1, 3, 5, 2, -1, 7, 1, -1]])
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 0]])
LEARNED = TARGETS >= 0
ADVANTAGES = np.where(LEARNED, [[0, 1.5, 1.5, 1.5, 0, -0.7, -0.7, 0]], 0.0)
WEIGHTS = np.where(LEARNED, [[0, 1 / 6, 1 / 6, 1 / 6, 0, 1 / 4, 1 / 4, 0]], 0.0)
OLD = np.where(LEARNED, [[0, -1.0, -2.0, -0.5, 0, -1.2, -0.3, 0]], 0.0)
CHANGED = OLD + np.where(LEARNED, [[0, 0.3, -0.1, 0.05, 0, -0.4, 0.6, 0]], 0.0)
REFERENCE = OLD + np.where(LEARNED, [[0, 0.2, -0.5, 0.1, 0, 0.3, -0.2, 0]], 0.0)


def batch_of(**more):
  arrays = {
    policy_loss.ADVANTAGES: ADVANTAGES,
    policy_loss.WEIGHTS: WEIGHTS,
    policy_loss.OLD: OLD,
    policy_loss.REFERENCE: REFERENCE,
  } | more
  return {key: jnp.asarray(value, jnp.float32) for key, value in arrays.items()}


def loss_and_slopes(log_probs, *, more=None, **changes):
  """(loss, its gradient in the log-probabilities, figures)."""
  cfg = dataclasses.replace(POLICY, **changes)

  def loss(values):
    return policy_loss.sums(cfg, values, TARGETS, SEGMENTS, batch_of(**(more or {})))

  (value, figures), slopes = jax.value_and_grad(loss, has_aux=True)(
    jnp.asarray(log_probs, jnp.float32)
  )
  return float(value), np.asarray(slopes), figures.means()


def test_the_gradient_where_policy_and_sampler_agree_is_the_papers_coefficient():
  """Section 4.1.4: A + beta (q / p - 1) times the gradient of log p, with the weights 1 / |o|."""
  value, slopes, figures = loss_and_slopes(OLD, kl_weight=0.04)
  coefficient = ADVANTAGES + 0.04 * (np.exp(REFERENCE - OLD) - 1)
  np.testing.assert_allclose(slopes, np.where(LEARNED, -WEIGHTS * coefficient, 0.0), rtol=1e-5)
  assert figures['ratio'] == 1 and figures['clip_share'] == 0
  d = (REFERENCE - OLD)[LEARNED]
  np.testing.assert_allclose(figures['reference_kl'], (np.exp(d) - d - 1).mean(), rtol=1e-5)
  assert value < 0  # the first answer weighs more


def test_the_loss_is_zero_where_advantages_of_a_group_cancel():
  fair = np.where(LEARNED, [[0, 1, 1, 1, 0, -1, -1, 0]], 0.0)
  weights = policy_loss.weights_of('sequence_mean', np.array([3, 2]), 9)
  weights = np.where(LEARNED, np.repeat(weights, [4, 4])[None], 0.0)
  more = {policy_loss.ADVANTAGES: fair, policy_loss.WEIGHTS: weights}
  assert abs(loss_and_slopes(OLD, kl_weight=0.0, more=more)[0]) < 1e-7


def reference_loss(cfg: schema.PolicyConfig, log_probs) -> float:
  """The formulas of the papers once more, token by token."""
  total = 0.0
  for places in ([1, 2, 3], [5, 6]):
    gaps = [log_probs[0, i] - OLD[0, i] for i in places]
    for i, gap in zip(places, gaps):
      ratio = np.exp(gap if cfg.ratio == 'token' else sum(gaps) / len(gaps))
      a = ADVANTAGES[0, i]
      gain = min(ratio * a, min(max(ratio, 1 - cfg.clip_low), 1 + cfg.clip_high) * a)
      if cfg.dual_clip and a < 0:
        gain = max(gain, cfg.dual_clip * a)
      d = REFERENCE[0, i] - log_probs[0, i]
      kl = np.exp(d) - d - 1 if cfg.kl == 'k3' else d * d / 2
      total += WEIGHTS[0, i] * (cfg.kl_weight * kl - gain)
  return total


@pytest.mark.parametrize('kl', schema.POLICY_KLS)
@pytest.mark.parametrize(
  'changes',
  [
    {},
    {'clip_high': 0.28},
    {'dual_clip': 1.1},
    {'ratio': 'sequence', 'clip_low': 0.05, 'clip_high': 0.05},
    {'ratio': 'sequence_token', 'clip_low': 0.05, 'clip_high': 0.05},
  ],
)
def test_losses_are_those_of_formulas_written_out(changes, kl):
  changes = {'kl': kl, 'kl_weight': 0.1} | changes
  value, _, _ = loss_and_slopes(CHANGED, **changes)
  want = reference_loss(dataclasses.replace(POLICY, **changes), CHANGED)
  np.testing.assert_allclose(value, want, rtol=2e-6)


def test_clipping_takes_the_gradient_where_it_binds_only():
  _, slopes, figures = loss_and_slopes(CHANGED, kl_weight=0.0)
  # Ratios 1.35, 0.90, 1.05 with A > 0; 0.67 and 1.82 with A < 0: the first and the fourth bind.
  np.testing.assert_array_equal(slopes[0] != 0, [0, 0, 1, 1, 0, 0, 1, 0])
  assert figures['clip_share'] == pytest.approx(2 / 5)
  _, dual, _ = loss_and_slopes(CHANGED, kl_weight=0.0, dual_clip=1.5)
  np.testing.assert_array_equal(dual[0] != 0, [0, 0, 1, 1, 0, 0, 0, 0])


def test_gspo_shares_one_ratio_and_its_token_form_keeps_each_tokens_gradient():
  """At ratio 1 both forms have the gradient of the tokens' mean, A / |o| each."""
  for form in ('sequence', 'sequence_token'):
    _, slopes, _ = loss_and_slopes(OLD, ratio=form, kl_weight=0.0)
    np.testing.assert_allclose(slopes, -WEIGHTS * ADVANTAGES, rtol=1e-5, err_msg=form)
  per_token = ADVANTAGES * np.array([[0, 1, 2, 3, 0, 1, 1, 0]])  # process supervision
  more = {policy_loss.ADVANTAGES: per_token}
  _, shared, _ = loss_and_slopes(OLD, ratio='sequence', kl_weight=0.0, more=more)
  np.testing.assert_allclose(shared[0, 1:4], -WEIGHTS[0, 1] * 1.5 * np.array([2, 2, 2]), rtol=1e-5)
  _, own, _ = loss_and_slopes(OLD, ratio='sequence_token', kl_weight=0.0, more=more)
  np.testing.assert_allclose(own[0, 1:4], -WEIGHTS[0, 1] * 1.5 * np.array([1, 2, 3]), rtol=1e-5)


def test_rejection_fine_tuning_learns_what_is_right_wherever_it_came_from():
  right = np.where(SEGMENTS == 1, LEARNED, 0.0)
  _, slopes, _ = loss_and_slopes(
    CHANGED, algorithm='rft', kl_weight=0.0, more={policy_loss.ADVANTAGES: right}
  )
  np.testing.assert_allclose(slopes, -WEIGHTS * right, rtol=1e-6)


@pytest.mark.parametrize('kl, backwards', [('k3', False), ('k2', True)])
def test_mean_gradients_of_the_estimates_are_those_of_the_two_distances(kl, backwards):
  """Over all of a vocabulary of 3: k3 has that of KL(q || p), k2 that of KL(p || q)."""
  logits = jnp.array([0.3, -0.8, 0.5])
  log_q = jax.nn.log_softmax(jnp.array([-0.2, 0.4, 0.1]))
  cfg = dataclasses.replace(POLICY, kl=kl, kl_weight=1.0)
  targets, ids = np.array([[0, 1, 2]]), np.array([[1, 2, 3]])

  def estimate(logits):
    log_p = jax.nn.log_softmax(logits)
    p = jax.lax.stop_gradient(jnp.exp(log_p))[None]  # how often each token is drawn
    zero = jnp.zeros((1, 3))
    batch = {
      policy_loss.ADVANTAGES: zero,
      policy_loss.WEIGHTS: p,
      policy_loss.OLD: jax.lax.stop_gradient(log_p)[None],
      policy_loss.REFERENCE: log_q[None],
    }
    return policy_loss.sums(cfg, log_p[None], targets, ids, batch)[0]

  def distance(logits):
    log_p = jax.nn.log_softmax(logits)
    first, second = (log_p, log_q) if backwards else (log_q, log_p)
    return (jnp.exp(first) * (first - second)).sum()

  np.testing.assert_allclose(jax.grad(estimate)(logits), jax.grad(distance)(logits), atol=1e-6)


def value_loss(values, *, clip=0.2):
  """(loss, its gradient in the values, figures) of PPO where its policy's loss is 0."""
  cfg = dataclasses.replace(
    POLICY,
    algorithm='ppo',
    kl_weight=0.0,
    ppo=dataclasses.replace(POLICY.ppo, value_weight=0.5, value_clip=clip),
  )
  more = {
    policy_loss.ADVANTAGES: np.zeros(LEARNED.shape),
    policy_loss.RETURNS: np.where(LEARNED, 1.0, 99.0),
    policy_loss.VALUES: np.where(LEARNED, 0.5, 99.0),
  }

  def loss(values):
    return policy_loss.sums(
      cfg, jnp.asarray(OLD, jnp.float32), TARGETS, SEGMENTS, batch_of(**more), values
    )

  (value, figures), slopes = jax.value_and_grad(loss, has_aux=True)(
    jnp.asarray(values, jnp.float32)
  )
  return float(value), np.asarray(slopes), figures.means()


def test_the_value_loss_by_hand():
  """Returns 1, the sampler's values 0.5, a clip of 0.2."""
  values = np.where(LEARNED, [[0, 0.6, 0.9, 0.1, 0, 1.0, 1.8, 0]], 7.0)
  # 0.6: within. 0.9: counts as 0.7. 0.1: its own error 0.9 is above that of 0.3. 1.0 is right and
  # counts as 0.7. 1.8: its own error 0.8 is above 0.3.
  errors = np.array([0.4, 0.3, 0.9, 0.3, 0.8])
  squares = 0.5 * errors**2
  value, slopes, figures = value_loss(values)
  np.testing.assert_allclose(value, 0.5 * (WEIGHTS[LEARNED] * squares).sum(), rtol=1e-5)
  np.testing.assert_allclose(figures['value_loss'], squares.mean(), rtol=1e-5)
  assert figures['value_clip_share'] == pytest.approx(2 / 5)
  signed = np.array([-0.4, 0, -0.9, 0, 0.8])
  np.testing.assert_allclose(slopes[LEARNED], 0.5 * WEIGHTS[LEARNED] * signed, rtol=1e-5)
  assert not slopes[~LEARNED].any()
  value, _, figures = value_loss(values, clip=0.0)
  own = (values[LEARNED] - 1.0) ** 2 / 2
  np.testing.assert_allclose(value, 0.5 * (WEIGHTS[LEARNED] * own).sum(), rtol=1e-5)
  assert figures['value_clip_share'] == 0


def test_ppo_has_the_distance_in_its_rewards_and_not_in_its_loss():
  ppo = {'algorithm': 'ppo', 'kl_weight': 0.5}
  value, slopes, figures = loss_and_slopes(CHANGED, **ppo)
  plain, same, _ = loss_and_slopes(CHANGED, kl_weight=0.0)
  assert value == plain and (slopes == same).all()
  _, _, other = loss_and_slopes(CHANGED, kl_weight=0.5)
  assert figures['reference_kl'] == other['reference_kl'] > 0


def test_a_reference_far_away_gives_no_infinity():
  far = {policy_loss.REFERENCE: np.where(LEARNED, 200.0, 0.0)}
  value, slopes, _ = loss_and_slopes(OLD, kl_weight=0.04, more=far)
  assert np.isfinite(value) and np.isfinite(slopes).all()


def test_weights_of_each_aggregation():
  lengths = np.array([2, 0, 6])
  np.testing.assert_allclose(
    policy_loss.weights_of('sequence_mean', lengths, 10), [1 / 4, 0, 1 / 12]
  )
  np.testing.assert_allclose(policy_loss.weights_of('token_mean', lengths, 10), [1 / 8, 0, 1 / 8])
  np.testing.assert_allclose(policy_loss.weights_of('constant', lengths, 10), [1 / 20, 0, 1 / 20])
  assert not policy_loss.weights_of('token_mean', np.zeros(2, int), 10).any()


RUN = {
  'objective__kind': 'policy',
  'objective__policy__kl_weight': 0.1,
  'objective__policy__temperature': 0.7,
  'objective__policy__max_new_tokens': 8,
  'data__source': 'arithmetic',
  'init_from': 'elsewhere',
  'model__moe__balance__expert_level__weight': 0.0,
}


def policy_batch(experts=None):
  """A batch with random advantages, and the routing of another model if asked."""
  rows, rng = tiny.batch(), np.random.default_rng(1)
  real = rows['targets'] >= 0
  for key in (policy_loss.ADVANTAGES, policy_loss.WEIGHTS, policy_loss.REFERENCE, policy_loss.OLD):
    rows[key] = np.where(real, rng.normal(size=real.shape), 0).astype(np.float32)
  rows[policy_loss.WEIGHTS] = np.abs(rows[policy_loss.WEIGHTS]) / 100
  rows[policy_loss.OLD] = rows[policy_loss.REFERENCE] = np.where(real, -3.0, 0).astype(np.float32)
  if experts is not None:
    rows[policy_loss.EXPERTS] = experts
  return rows


@functools.cache
def routed():
  """[B, L, layers, K] experts that the tiny model chooses on the tiny batch."""
  cfg, rows = tiny.make(**RUN), tiny.batch()
  inputs = (rows[key] for key in ('tokens', 'positions', 'segment_ids'))
  model = transformer.Transformer(cfg.model, train=True)
  sown = model.apply({'params': tiny.params(cfg.model)}, *inputs, mutable=['intermediates'])[1]
  return np.moveaxis(np.asarray(sown['intermediates']['moe_layers']['moe']['expert_idx'][0]), 0, 2)


@pytest.mark.slow
def test_micro_batches_change_no_gradient():
  params = tiny.params(tiny.make(**RUN).model)
  whole = tiny.gradients(**RUN)(params, policy_batch())
  parts = tiny.gradients(**RUN, train__micro_batch_size=2)(params, policy_batch())
  np.testing.assert_allclose(parts[0].main, whole[0].main, rtol=1e-5)
  figures = [jax.tree.leaves(one[0].figures) for one in (parts, whole)]  # those of values are None
  assert len(figures[1]) == 4
  np.testing.assert_allclose(*figures, rtol=1e-5)
  tiny.assert_trees_close(parts[1], whole[1], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_replay_of_its_own_choices_changes_nothing_and_of_others_reaches_the_router():
  params = tiny.params(tiny.make(**RUN).model)
  gradients = tiny.gradients(**RUN)
  free, own = gradients(params, policy_batch()), gradients(params, policy_batch(routed()))
  np.testing.assert_array_equal(free[0].main, own[0].main)
  tiny.assert_trees_close(own[1], free[1], rtol=1e-6, atol=1e-6)
  other = np.where(routed() < 8, (routed() + 1) % 8, 8)
  loss, found = gradients(params, policy_batch(other))
  assert abs(float(loss.main - free[0].main)) > 1e-6
  load = np.stack([np.bincount(other[:, :, i].ravel(), minlength=9)[:8] for i in range(2)])
  np.testing.assert_array_equal(loss.stats.sums.load, load)
  assert np.abs(np.asarray(found['moe_layers']['moe']['router'])).max() > 1e-6


def test_log_probs_are_those_of_the_tempered_policy():
  rng = np.random.default_rng(0)
  x, head = rng.normal(size=(1, 3, 4)), rng.normal(size=(4, 6))
  targets = np.array([[5, -1, 2]])
  got = objective.policy_log_probs(
    jnp.asarray(x, jnp.float32), jnp.asarray(head, jnp.float32), targets, temperature=0.5, chunk=2
  )
  want = jax.nn.log_softmax(x @ head / 0.5)
  np.testing.assert_allclose(got[0, [0, 2]], [want[0, 0, 5], want[0, 2, 2]], rtol=1e-5)
  assert got[0, 1] == 0


def test_the_temperature_divides_logits_and_rounds_nothing():
  """In bfloat16 too, as where the tokens were drawn: states over 0.7 would be rounded again."""
  rng = np.random.default_rng(0)
  x, head = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((1, 8, 16), (16, 32)))
  targets = rng.integers(32, size=(1, 8))
  got = objective.policy_log_probs(x, head, targets, temperature=0.7, chunk=4)
  logits = jnp.einsum('BLD,DV->BLV', x, head, preferred_element_type=jnp.float32)
  want = jnp.take_along_axis(jax.nn.log_softmax(logits / 0.7), targets[..., None], -1)[..., 0]
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
