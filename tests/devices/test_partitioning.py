import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from moe_jax import errors
from moe_jax.devices import partitioning
from moe_jax.models import model_variables
from moe_jax.training import objective
from tests import tiny

ONES = dict.fromkeys(partitioning.MESH_AXES, 1)


def test_mesh_has_every_axis_and_minus_1_takes_what_is_left():
  mesh = tiny.mesh(8, data=-1)
  assert dict(mesh.shape) == ONES | {'data': 8}
  assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
  assert dict(tiny.mesh(8, data=2, expert=-1).shape) == ONES | {'data': 2, 'expert': 4}
  assert dict(partitioning.make_mesh(tiny.make().mesh).shape) == ONES | {'data': 8}
  assert dict(tiny.mesh(1).shape) == ONES
  assert partitioning.row_ways(tiny.mesh(data=2, fsdp=2, sequence=2)) == 4
  assert partitioning.row_ways(tiny.mesh(dcn_data=2, expert=2, tensor=2)) == 4


@pytest.mark.parametrize(
  'sizes, devices, message',
  [
    ({'data': 4}, 8, r'mesh\.data=4: .*multiply to 4, .*\(8\).*-1'),
    ({'data': 2, 'expert': 3}, 8, r'mesh\.data=2, config\.mesh\.expert=3: .*to 6.*\(8\)'),
    ({'data': -1, 'fsdp': 3}, 8, r'mesh\.fsdp=3: .*to 3, which must divide .*\(8\).*data=-1'),
    ({}, 2, r'mesh\.data=1: .*multiply to 1, .*\(2\)'),
  ],
)
def test_mesh_that_does_not_fit_the_devices(sizes, devices, message):
  with pytest.raises(errors.InputError, match=message):
    tiny.mesh(devices, **sizes)


def test_sizes_that_no_devices_could_have():
  with pytest.raises(errors.InputError, match=r'mesh\.data and config\.mesh\.fsdp are both -1'):
    tiny.make(mesh__fsdp=-1)
  with pytest.raises(errors.InputError, match=r'mesh\.tensor=0 must be a number of devices'):
    tiny.make(mesh__tensor=0)


MLA = {'model__attention__kind': 'mla', 'model__num_heads': 4}


@pytest.mark.parametrize(
  'axes, overrides, message',
  [
    ({'data': 4}, {'train__batch_size': 6}, r'train\.batch_size=6 .*by 4.*data=4.*choose 4 or 8'),
    ({'data': 2, 'expert': 2}, {'train__micro_batch_size': 2}, r'micro_batch_size=2 .*choose 4'),
    ({'fsdp': 4}, {'train__batch_ramp': ((3, 4), (5, 6))}, r'batch_ramp\[1\]=6 .*choose 4 or 8'),
    ({'expert': 8}, {'model__moe__num_experts': 12}, r'num_experts=12 .*expert=8.*choose 8 or 16'),
    ({'expert': 2}, {'model__moe__num_experts': 0}, r'mesh\.expert=2 splits experts'),
    ({'fsdp': 8}, {'model__embed_dim': 12}, r'embed_dim=12 .*8.*choose 8 or 16'),
    ({'tensor': 2}, {}, r'num_kv_heads=1 .*choose 2, or change config\.mesh\.tensor'),
    ({'tensor': 4}, {}, r'num_heads=2 .*choose 4'),
    ({'tensor': 2}, MLA | {'model__moe__moe_mlp_dim': 9}, r'moe_mlp_dim=9 .*choose 8 or 10'),
    ({'tensor': 2}, MLA | {'model__mlp_dim': 25}, r'mlp_dim=25'),
    ({'tensor': 2}, MLA | {'model__vocab_size': 33}, r'vocab_size=33'),
    ({'fsdp': 8}, MLA | {'model__attention__mla__kv_lora_rank': 12}, r'kv_lora_rank=12'),
    ({'sequence': 8}, {'model__max_seq_len': 20}, r'max_seq_len=20 .*sequence=8.*16 or 24'),
    (
      {'dcn_fsdp': 2, 'fsdp': 4},
      {'model__embed_dim': 12},
      r'\(dcn_fsdp=2 x fsdp=4\).*change config\.mesh\.dcn_fsdp or config\.mesh\.fsdp',
    ),
  ],
)
def test_sizes_that_the_mesh_cannot_split(axes, overrides, message):
  cfg = tiny.make(**overrides)
  with pytest.raises(errors.InputError, match=message):
    partitioning.check(cfg, tiny.mesh(**axes))
  partitioning.check(cfg, tiny.mesh(1))


