"""A pipeline of stages changes nothing: loss, gradients and books are those of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import errors
from moe_jax.devices import partitioning
from moe_jax.models import pipeline_stages, transformer
from moe_jax.planning.hlo import collectives
from moe_jax.training import objective, optimizer_step, train_state
from tests import tiny

MOE = 'model__moe__'
# Losses of every scope, each with a weight that its gradient shows.
BALANCE = {
  f'{MOE}balance__switch__weight': 0.5,
  f'{MOE}balance__squared_deviation__scope': 'global_batch',
  f'{MOE}balance__squared_deviation__weight': 0.5,
  f'{MOE}balance__router_z__weight': 0.1,
}
GQA = BALANCE | {
  f'{MOE}expert_bias__update_rule': 'sign',
  f'{MOE}num_expert_groups': 4,
  f'{MOE}num_limited_groups': 2,
  f'{MOE}num_virtual_devices': 4,
}
LATENT = (
  BALANCE
  | tiny.MLA
  | {
    'model__num_layers': 5,
    'model__num_mtp_layers': 1,
    f'{MOE}capacity__policy': 'score',
    f'{MOE}capacity__factor': 1.0,
    f'{MOE}capacity__group_rows': 2,
  }
)
DENSE = {f'{MOE}num_experts': 0, 'model__num_layers': 4, 'model__num_dense_layers': 0}
UNEVEN = {**DENSE, 'model__num_layers': 3}
HEADS = {'model__num_heads': 4, 'model__attention__num_kv_heads': 2}

# name -> (settings of both, mesh, settings of the pipeline alone that must change nothing)
CASES = {
  'two': (GQA, dict(stage=2), {'mesh__stage_micro_batches': 4}),
  'uneven': (UNEVEN, dict(stage=2), {'mesh__stage_micro_batches': 2}),
  'four': (DENSE, dict(stage=4), {'model__remat': 'full', 'mesh__stage_micro_batches': 8}),
}
SLOW = {
  'latent': (LATENT, dict(stage=4), {'model__remat': 'full'}),
  'empty': (UNEVEN | {'model__num_layers': 5}, dict(stage=4), {}),  # 2, 2, 1 and 0 layers
  'unlike': (GQA | HEADS | {'model__num_layers': 4}, dict(stage=2, tensor=2), {}),
  'swapped': (GQA | {'model__num_layers': 4}, dict(stage=2, fsdp=2, expert=2), {}),
  'data': (GQA, dict(stage=2, data=2), {'mesh__stage_micro_batches': 2}),
  'fsdp': (GQA, dict(stage=2, fsdp=2), {'model__remat': 'moe_core', 'mesh__zero1': True}),
  'expert': (GQA, dict(stage=2, expert=2), {f'{MOE}exchange__kind': 'all_to_all'}),
  'ragged': (GQA, dict(stage=2, expert=2), {f'{MOE}exchange__kind': 'ragged_all_to_all'}),
  'gathered': (
    GQA,
    dict(stage=2, data=2, expert=2),
    {f'{MOE}exchange__kind': 'all_gather', f'{MOE}dispatch': 'dense'},
  ),
  'tensor': (GQA | HEADS, dict(stage=2, tensor=2), {}),
  'sequence': (GQA, dict(stage=2, sequence=2), {'model__attention__impl': 'chunked'}),
  'all': (LATENT, dict(stage=2, fsdp=2, tensor=2), {'model__scan_layers': False}),
  'buffers': (LATENT, dict(stage=2, expert=2), {f'{MOE}dispatch': 'capacity'}),
  'jitter': (
    {f'{MOE}options__input_jitter': 0.1, f'{MOE}options__random_second_expert': True},
    dict(stage=2),
    {},
  ),
  'expert_choice': (
    {f'{MOE}router': 'expert_choice', f'{MOE}options__chunk_tokens': 32},
    dict(stage=2),
    {'mesh__stage_micro_batches': 4},
  ),
  'accumulation': (
    GQA | {'train__micro_batch_size': 4},
    dict(stage=2),
    {'mesh__stage_micro_batches': 4},
  ),
}


def gradients(cfg, mesh, lengths=tiny.LENGTHS):
  """(loss, gradients) of the tiny batch."""
  params, state = tiny.params(cfg.model), tiny.router_state(cfg.model)
  batch = partitioning.put_batch(tiny.batch(lengths), mesh)
  with partitioning.activate(mesh):
    fn = tiny.jit(functools.partial(objective.gradients, cfg))
    return jax.device_get(fn(params, state, batch, jnp.uint32(3)))


@functools.cache
def pair(name):
  """((loss, gradients) in stages, those of one device)."""
  both, axes, settings = (CASES | SLOW)[name]
  plain = tiny.make(**both, mesh__data=1)
  want = gradients(plain, tiny.mesh(1))
  sizes = {f'mesh__{axis}': size for axis, size in ({'data': 1} | axes).items()}
  cfg, mesh = tiny.make(**both, **settings, **sizes), tiny.mesh(**axes)
  partitioning.check(cfg, mesh)
  return gradients(cfg, mesh), want


def assert_alike(name):
  (loss, grads), (want, want_grads) = pair(name)
  for got, wanted in ((loss.main, want.main), (loss.mtp, want.mtp), (loss.aux, want.aux)):
    if wanted is not None:
      np.testing.assert_allclose(got, wanted, rtol=2e-6)
  tiny.assert_trees_close(grads, want_grads, rtol=1e-3, atol=1e-5)
  if want.stats is None:
    assert loss.stats is None
    return
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(loss.stats), jax.tree.leaves(want.stats)
  ):
    where = jax.tree_util.keystr(path)
    if jnp.issubdtype(b.dtype, jnp.integer):
      np.testing.assert_array_equal(a, b, err_msg=where)
    else:
      np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5, err_msg=where)


@pytest.mark.parametrize('name', CASES)
def test_loss_gradients_and_books_are_those_of_one_device(name):
  assert_alike(name)


@pytest.mark.slow
@pytest.mark.parametrize('name', SLOW)
def test_so_are_those_of_every_mesh_and_setting(name):
  assert_alike(name)


@pytest.mark.parametrize('name', ['four', 'uneven'])
def test_what_travels_between_stages_are_activations(name):
  """Parts of rows along the ring. Weights stay where they are, or are swapped; none is gathered."""
  both, axes, settings = CASES[name]
  cfg, mesh = (
    tiny.make(**both, **settings, mesh__data=1, mesh__stage=axes['stage']),
    tiny.mesh(**axes),
  )
  state = train_state.abstract_state(cfg, mesh)
  layout = jax.NamedSharding(mesh, partitioning.BATCH_SPEC)
  batch = {
    key: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=layout) for key, a in tiny.batch().items()
  }
  with partitioning.activate(mesh):
    step = optimizer_step.make_train_step(cfg, mesh).lower(state, batch)
    text = step.compile({'xla_backend_optimization_level': 0}).as_text()
  along = {}
  for one in collectives.collectives(text, mesh):
    if 'stage' in one.axes:
      along.setdefault(one.kind, []).append(one)
  stages_, parts = axes['stage'], settings['mesh__stage_micro_batches']
  # A part of the rows, float32, in every tick, there and back.
  part = 8 // parts * cfg.model.max_seq_len * cfg.model.embed_dim * 4
  ring = [one for one in along['collective-permute'] if one.bytes > 4]  # 4: a layer's number
  assert {one.bytes for one in ring} == {part}
  assert {one.count for one in ring} == {parts + stages_ - 1}
  # No weight: the ids of all rows at most.
  assert all(one.bytes < cfg.model.embed_dim**2 * 4 for one in along.get('all-gather', []))
  assert ('all-to-all' in along) == (name == 'uneven')


def test_stages_keep_their_own_weights():
  def shapes(layers):
    cfg = tiny.make(**DENSE | {'model__num_layers': layers}, mesh__stage=2, mesh__data=1)
    params = train_state.abstract_state(cfg, tiny.mesh(stage=2)).params['dense_layers']
    found = (params['mlp']['down'], params['attention_norm']['scale'], params['attention']['o'])
    return [(leaf.shape, leaf.sharding.shard_shape(leaf.shape)) for leaf in found]

  assert shapes(4) == [
    ((4, 24, 16), (2, 24, 16)),
    ((4, 16), (2, 16)),
    ((4, 2, 8, 16), (2, 2, 8, 16)),
  ]
  # 3 layers cannot be cut in two arrays of one shape: the longest other axis is.
  assert shapes(3) == [
    ((3, 24, 16), (3, 12, 16)),
    ((3, 16), (3, 8)),
    ((3, 2, 8, 16), (3, 2, 8, 8)),
  ]


def test_a_part_is_rows_that_are_neighbours_on_a_device():
  """Row r of 16 lies on stage r // 8, on device r // 4 % 2 of it: a part takes 2 from each."""
  rows = jnp.arange(16)[:, None]
  parts = pipeline_stages._cut(rows, None, stages=2, ways=2, parts=4)[..., 0]
  np.testing.assert_array_equal(
    parts, [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
  )
  activations = jnp.arange(16.0)[:, None, None]
  cut = pipeline_stages._cut(activations, 'act_parts', stages=2, ways=2, parts=4)
  np.testing.assert_array_equal(pipeline_stages._joined(cut, 2, 2), activations)


def test_evaluation_is_that_of_one_device():
  cfg, mesh = tiny.make(**GQA), tiny.mesh(stage=2)
  variables = {'params': tiny.params(cfg.model), 'router_state': tiny.router_state(cfg.model)}

  def logits(mesh):
    batch = partitioning.put_batch(tiny.batch(), mesh)
    inputs = (batch['tokens'], batch['positions'], batch['segment_ids'])
    with partitioning.activate(mesh):
      return tiny.jit(functools.partial(transformer.apply, cfg.model))(variables, *inputs).logits

  np.testing.assert_allclose(logits(mesh), logits(tiny.mesh(1)), rtol=1e-4, atol=1e-5)


def test_single_layers_are_neither_observed_nor_changed():
  cfg, mesh = tiny.make(), tiny.mesh(stage=2)
  batch = tiny.batch()
  inputs = (batch['tokens'], batch['positions'], batch['segment_ids'])
  variables = {'params': tiny.params(cfg.model)}

  def shape_of(**options):
    apply = functools.partial(transformer.Transformer(cfg.model).apply, **options)
    with partitioning.activate(mesh):
      return jax.eval_shape(apply, variables, *inputs)

  with pytest.raises(errors.InputError, match='neither observes'):
    shape_of(mutable=['intermediates'])
  with pytest.raises(errors.InputError, match='no recorded choices'):
    shape_of(experts=jnp.zeros((2, 8, 16, 2), jnp.int32))
