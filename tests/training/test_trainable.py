import functools

import jax
import numpy as np
import optax
import pytest

from moe_jax.devices import partitioning
from moe_jax.training import optim, optimizer_step, train_state, trainable
from tests import tiny
from tests.training import steps

# Of 8 experts in 2 MoE layers: 5 matrices of each kind, in another order than that of the places.
CHOSEN = ((5, 1, 7), (2, 0))
ESFT = {'init_from': 'base', 'trainable__kind': 'experts', 'trainable__experts': CHOSEN}
STEP = steps.STEP | ESFT | {'optim__weight_decay': 0.1, 'optim__clip_norm': 0.05}


def names(tree):
  return {
    '/'.join(entry.key for entry in path): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def test_all_is_the_tree_itself():
  cfg = tiny.make()
  params = tiny.params(cfg.model)
  assert trainable.select(cfg, params) is params
  assert trainable.merge(cfg, {}, params) is params


@pytest.mark.parametrize(
  'chosen, shared, others',
  [
    (CHOSEN, False, False),
    (CHOSEN, True, False),
    (CHOSEN, False, True),
    (((), ()), True, True),
  ],
)
def test_the_parts_of_a_model_and_back(chosen, shared, others):
  switches = {'trainable__shared_experts': shared, 'trainable__non_expert_modules': others}
  cfg = tiny.make(**ESFT | switches | {'trainable__experts': chosen}, model__num_mtp_layers=1)
  params = tiny.params(cfg.model)
  part = trainable.select(cfg, params)
  whole, found, moe = names(params), names(part), 'moe_layers/moe/'
  routed = {f'{moe}gate_up': (5, 16, 2, 8), f'{moe}down': (5, 8, 16)} if any(chosen) else {}
  want = {}
  for name, shape in whole.items():
    if name.startswith(f'{moe}shared/'):
      want |= {name: shape} if shared else {}
    elif name not in (f'{moe}gate_up', f'{moe}down') and not name.startswith('mtp_layers/'):
      want |= {name: shape} if others else {}
  assert found == want | routed
  assert ('head' in want) == others and (f'{moe}shared/down' in want) == shared
  assert trainable.count(cfg) == sum(np.prod(shape) for shape in found.values())

  doubled = trainable.merge(cfg, params, jax.tree.map(lambda x: 2 * x, part))
  for name, factor in factors(cfg, params).items():
    before, after = (functools.reduce(dict.get, name, tree) for tree in (params, doubled))
    np.testing.assert_array_equal(before * factor, after)


def factors(cfg, params):
  """Path -> 2 where a weight is trained, else 1, in the shape of the leaf or of a part of it."""
  found = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    names = tuple(entry.key for entry in path)
    inside = names[:2] == ('moe_layers', 'moe')
    if inside and names[2] in ('gate_up', 'down'):
      factor = np.ones(leaf.shape)
      for layer, experts in enumerate(cfg.trainable.experts):
        for expert in experts:
          factor[layer, expert] = 2
    elif inside and names[2] == 'shared':
      factor = 1 + cfg.trainable.shared_experts
    else:
      factor = 1 + (cfg.trainable.non_expert_modules and names[0] != 'mtp_layers')
    found[names] = factor
  return found


def test_moments_are_those_of_the_trained_weights_and_lie_as_they_do():
  cfg = tiny.make(**ESFT, mesh__data=1, mesh__fsdp=2, mesh__expert=2)
  abstract = train_state.abstract_state(cfg, partitioning.make_mesh(cfg.mesh, jax.devices()[:4]))
  moments = [leaf for leaf in jax.tree.leaves(abstract.opt_state) if leaf.shape]
  one_expert = 3 * 16 * 8
  assert trainable.count(cfg) == 5 * one_expert
  assert sum(leaf.size for leaf in moments) == 2 * 5 * one_expert
  # Split over FSDP along D; the experts of a layer have no place on the expert axis any more.
  assert {leaf.shape: leaf.sharding.spec for leaf in moments} == {
    (5, 16, 2, 8): jax.P(None, 'fsdp', None, None),
    (5, 8, 16): jax.P(None, None, 'fsdp'),
  }


@pytest.fixture(scope='module')
def tuned():
  """(config, the states before and after each of three steps, their metrics)."""
  cfg, mesh = tiny.make(**STEP), steps.one_device()
  options = {'xla_backend_optimization_level': 0}
  with partitioning.activate(mesh):
    lowered = optimizer_step.make_train_step(cfg, mesh).lower(steps.fresh(cfg), tiny.batch())
  step, state, found = lowered.compile(compiler_options=options), steps.fresh(cfg), []
  states = [jax.device_get(state)]
  for _ in range(3):
    state, metrics = step(state, tiny.batch())
    states.append(jax.device_get(state))
    found.append(metrics)
  return cfg, states, found


def test_a_step_is_the_optimizer_on_the_trained_part_of_the_whole_gradient(tuned, whole):
  """Also: accumulated gradients, clipping and decay are those of the part."""
  cfg, (before, after, *_), (first, *_) = tuned
  full = jax.device_get(whole[1])
  grads = trainable.select(cfg, full)
  norm = optax.tree.norm(grads)
  assert norm > 2 * cfg.optim.clip_norm
  np.testing.assert_allclose(first.grad_norm, norm, rtol=1e-4)
  assert norm < 0.9 * optax.tree.norm(full)
  part = trainable.select(cfg, before.params)
  updates, _ = optim.optimizer(cfg.optim, cfg.train.num_steps).update(grads, before.opt_state, part)
  want = optax.apply_updates(part, updates)
  tiny.assert_trees_close(trainable.select(cfg, after.params), want, rtol=1e-5, atol=1e-5)


def test_what_is_frozen_does_not_move_by_a_bit(tuned):
  cfg, states, _ = tuned
  first, last = states[0].params, states[-1].params
  for names, factor in factors(cfg, first).items():
    before, after = (functools.reduce(dict.get, names, tree) for tree in (first, last))
    trained = np.broadcast_to(factor == 2, before.shape)
    np.testing.assert_array_equal(before[~trained], after[~trained], err_msg=str(names))
    assert (before[trained] != after[trained]).mean() > 0.9 if trained.any() else True
  jax.tree.map(np.testing.assert_array_equal, states[0].router_state, states[-1].router_state)


@pytest.mark.slow
def test_on_many_devices_with_zero1(tuned):
  _, states, found = tuned
  sizes = {f'mesh__{axis}': 2 for axis in ('data', 'fsdp', 'expert')}
  cfg = tiny.make(**STEP | {'train__micro_batch_size': 0}, **sizes, mesh__zero1=True)
  mesh = partitioning.make_mesh(cfg.mesh)
  layout = jax.tree.map(lambda x: x.sharding, train_state.abstract_state(cfg, mesh))
  batch = partitioning.put_batch(tiny.batch(), mesh)
  state = jax.device_put(steps.fresh(cfg), layout)
  with partitioning.activate(mesh):
    lowered = optimizer_step.make_train_step(cfg, mesh).lower(state, batch)
  step = lowered.compile(compiler_options={'xla_backend_optimization_level': 0})
  for want in found:
    state, got = step(state, batch)
    np.testing.assert_allclose(got.loss, want.loss, rtol=1e-5)
    np.testing.assert_allclose(got.grad_norm, want.grad_norm, rtol=1e-4)
  assert jax.tree.map(lambda x: x.sharding, state) == layout
  tiny.assert_trees_close(jax.device_get(state.params), states[-1].params, rtol=1e-4, atol=1e-4)
  moment = state.opt_state[-1][0].mu['moe_layers']['moe']['gate_up']
  assert moment.addressable_shards[0].data.size * 8 == moment.size  # 5 rows of [16, 2, 8]


def test_trees_are_laid_over_each_other():
  old = {'x': {'bias': 1, 'table': 2}, 'y': 3}
  # What the new one lacks, a bias say, keeps its start.
  assert trainable.overlaid(old, {'x': {'bias': 4}}) == {'x': {'bias': 4, 'table': 2}, 'y': 3}
  assert trainable.expanded(tiny.make(), {}, old) is old