def test_sizes_that_fit():
  for axes in ({'data': 4}, {'expert': 8}, {'fsdp': 4, 'sequence': 2}):
    partitioning.check(tiny.make(), tiny.mesh(**axes))


@pytest.mark.parametrize('put', [partitioning.put_batch, partitioning.put_global_batch])
def test_rows_are_split_over_the_devices(put):
  rows = {'tokens': np.arange(32, dtype=np.int32).reshape(8, 4)}
  got = put(rows, tiny.mesh(data=2, expert=2))['tokens']
  np.testing.assert_array_equal(got, rows['tokens'])
  assert [shard.data.shape for shard in got.addressable_shards] == [(2, 4)] * 4
  assert got.sharding.spec == partitioning.BATCH_SPEC


def test_every_rule_is_written_once_and_names_mesh_axes():
  names = [name for name, _ in partitioning.LOGICAL_AXIS_RULES]
  assert len(names) == len(set(names))
  used = {axis for _, axes in partitioning.LOGICAL_AXIS_RULES for axis in axes}
  assert used == set(partitioning.MESH_AXES)


@pytest.mark.parametrize(
  'axes, spec',
  [
    ({'data': 8}, jax.P()),
    ({'expert': 8}, jax.P(None, 'expert')),
    ({'fsdp': 2, 'expert': 2, 'tensor': 2}, jax.P(None, 'expert', 'fsdp', None, 'tensor')),
    ({'dcn_fsdp': 2, 'fsdp': 2}, jax.P(None, None, ('dcn_fsdp', 'fsdp'))),
  ],
)
def test_shardings_of_parameters_follow_the_rules(axes, spec):
  boxed = jax.eval_shape(
    functools.partial(model_variables.init, tiny.make().model), jax.random.key(0)
  )
  mesh = tiny.mesh(**axes)
  found = partitioning.shardings(boxed['params'], mesh)['moe_layers']['moe']['gate_up']
  assert found.is_equivalent_to(jax.NamedSharding(mesh, spec), 5)


def test_rules_leave_out_axes_of_size_1():
  table = dict(partitioning.rules(tiny.mesh(data=2, tensor=2)))
  assert table['act_batch'] == 'data' and table['heads'] == 'tensor' and table['embed'] is None
  assert dict(partitioning.rules(tiny.mesh(data=2, fsdp=2)))['act_batch'] == ('data', 'fsdp')


def test_constraints_reach_the_program():
  """flax drops constraints without a word when it sees no mesh."""

  def constrain(x):
    return nn.with_logical_constraint(x, ('act_batch', 'act_len', 'act_embed'))

  x = jnp.ones((8, 2, 3))
  with partitioning.activate(tiny.mesh(data=4)):
    got = jax.jit(constrain)(x)
  assert [shard.data.shape for shard in got.addressable_shards] == [(2, 2, 3)] * 4


@pytest.fixture(scope='module')
def on_8_devices():
  """(mesh, compiled gradients, its arguments) of the tiny model, one row per device."""
  cfg, mesh = tiny.make(), tiny.mesh(data=8)
  params = jax.device_put(tiny.params(cfg.model), jax.NamedSharding(mesh, jax.P()))
  batch = partitioning.put_batch(tiny.batch(), mesh)
  with partitioning.activate(mesh):
    fn = tiny.jit(functools.partial(objective.gradients, cfg))
    compiled = fn.lower(params, {}, batch, jnp.uint32(0)).compile()
  return compiled, params, batch


def test_8_devices_equal_1(on_8_devices):
  compiled, params, batch = on_8_devices
  loss, grads = compiled(params, {}, batch, jnp.uint32(0))
  want_loss, want_grads = tiny.gradients()(tiny.params(tiny.make().model), tiny.batch())
  np.testing.assert_array_equal(loss.stats.sums.load, want_loss.stats.sums.load)
  # Sums over devices come in another order than sums over rows: float32 rounding.
  np.testing.assert_allclose(loss.main, want_loss.main, rtol=1e-5)
  tiny.assert_trees_close(grads, want_grads, rtol=1e-3, atol=1e-5)


def test_8_devices_exchange_gradients_and_never_activations(on_8_devices):
  text = on_8_devices[0].as_text()
  assert 'all-reduce' in text
  for collective in ('all-gather', 'all-to-all', 'collective-permute'):
    assert collective not in text


ROWS = ('act_batch',)


