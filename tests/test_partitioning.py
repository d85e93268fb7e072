import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn

from moe_jax import config, errors, partitioning, train
from moe_jax.models import transformer


def mesh_of(size, num_devices=None):
  devices = jax.devices()[: num_devices or size]
  return partitioning.make_mesh(config.MeshConfig(size), devices)


def test_mesh_takes_all_devices_for_minus_1():
  mesh = mesh_of(-1, 8)
  assert dict(mesh.shape) == {'data': 8}
  assert mesh.axis_types == (jax.sharding.AxisType.Auto,)
  assert dict(partitioning.make_mesh(config.MeshConfig(-1)).shape) == {'data': 8}
  assert dict(mesh_of(1).shape) == {'data': 1}


@pytest.mark.parametrize('size, devices', [(4, 8), (3, 2), (16, 8)])
def test_mesh_that_does_not_fit_the_devices(size, devices):
  with pytest.raises(errors.InputError, match=rf'mesh\.data={size}.*\({devices}\).*-1'):
    mesh_of(size, devices)


@pytest.mark.parametrize(
  'overrides, message',
  [
    ({'batch_size': 6}, r'train\.batch_size=6 .*\(4\); choose 8'),
    ({'micro_batch_size': 2}, r'train\.micro_batch_size=2 .*choose 4'),
    ({'batch_ramp': ((3, 4), (5, 6))}, r'train\.batch_ramp\[1\]=6 .*choose 8'),
  ],
)
def test_batches_that_the_mesh_cannot_split(overrides, message):
  cfg = tiny.make(**{f'train__{k}': v for k, v in overrides.items()}).train
  with pytest.raises(errors.InputError, match=message):
    partitioning.check_batch(cfg, mesh_of(4))
  partitioning.check_batch(cfg, mesh_of(1))


def test_batches_that_fit():
  partitioning.check_batch(tiny.make(train__micro_batch_size=4).train, mesh_of(4))


@pytest.mark.parametrize('put', [partitioning.put_batch, partitioning.put_global_batch])
def test_rows_are_split_over_the_devices(put):
  rows = {'tokens': np.arange(32, dtype=np.int32).reshape(8, 4)}
  got = put(rows, mesh_of(4))['tokens']
  np.testing.assert_array_equal(got, rows['tokens'])
  assert [shard.data.shape for shard in got.addressable_shards] == [(2, 4)] * 4
  assert got.sharding.spec == partitioning.BATCH_SPEC


def test_every_rule_names_a_mesh_axis_once():
  names = [name for name, _ in partitioning.LOGICAL_AXIS_RULES]
  assert len(names) == len(set(names))
  assert {axis for _, axis in partitioning.LOGICAL_AXIS_RULES} <= {*partitioning.MESH_AXES, None}


def test_parameters_are_replicated_and_shardings_follow_the_rules(monkeypatch):
  boxed = jax.eval_shape(functools.partial(transformer.init, tiny.make().model), jax.random.key(0))
  boxed = boxed['params']
  for sharding in jax.tree.leaves(partitioning.shardings(boxed, mesh_of(4))):
    assert sharding.is_fully_replicated
  # What another rule would do: experts split over the devices.
  rules = tuple((k, 'data' if k == 'expert' else v) for k, v in partitioning.LOGICAL_AXIS_RULES)
  monkeypatch.setattr(partitioning, 'LOGICAL_AXIS_RULES', rules)
  got = partitioning.shardings(boxed, mesh_of(4))['moe_layers']['moe']['gate_up']
  assert got.spec == jax.P(None, 'data', None, None, None)


def test_constraints_reach_the_program():
  """flax drops constraints without a word when it sees no mesh."""
  constrain = lambda x: nn.with_logical_constraint(x, ('act_batch', 'act_len', 'act_embed'))
  x = jnp.ones((8, 2, 3))
  with partitioning.activate(mesh_of(4)):
    got = jax.jit(constrain)(x)
  assert [shard.data.shape for shard in got.addressable_shards] == [(2, 2, 3)] * 4


@pytest.fixture(scope='module')
def on_8_devices():
  """(mesh, compiled gradients, its arguments) of the tiny model, one row per device."""
  cfg, mesh = tiny.make(), mesh_of(8)
  params = jax.device_put(tiny.params(cfg.model), jax.NamedSharding(mesh, jax.P()))
  batch = partitioning.put_batch(tiny.batch(), mesh)
  with partitioning.activate(mesh):
    fn = tiny.jit(functools.partial(train.gradients, cfg))
    compiled = fn.lower(params, {}, batch, jnp.uint32(0)).compile()
  return compiled, params, batch


def test_8_devices_equal_1(on_8_devices):
  compiled, params, batch = on_8_devices
  loss, grads = compiled(params, {}, batch, jnp.uint32(0))
  want_loss, want_grads = tiny.gradients()(tiny.params(tiny.make().model), tiny.batch())
  np.testing.assert_array_equal(loss.stats.sums.load, want_loss.stats.sums.load)
  # Sums over devices come in another order than sums over rows: float32 rounding.
  np.testing.assert_allclose(loss.cross_entropy, want_loss.cross_entropy, rtol=1e-5)
  tiny.assert_trees_close(grads, want_grads, rtol=1e-3, atol=1e-5)


def test_8_devices_exchange_gradients_and_never_activations(on_8_devices):
  text = on_8_devices[0].as_text()
  assert 'all-reduce' in text
  for collective in ('all-gather', 'all-to-all', 'collective-permute'):
    assert collective not in text


def test_over_batch_shards_without_a_mesh_is_the_function():
  fn = lambda x: x
  assert partitioning.over_batch_shards(fn, 1) is fn
  with partitioning.activate(mesh_of(1)):
    assert partitioning.over_batch_shards(fn, 1) is fn


def test_over_batch_shards_gives_each_device_its_rows_and_sums_gradients():
  seen = []

  def fn(x, w):
    seen.append(x.shape)
    return x * w

  def loss(x, w):
    return partitioning.over_batch_shards(fn, 1)(x, w).sum()

  x, w = jnp.arange(24.0).reshape(8, 3), jnp.array([1.0, 2.0, 3.0])
  with partitioning.activate(mesh_of(4)):
    d_x, d_w = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, w)
  assert set(seen) == {(2, 3)}
  np.testing.assert_array_equal(d_x, np.tile(w, (8, 1)))
  np.testing.assert_array_equal(d_w, x.sum(0))
