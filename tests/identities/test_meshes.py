"""Sharding changes nothing: three training steps on many meshes against one device, and the
collectives of each mesh against a file that a reviewer can read (`tests/meshes/*.txt`).

The meshes and settings cover every pair of axes, and every exchange and dispatch. Regenerate the
files with MOE_JAX_WRITE_GOLDEN=1 python -m pytest -m 'slow or not slow' THIS_FILE
"""

import functools
import os
import pathlib

import jax
import numpy as np
import pytest

from moe_jax.devices import partitioning
from moe_jax.planning.hlo import collectives
from moe_jax.training import optimizer_step, train_state
from tests import tiny

GOLDEN = pathlib.Path(__file__).parent / 'meshes'
# The partitioner changes between releases; the files are of this one.
GOLDEN_JAX = '0.10'
STEPS = 3

PREFIX = 'model__moe__'
GQA = {
  'model__num_heads': 4,
  'model__attention__num_kv_heads': 2,
  f'{PREFIX}expert_bias__update_rule': 'sign',
  f'{PREFIX}num_expert_groups': 4,
  f'{PREFIX}num_limited_groups': 2,
}
MLA = {
  **tiny.MLA,
  'model__num_mtp_layers': 1,
  f'{PREFIX}score_func': 'sigmoid',
  f'{PREFIX}norm_topk_prob': True,
  f'{PREFIX}capacity__policy': 'score',
  f'{PREFIX}capacity__factor': 1.0,
  f'{PREFIX}capacity__group_rows': 4,
}
MODELS = {'gqa': GQA, 'mla': MLA}


def exchange(kind, **others):
  return {f'{PREFIX}exchange__kind': kind} | others


# name -> (model, mesh, settings that must change nothing)
CASES = {
  'data': ('gqa', dict(data=8), {'mesh__zero1': True}),
  'expert': ('gqa', dict(expert=8), exchange('ragged_all_to_all', model__remat='moe_core')),
  'data_fsdp_expert': ('gqa', dict(data=2, fsdp=2, expert=2), exchange('all_to_all')),
  'fsdp_expert_sequence': (
    'gqa',
    dict(fsdp=2, expert=2, sequence=2),
    exchange('all_gather', model__attention__impl='chunked'),
  ),
  'data_sequence_tensor': (
    'gqa',
    dict(data=2, sequence=2, tensor=2),
    {f'{PREFIX}dispatch': 'dense', 'train__micro_batch_size': 4},
  ),
  'stage_data_expert': (
    'gqa',
    dict(stage=2, data=2, expert=2),
    exchange('all_to_all', model__remat='full', mesh__zero1=True),
  ),
  'expert_tensor': ('mla', dict(expert=4, tensor=2), exchange('ragged_all_to_all')),
  'fsdp_tensor': (
    'mla',
    dict(fsdp=4, tensor=2),
    {f'{PREFIX}dispatch': 'capacity', 'model__remat': 'full'},
  ),
  'dcn_data_expert_sequence': (
    'mla',
    dict(dcn_data=2, expert=2, sequence=2),
    exchange('all_to_all', **{f'{PREFIX}dispatch': 'capacity', 'mesh__zero1': True}),
  ),
  'dcn_fsdp_fsdp_expert': (
    'mla',
    dict(dcn_fsdp=2, fsdp=2, expert=2),
    exchange('all_gather', **{f'{PREFIX}dispatch': 'dense', 'model__remat': 'offload'}),
  ),
}


def run(cfg, mesh):
  """(compiled step, the metrics of three steps, the last state), both on the host."""
  state = train_state.init_state(cfg, mesh)
  batch = partitioning.put_batch(tiny.batch(), mesh)
  options = {'xla_backend_optimization_level': 0}
  with partitioning.activate(mesh):
    step = optimizer_step.make_train_step(cfg, mesh).lower(state, batch).compile(options)
  found = []
  for _ in range(STEPS):
    state, metrics = step(state, batch)
    found.append(jax.device_get(metrics))
  return step, found, jax.device_get(state)


@functools.cache
def on_one_device(model):
  return run(tiny.make(**MODELS[model], mesh__data=1), tiny.mesh(1))


