import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax.config import batch_sizes
from moe_jax.devices import partitioning
from moe_jax.models import model_variables
from moe_jax.training import optim, train_state, value_head
from tests import tiny
from tests.training.test_policy_loss import RUN

EXACT = dict(rel=1e-5)  # float32 schedules


def schedule(num_steps=100, **overrides):
  overrides = {f'optim__{k}': v for k, v in ({'peak_lr': 2.0} | overrides).items()}
  rate = optim.learning_rate(tiny.make(train__num_steps=num_steps, **overrides).optim, num_steps)
  return lambda step: float(rate(jnp.int32(step)))


def test_warm_up_rises_to_the_peak_and_its_first_step_already_trains():
  rate = schedule(schedule='constant', warmup_steps=4)
  # peak * (1, 2, 3, 4) / 4, then the schedule
  assert [rate(step) for step in range(6)] == pytest.approx([0.5, 1, 1.5, 2, 2, 2], **EXACT)


def test_warm_up_of_one_step_and_of_none():
  for warmup in (0, 1):
    rate = schedule(schedule='constant', warmup_steps=warmup)
    assert [rate(step) for step in range(3)] == pytest.approx([2, 2, 2], **EXACT)


@pytest.mark.parametrize('warmup', [0, 10])
def test_multi_step_drops_at_80_and_90_percent_of_the_whole_run(warmup):
  rate = schedule(schedule='multi_step', warmup_steps=warmup)
  # The 80 steps 0..79 run at the peak at most, 80..89 at .316 of it, 90..99 at .316^2.
  for step, factor in ((50, 1), (79, 1), (80, 0.316), (89, 0.316), (90, 0.316**2), (99, 0.316**2)):
    assert rate(step) == pytest.approx(2 * factor, **EXACT), step


def test_multi_step_of_the_2b_model():
  rate = schedule(25_000, schedule='multi_step', warmup_steps=2000, peak_lr=1.08e-3)
  for step, factor in ((1999, 1), (19_999, 1), (20_000, 0.316), (22_500, 0.316**2)):
    assert rate(step) == pytest.approx(1.08e-3 * factor, **EXACT), step


@pytest.mark.parametrize('num_steps', [5, 6, 10, 15])
def test_multi_step_keeps_all_its_drops_in_a_short_run(num_steps):
  """After the last step every boundary has been passed."""
  rate = schedule(num_steps, schedule='multi_step')
  assert rate(num_steps) == pytest.approx(2 * 0.316**2, **EXACT)


def test_cosine_by_hand():
  rate = schedule(101, schedule='cosine', warmup_steps=20, final_lr_fraction=0.1)
  # 80 steps from the peak (step 20) to the last step: peak * (.1 + .9 (1 + cos(pi t / 80)) / 2)
  for step, cosine in ((20, 1), (40, math.cos(math.pi / 4)), (60, 0), (100, -1)):
    assert rate(step) == pytest.approx(2 * (0.1 + 0.9 * (1 + cosine) / 2), **EXACT), step


def test_linear_by_hand():
  rate = schedule(101, schedule='linear', warmup_steps=20, final_lr_fraction=0.1)
  # 80 steps from 2 (step 20) to .2 (the last step): 2 - 1.8 * t / 80
  for step, value in ((20, 2), (40, 1.55), (60, 1.1), (100, 0.2)):
    assert rate(step) == pytest.approx(value, **EXACT), step


def test_stages_by_hand():
  stages = ((0.3, 1.0, 'constant'), (0.7, 0.1, 'cosine'), (0.9, 0.1, 'constant'))
  rate = schedule(100, schedule='stages', warmup_steps=10, stages=(*stages, (1.0, 0.02, 'linear')))
  middle = 2 * (0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)  # a quarter of 40 steps
  hand = ((9, 2), (10, 2), (29, 2), (30, 2), (40, middle), (50, 1.1), (70, 0.2), (89, 0.2))
  for step, value in (*hand, (95, 0.12), (99, 0.2 - 0.9 * 0.16)):
    assert rate(step) == pytest.approx(value, **EXACT), step


