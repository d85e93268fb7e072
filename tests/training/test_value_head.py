"""The value head: its place in the state, its gradient, and what rests while it warms up."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import schema
from moe_jax.devices import partitioning
from moe_jax.models import transformer
from moe_jax.runs import warm_start
from moe_jax.training import (
  lora,
  optim,
  optimizer_step,
  policy_loss,
  train_state,
  trainable,
  value_head,
)
from tests import tiny
from tests.training import steps
from tests.training.test_policy_loss import RUN, policy_batch

PPO = RUN | {
  'objective__policy__algorithm': 'ppo',
  'objective__policy__ppo__value_warmup': 1,
  'optim__weight_decay': 0.1,
}


def head(seed=0):
  rng = np.random.default_rng(seed)
  return {'kernel': jnp.asarray(rng.normal(size=(16, 1)), jnp.float32), 'bias': jnp.full(1, 0.5)}


def ppo_batch():
  rows, rng = policy_batch(), np.random.default_rng(2)
  real = rows['targets'] >= 0
  for key in (policy_loss.RETURNS, policy_loss.VALUES):
    rows[key] = np.where(real, rng.normal(size=real.shape), 0).astype(np.float32)
  return rows


def with_head(cfg: schema.Config):
  return {**tiny.params(cfg.model), value_head.KEY: head()}


def test_values_are_the_linear_map_of_every_place():
  x = np.random.default_rng(1).normal(size=(2, 3, 16))
  got = value_head.values(head(), jnp.asarray(x, jnp.float32))
  np.testing.assert_allclose(got, (x @ head()['kernel'])[..., 0] + 0.5, rtol=1e-5)


@pytest.mark.parametrize('kind', ['all', 'lora', 'experts'])
def test_the_head_begins_at_0_is_trained_in_every_run_and_is_no_weight_of_the_model(kind):
  changes = {'trainable__kind': kind}
  if kind == 'experts':
    changes['trainable__experts'] = ((1,), (2, 3))
  cfg = tiny.make(**PPO, **changes)
  state = train_state.init_state(cfg, steps.one_device())
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.params[value_head.KEY]))
  selected = trainable.select(cfg, state.params)
  assert jax.tree.map(jnp.shape, selected[value_head.KEY]) == {'kernel': (16, 1), 'bias': (1,)}
  assert trainable.count(cfg) == sum(leaf.size for leaf in jax.tree.leaves(selected))
  assert set(state.variables['params']) == set(tiny.params(cfg.model))
  assert not optim.decay_mask(state.params)[value_head.KEY]['bias']
  assert optim.decay_mask(state.params)[value_head.KEY]['kernel']
  grpo = train_state.abstract_state(tiny.make(**RUN, **changes), steps.one_device())
  assert value_head.KEY not in grpo.params


@functools.cache
def found(**changes):
  return tiny.gradients(**PPO, **changes)(with_head(tiny.make(**PPO)), ppo_batch())


@pytest.mark.slow
def test_both_losses_reach_the_trunk_and_the_value_alone_the_head():
  cfg, rows = tiny.make(**PPO), ppo_batch()
  loss, grads = found()
  params = with_head(cfg)
  inputs = (rows[key] for key in ('tokens', 'positions', 'segment_ids'))
  normed = (
    transformer.Transformer(cfg.model).apply({'params': value_head.without(params)}, *inputs).normed
  )
  values = np.asarray(value_head.values(params[value_head.KEY], normed), np.float64)
  old, returns = (rows[key].astype(np.float64) for key in (policy_loss.VALUES, policy_loss.RETURNS))
  near = old + np.clip(values - old, -0.2, 0.2)
  own, held = (values - returns) ** 2, (near - returns) ** 2
  real = rows['targets'] >= 0
  slope = np.where(real & (own >= held), rows[policy_loss.WEIGHTS] * (values - returns), 0)
  np.testing.assert_allclose(grads[value_head.KEY]['bias'][0], 0.1 * slope.sum(), rtol=1e-3)
  np.testing.assert_allclose(
    grads[value_head.KEY]['kernel'][:, 0],
    0.1 * np.einsum('BL,BLD->D', slope, np.asarray(normed, np.float64)),
    rtol=1e-3,
    atol=1e-5,
  )
  np.testing.assert_allclose(
    float(loss.figures.value_loss), 0.5 * np.where(real, np.maximum(own, held), 0).sum(), rtol=1e-4
  )
  # With more weight on the value the trunk's gradient is another one.
  _, heavy = found(objective__policy__ppo__value_weight=10.0)
  trunk = [value_head.without(one)['moe_layers']['moe']['router'] for one in (grads, heavy)]
  assert np.abs(trunk[1] - trunk[0]).max() > 1e-3 * np.abs(trunk[0]).max()


@pytest.mark.slow
def test_micro_batches_change_no_gradient_of_ppo():
  whole, parts = found(), found(train__micro_batch_size=2)
  np.testing.assert_allclose(parts[0].main, whole[0].main, rtol=1e-5)
  np.testing.assert_allclose(parts[0].figures, whole[0].figures, rtol=1e-5)
  tiny.assert_trees_close(parts[1], whole[1], rtol=1e-3, atol=1e-5)


def started(cfg, mesh):
  """A state at step 0 whose head is not 0, on a mesh."""
  state = train_state.init_state(cfg, mesh)
  placed = jax.tree.map(
    lambda new, old: jax.device_put(new, old.sharding), head(), state.params[value_head.KEY]
  )
  return state.replace(params={**state.params, value_head.KEY: placed})


def two_steps(mesh, **changes):
  """Weights and router state at the start and after each of two steps, on the host."""
  cfg = tiny.make(**PPO, **changes)
  state = started(cfg, mesh)
  seen, step = [jax.device_get((state.params, state.router_state))], None
  metrics = []
  with partitioning.activate(mesh):
    batch = partitioning.put_batch(ppo_batch(), mesh)
    lowered = optimizer_step.make_train_step(cfg, mesh).lower(state, batch)
    step = lowered.compile(compiler_options={'xla_backend_optimization_level': 0})
    for _ in range(2):
      state, one = step(state, batch)
      seen.append(jax.device_get((state.params, state.router_state)))
      metrics.append(optimizer_step.host_metrics(one))
  return seen, metrics


@functools.cache
def warmed():
  return two_steps(steps.one_device(), model__moe__expert_bias__update_rule='sign')


def differing(a, b):
  leaves = zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True)
  return {jax.tree_util.keystr(path) for (path, x), y in leaves if not np.array_equal(x, y)}


@pytest.mark.slow
def test_while_the_value_warms_up_no_bit_of_the_policy_changes():
  (start, first, second), _ = warmed()
  assert differing(first, start) == {"[0]['value_head']['bias']", "[0]['value_head']['kernel']"}
  assert len(differing(second, first)) > 10  # and then all learn, the expert bias too
  assert any('expert_bias' in name for name in differing(second, first))


@pytest.mark.slow
def test_the_head_learns_at_its_own_rate():
  (start, first, _), (metrics, _) = warmed()
  moved = first[0][value_head.KEY]['bias'] - start[0][value_head.KEY]['bias']
  # Adam's first step is the rate, whatever the gradient; value_rate is 10.
  np.testing.assert_allclose(np.abs(moved), 10 * metrics['lr'], rtol=1e-3)


@pytest.mark.slow
def test_the_first_step_of_the_policy_is_the_rate():
  (_, first, second), (_, metrics) = warmed()
  moved = second[0]['final_norm']['scale'] - first[0]['final_norm']['scale']
  np.testing.assert_allclose(np.abs(moved), metrics['lr'], rtol=1e-2)


@pytest.mark.slow
def test_two_devices_learn_as_one():
  (*_, one), metrics = warmed()
  (*_, two), others = two_steps(
    tiny.mesh(data=1, fsdp=2),
    mesh__data=1,
    mesh__fsdp=2,
    model__moe__expert_bias__update_rule='sign',
  )
  for a, b in zip(metrics, others):
    for key in ('loss', 'grad_norm', *policy_loss.PPO_FIGURES):
      np.testing.assert_allclose(a[key], b[key], rtol=1e-4, atol=1e-7)
  tiny.assert_trees_close(two[0][value_head.KEY], one[0][value_head.KEY], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('theirs', [True, False])
@pytest.mark.parametrize('ours', [True, False])
def test_another_run_takes_the_head_over_if_it_has_one(ours, theirs):
  cfg, source = (tiny.make(**(PPO if ppo else RUN)) for ppo in (ours, theirs))
  fresh = train_state.abstract_state(cfg, steps.one_device())
  params = with_head(cfg) if theirs else tiny.params(cfg.model)
  got = warm_start.adapted(cfg, source, {'params': params}, fresh, lambda line: None)['params']
  assert (value_head.KEY in got) == (ours and theirs)
  state = train_state.state_from(cfg, steps.one_device(), jax.tree.map(jnp.copy, got))
  assert (value_head.KEY in state.params) == ours
  if ours:
    bias = state.params[value_head.KEY]['bias']
    assert float(bias[0]) == (0.5 if theirs else 0.0)


def test_pairs_of_lora_and_a_head_stand_beside_each_other():
  cfg = tiny.make(**PPO, trainable__kind='lora')
  state = train_state.init_state(cfg, steps.one_device())
  assert {lora.KEY, value_head.KEY} <= set(state.params)
  merged = lora.merged(state.params)
  assert value_head.KEY in merged and lora.KEY not in merged