@functools.cache
def sharded(name):
  model, axes, settings = CASES[name]
  sizes = {f'mesh__{axis}': size for axis, size in ({'data': 1} | axes).items()}
  cfg = tiny.make(**MODELS[model], **settings, **sizes)
  mesh = partitioning.make_mesh(cfg.mesh)
  partitioning.check(cfg, mesh)
  return mesh, *run(cfg, mesh)


@pytest.mark.slow
@pytest.mark.parametrize('name', CASES)
def test_three_steps_equal_those_of_one_device(name):
  """Float32 sums in another order: 1e-5 of the loss, 1e-4 of a weight's largest change."""
  _, _, got, state = sharded(name)
  _, want, want_state = on_one_device(CASES[name][0])
  for a, b in zip(got, want):
    np.testing.assert_allclose(a.loss, b.loss, rtol=1e-5)
    np.testing.assert_allclose(a.grad_norm, b.grad_norm, rtol=1e-4)
    np.testing.assert_allclose(a.aux_loss, b.aux_loss, rtol=1e-4)
    np.testing.assert_array_equal(a.stats.sums.load, b.stats.sums.load)
    np.testing.assert_array_equal(a.stats.dropped, b.stats.dropped)
    np.testing.assert_array_equal(a.stats.sums.sent, b.stats.sums.sent)
    assert not a.stats.overflow.any()
  assert CASES[name][0] != 'mla' or any(b.stats.dropped.any() for b in want)
  # The biases that select move by whole steps, so they are equal or differ by one.
  jax.tree.map(np.testing.assert_array_equal, state.router_state, want_state.router_state)
  # Adam divides by the root of the second moment: a weight whose gradient is rounding error alone
  # moves by the learning rate all the same, so a few may differ.
  rate = 1e-2 * STEPS
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(state.params), jax.tree.leaves(want_state.params)
  ):
    off = np.abs(a - b) > 1e-3 * rate
    assert off.mean() < 0.02, (jax.tree_util.keystr(path), off.mean(), np.abs(a - b).max())


def test_the_meshes_cover_every_pair_of_axes():
  used = [set(axes) for _, axes, _ in CASES.values()]
  names = ('data', 'fsdp', 'expert', 'sequence', 'tensor')
  for i, a in enumerate(names):
    for b in names[i + 1 :]:
      assert any({a, b} <= axes for axes in used), (a, b)
  assert {axis for axes in used for axis in axes} == set(partitioning.MESH_AXES)


@pytest.mark.slow
@pytest.mark.parametrize('name', CASES)
def test_collectives_are_those_of_the_file(name):
  mesh, step, *_ = sharded(name)
  model, axes, settings = CASES[name]
  shape = ' x '.join(f'{axis}={size}' for axis, size in axes.items())
  others = ', '.join(f'{key.replace("__", ".")}={value}' for key, value in settings.items())
  text = (
    f'One training step of the tiny model ({model}) on {shape}\n{others}\n\n'
    f'{collectives.summary(step.as_text(), mesh)}\n'
  )
  path = GOLDEN / f'{name}.txt'
  if os.environ.get('MOE_JAX_WRITE_GOLDEN'):
    path.write_text(text)
  if not jax.__version__.startswith(GOLDEN_JAX):
    pytest.skip(f'the files are of JAX {GOLDEN_JAX}; this is {jax.__version__}')
  assert text == path.read_text()


@pytest.mark.slow
@pytest.mark.parametrize('name', CASES)
def test_collectives_run_along_the_axes_that_they_should(name):
  """What crosses the expert axis is tokens; what crosses the slow network is gradients only."""
  mesh, step, *_ = sharded(name)
  found = collectives.collectives(step.as_text(), mesh)

  def along(axis):
    return {one.kind for one in found if axis in one.axes}

  sizes, kind = CASES[name][1], CASES[name][2].get(f'{PREFIX}exchange__kind')
  assert all(set(one.axes) <= set(sizes) for one in found)
  if 'expert' in sizes:
    assert ('all-to-all' in along('expert')) == (kind == 'all_to_all')
  assert along('dcn_data') <= {'all-reduce', 'all-gather'}