def test_batch_size_ramp():
  cfg = tiny.make(train__batch_ramp=((3, 2), (5, 4)), train__batch_size=8).train
  sizes = [batch_sizes.of(cfg).at(step) for step in range(7)]
  assert sizes == [2, 2, 2, 4, 4, 8, 8]
  assert batch_sizes.of(tiny.make().train).at(0) == 8


def test_tokens_at_counts_the_ramp():
  cfg = tiny.make(train__batch_ramp=((3, 2), (5, 4)), train__batch_size=8).train
  sizes = [batch_sizes.of(cfg).at(step) for step in range(9)]
  want = [10 * sum(sizes[:step]) for step in range(10)]
  assert optim.tokens_at(cfg, 10, range(10)) == want
  assert optim.tokens_at(cfg, 10, [3, 7]) == [60, 300]  # 3 x 2; 2 x 4 and 2 x 8 rows more


def test_decay_mask_spares_norm_scales_also_when_stacked():
  shapes = model_variables.abstract_params(tiny.make().model)
  mask = optim.decay_mask(shapes)
  assert shapes['moe_layers']['ffn_norm']['scale'].ndim == 2  # looks like a matrix
  for path, decays in jax.tree_util.tree_leaves_with_path(mask):
    assert decays == (path[-1].key != 'scale'), jax.tree_util.keystr(path)
  assert not mask['final_norm']['scale'] and mask['embedding'] and mask['moe_layers']['moe']['down']


def one_update(params, grads, **overrides):
  overrides = {f'optim__{k}': v for k, v in ({'peak_lr': 0.5, 'eps': 1e-6} | overrides).items()}
  optimizer = optim.optimizer(tiny.make(**overrides).optim, 20)
  updates, _ = optimizer.update(grads, optimizer.init(params), params)
  return updates


PARAMS = {'a': {'scale': jnp.array([2.0, 2.0])}, 'b': {'kernel': jnp.array([[3.0], [4.0]])}}


def test_decay_is_decoupled_and_scaled_by_the_rate():
  zeros = jax.tree.map(jnp.zeros_like, PARAMS)
  updates = one_update(PARAMS, zeros, weight_decay=0.1)
  np.testing.assert_array_equal(updates['a']['scale'], 0)
  np.testing.assert_allclose(updates['b']['kernel'], [[-0.15], [-0.2]], rtol=1e-6)  # -.5 * .1 * w


def test_first_adam_step_is_the_rate_times_the_sign():
  grads = {'a': {'scale': jnp.array([3.0, -3.0])}, 'b': {'kernel': jnp.array([[0.2], [-7.0]])}}
  # Bias-corrected moments of the first step are g and g^2: g / |g|.
  updates = one_update(PARAMS, grads, weight_decay=0.0)
  np.testing.assert_allclose(updates['a']['scale'], [-0.5, 0.5], rtol=1e-4)
  np.testing.assert_allclose(updates['b']['kernel'], [[-0.5], [0.5]], rtol=1e-4)


def test_clipping_scales_all_gradients_by_the_global_norm():
  # Norm sqrt(0 + 9 + 16) = 5; clipped to 1 they are divided by 5. A huge eps makes Adam linear:
  # g / (|g| + eps) = g / eps.
  grads = {'a': {'scale': jnp.zeros(2)}, 'b': {'kernel': jnp.array([[3.0], [4.0]])}}

  def kernel(clip):
    return one_update(PARAMS, grads, weight_decay=0.0, eps=1e6, peak_lr=1e6, clip_norm=clip)['b'][
      'kernel'
    ]

  np.testing.assert_allclose(kernel(1.0), [[-0.6], [-0.8]], rtol=1e-4)
  np.testing.assert_allclose(kernel(0.0), [[-3], [-4]], rtol=1e-4)  # 0 = no clipping
  np.testing.assert_allclose(kernel(10.0), [[-3], [-4]], rtol=1e-4)