def test_per_shard_without_a_mesh_is_the_function():
  def fn(x):
    return x

  assert partitioning.per_shard(fn, (ROWS,), ROWS) is fn
  with partitioning.activate(tiny.mesh(1)):
    assert partitioning.per_shard(fn, (ROWS,), ROWS) is fn


def test_per_shard_gives_each_device_its_part_and_sums_gradients():
  seen = []

  def fn(x, w, v):
    seen.append((x.shape, w.shape, v.shape))
    return x * w * v.sum()

  def loss(x, w, v):
    axes = (ROWS, None, ('heads', None))
    return partitioning.per_shard(lambda *a: jax.lax.psum(fn(*a), 'tensor'), axes, ROWS)(
      x, w, v
    ).sum()

  x, w, v = jnp.arange(24.0).reshape(8, 3), jnp.array([1.0, 2.0, 3.0]), jnp.ones((4, 1))
  with partitioning.activate(tiny.mesh(data=2, fsdp=2, tensor=2)):
    d_x, d_w, d_v = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, w, v)
  assert set(seen) == {((2, 3), (3,), (2, 1))}
  np.testing.assert_array_equal(d_x, 4 * np.tile(w, (8, 1)))
  np.testing.assert_array_equal(d_w, 4 * x.sum(0))
  np.testing.assert_array_equal(d_v, np.full((4, 1), (x * w).sum()))


def test_gather_shards_makes_a_parameter_whole_and_scatters_its_gradient():
  axes = ('heads', 'embed')

  def whole(w):
    return partitioning.gather_shards(w, 1)

  def rows(x, w):
    return x @ whole(w)

  def loss(x, w):
    return partitioning.per_shard(rows, (ROWS, (None, 'embed')), ROWS)(x, w).sum()

  x, w = jnp.arange(16.0).reshape(8, 2), jnp.arange(8.0).reshape(2, 4)
  with partitioning.activate(tiny.mesh(dcn_fsdp=2, fsdp=2, data=2)):
    fn = jax.jit(jax.value_and_grad(loss, argnums=1))
    value, grad = fn(x, w)
    assert 'reduce-scatter' in fn.lower(x, w).compile().as_text()
    assert partitioning.spec(*axes) == jax.P(None, ('dcn_fsdp', 'fsdp'))
  assert value == (x @ w).sum()
  np.testing.assert_array_equal(grad, jnp.tile(x.sum(0)[:, None], (1, 4)))


def test_sums_and_places_of_the_parts_of_a_logical_axis():
  """Rows of a table [8, 2] of which each of 4 devices has two: their sum, and where each begins."""
  axes = ('vocab', None)

  def part(table):
    first = partitioning.first_index('vocab', len(table))
    total = partitioning.sum_over('vocab', table.sum(axis=0))
    return table * 0 + first, partitioning.gather_over('vocab', table, 0) * 0 + total

  table = jnp.arange(16.0).reshape(8, 2)
  assert partitioning.sum_over('vocab', table) is table  # no mesh, nothing is split
  assert partitioning.first_index('vocab', 8) == 0
  with partitioning.activate(tiny.mesh(tensor=4, data=2)):
    assert partitioning.split_axes('vocab') == ('tensor',)
    first, total = jax.jit(partitioning.per_shard(part, (axes,), (axes, None)))(table)
  np.testing.assert_array_equal(first[:, 0], [0, 0, 2, 2, 4, 4, 6, 6])
  np.testing.assert_array_equal(total, np.tile(table.sum(axis=0), (8, 1)))


@pytest.mark.parametrize(
  'axes, shape, spec, want',
  [
    ({'data': 4}, (6, 8), (None, None), (None, ('data',))),
    ({'data': 2, 'expert': 2}, (4, 6), ('expert', None), (('expert',), ('data',))),
    ({'data': 4}, (6, 3), (None, None), (None, None)),  # nothing to divide
    ({'data': 2, 'fsdp': 2}, (4, 4), ('fsdp', None), (('fsdp',), ('data',))),
    ({'data': 2, 'tensor': 2}, (8, 2), ('tensor',), (('tensor', 'data'), None)),
  ],
)
def test_zero1_splits_where_it_can(axes, shape, spec, want):
  mesh = tiny.mesh(**axes)
  got = partitioning.split_further(jax.NamedSharding(mesh, jax.P(*spec)), shape)
  assert got.is_equivalent_to(jax.NamedSharding(mesh, jax.P(*want)), len(shape)), got.spec