def test_moments_are_kept_in_their_dtype_and_computed_with_in_float32():
  cfg = tiny.make(optim__moment_dtype='bfloat16', optim__beta1=0.9, optim__clip_norm=0.0).optim
  optimizer = optim.optimizer(cfg, 20)
  grads = jax.tree.map(lambda a: jnp.full_like(a, 1 / 3), PARAMS)
  state, mu = optimizer.init(PARAMS), np.zeros((2, 1), np.float32)
  for _ in range(4):
    for name in ('mu', 'nu'):
      kept = jax.tree.leaves(optax.tree.get(state, name))
      assert kept and {leaf.dtype for leaf in kept} == {jnp.dtype('bfloat16')}
    _, state = optimizer.update(grads, state, PARAMS)
    mu = mu.astype(np.float32) * np.float32(0.9) + np.float32(1 / 3) * np.float32(0.1)
    mu = np.asarray(jnp.asarray(mu, jnp.bfloat16))  # rounded once per step
    np.testing.assert_array_equal(optax.tree.get(state, 'mu')['b']['kernel'], mu)
  plain = optim.optimizer(tiny.make().optim, 20).init(PARAMS)
  assert {leaf.dtype for leaf in jax.tree.leaves(optax.tree.get(plain, 'nu'))} == {
    jnp.dtype('float32')
  }


@pytest.mark.parametrize('beta2', [0.95, 0.999])
def test_adam_counts_for_a_policy_only_what_its_moments_have_seen(beta2):
  """Behind 200 steps of the value head alone the first update was 0.45 or 1.4 rates."""
  cfg = tiny.make(optim__beta2=beta2, optim__clip_norm=0.0, optim__weight_decay=0.0).optim
  head = {'kernel': jnp.ones((2, 1))}
  both = {**PARAMS, value_head.KEY: head}
  optimizer, plain = optim.optimizer(cfg, 20, rests=True), optim.optimizer(cfg, 20)
  update = tiny.jit(optimizer.update)

  def gradients(step, resting):
    rng = np.random.default_rng(step)
    drawn = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), jnp.float32), both)
    return value_head.alone(jnp.bool_(resting), drawn, jax.tree.map(jnp.zeros_like, drawn))

  state, own, heads = optimizer.init(both), plain.init(PARAMS), plain.init(head)
  for step in range(204):
    resting, applied = step < 200, step not in (7, 201)  # of either kind one that is not applied
    flags = {'applied': jnp.bool_(applied)}
    grads = gradients(step, resting)
    found, state = update(grads, state, both, resting=jnp.bool_(resting), **flags)
    if not resting:
      expected, own = plain.update(value_head.without(grads), own, PARAMS, **flags)
      if applied:
        tiny.assert_trees_close(value_head.without(found), expected, rtol=1e-5, atol=1e-9)
      if step == 200:
        np.testing.assert_allclose(np.abs(found['a']['scale']), cfg.peak_lr, rtol=1e-4)
    expected, heads = plain.update(grads[value_head.KEY], heads, head, **flags)
    if applied:
      tiny.assert_trees_close(found[value_head.KEY], expected, rtol=1e-5, atol=1e-9)


def test_a_policy_that_never_rests_has_the_state_of_every_other_run():
  policy = {'objective__policy__algorithm': 'ppo', 'objective__policy__kl_weight': 0.0}
  warm, plain = (
    train_state.boxed_state(tiny.make(**RUN | policy, objective__policy__ppo__value_warmup=n))
    for n in (1, 0)
  )
  warm, plain = (partitioning.unbox(state) for state in (warm, plain))
  assert len(jax.tree.leaves(warm.opt_state)) == len(jax.tree.leaves(plain.opt_state)) + 1
  direct = jax.eval_shape(optim.optimizer(tiny.make().optim, 20).init, plain.params)
  assert jax.tree.structure(plain.opt_state) == jax.tree.structure(direct)
