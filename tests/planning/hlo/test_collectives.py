"""Collectives of compiled programs: spellings of groups, loops, pairs, and a real program."""

import functools

import jax
import jax.numpy as jnp
import pytest

from moe_jax.planning.hlo import collectives
from tests.planning.hlo import programs


def program(line: str, partitions: int = 8) -> str:
  """A program of one instruction on x, f32[8,4], 128 bytes."""
  return f"""HloModule test, is_scheduled=true, num_partitions={partitions}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {{
  %x = f32[8,4]{{1,0}} parameter(0)
  ROOT %y = {line}
}}
"""


def one(
  line: str, mesh: programs.Mesh = programs.MESH, partitions: int = 8
) -> collectives.Collective:
  (found,) = collectives.collectives(program(line, partitions), mesh)
  return found


@pytest.mark.parametrize(
  'groups, axes',
  [
    ('{{0,1},{2,3},{4,5},{6,7}}', 'expert'),
    ('{{0,2},{1,3},{4,6},{5,7}}', 'fsdp'),
    ('{}', 'data fsdp expert'),
    ('[4,2]<=[8]', 'expert'),
    ('[2,4]<=[8]', 'fsdp expert'),
    ('[2,4]<=[4,2]T(1,0)', 'data fsdp'),
    ('[4,2]<=[2,4]T(1,0)', 'data'),
    ("mesh['a'=4,'b'=2] {'b'}", 'expert'),
    ("mesh['a'=4,'b'=2] {'a'}", 'data fsdp'),
    ("mesh['a'=2,'b'=1,'c'=4], device_ids=([2,2,2]T(1,0,2)) {'a'}", 'fsdp'),
    ("mesh['a'=8] {'a':(2)2}", 'fsdp'),
    ("mesh['a'=2,'b'=4], device_ids=(0,2,4,6,1,3,5,7) {'a'}", 'expert'),
  ],
)
def test_every_spelling_of_groups(groups, axes):
  line = f'f32[8,4]{{1,0}} all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%add'
  assert one(line).axes == tuple(axes.split())


@pytest.mark.parametrize(
  'line, wanted',
  [
    # 128 bytes on each of 4 devices make 512, of which 3/4 come from others.
    ('f32[32,4]{1,0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}', 384),
    ('f32[8,4]{1,0} all-reduce(%x), replica_groups=[2,4]<=[8], to_apply=%add', 192),
    ('f32[2,4]{1,0} reduce-scatter(%x), replica_groups=[2,4]<=[8], dimensions={0}', 96),
    ('f32[8,4]{1,0} all-to-all(%x), replica_groups=[2,4]<=[8], dimensions={0}', 96),
    ('f32[8,4]{1,0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}', 128),
    ('f32[32,4]{1,0} ragged-all-to-all(%x, %x, %x), replica_groups=[2,4]<=[8]', 96),
    ('f32[2,4]{1,0} ragged-all-to-all(%x, %x, %x), replica_groups=[2,4]<=[8]', 24),
    ('(f32[8,4]{1,0}, f32[32,4]{1,0}) all-gather-start(%x), replica_groups=[2,4]<=[8]', 384),
  ],
)
def test_bytes_on_the_wire(line, wanted):
  assert one(line).bytes == wanted


def test_pairs_name_the_axes_that_any_of_them_crosses():
  line = 'f32[8,4]{1,0} collective-permute(%x), source_target_pairs={{0,2},{2,0},{1,3},{3,1}}'
  assert one(line).axes == ('fsdp',)


def test_the_end_of_a_pair_and_groups_of_one_are_not_counted():
  for line in (
    'f32[32,4]{1,0} all-gather-done(%x)',
    'f32[8,4]{1,0} all-reduce(%x), replica_groups=[8,1]<=[8], to_apply=%add',
  ):
    assert not collectives.collectives(program(line), programs.MESH)


@pytest.mark.parametrize(
  'kind, target, axes, wanted',
  [
    ('ALL_REDUCE', '"{1,2}x{0:3}"', 'dcn', 128),  # 2 x 1/2 x 128
    ('REDUCE_SCATTER', '{{100000,200000},{100001,200001}}', 'dcn', 64),
    ('ONE_TO_ONE', '{{100000->200000},{200000->100000}}', 'dcn', 128),
  ],
)
def test_transfers_between_slices(kind, target, axes, wanted):
  mesh = programs.Mesh(
    ids=[100_000 * (s + 1) + i for s in range(2) for i in range(4)], dcn=2, fsdp=4
  )
  line = (
    '(f32[8,4]{1,0}, u32[], token[]) send(%x, %x), channel_id=2, is_host_transfer=true, '
    f'frontend_attributes={{_xla_megascale_target={target},_xla_megascale_transfer_type="{kind}"}}'
  )
  found = one(line, mesh, partitions=4)
  assert (found.axes, found.bytes) == ((axes,), wanted)
  inside = 'f32[8,4]{1,0} all-reduce(%x), replica_groups={{0,1,2,3}}, to_apply=%add'
  assert one(inside, mesh, partitions=4).axes == ('fsdp',)


def test_an_all_reduce_of_which_a_part_is_kept_is_a_reduce_scatter():
  text = """HloModule test, num_partitions=8

%all-reduce-scatter (p: f32[8,4]) -> f32[4,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %r = f32[8,4]{1,0} all-reduce(%p), replica_groups={{0,2},{1,3},{4,6},{5,7}}, to_apply=%add
  %i = s32[] constant(0)
  ROOT %d = f32[4,4]{1,0} dynamic-slice(%r, %i, %i), dynamic_slice_sizes={4,4}
}

ENTRY %main (x: f32[8,4]) -> f32[4,4] {
  %x = f32[8,4]{1,0} parameter(0)
  ROOT %f = f32[4,4]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter
}
"""
  (found,) = collectives.collectives(text, programs.MESH)
  assert (found.kind, found.axes, found.bytes) == ('reduce-scatter', ('fsdp',), 64)


def test_pieces_of_one_collective_are_counted_once():
  piece = 'replica_groups=[4,2]<=[8], to_apply=%add'
  chained = 'channel_id=5, ' + piece + ', frontend_attributes={chain_id="3"}'
  text = programs.LOOP.replace(piece, chained)
  # Its start, before the loop.
  text = text.replace(
    '  %first = s32[]', f'  %begun = f32[8,4]{{1,0}} all-reduce(%x), {chained}\n  %first = s32[]'
  )
  (found,) = collectives.collectives('HloModule test, num_partitions=8\n' + text, programs.MESH)
  assert (found.count, found.bytes) == (1, 128.0)


@functools.cache
def compiled():
  """A scan over 5 layers whose weights are gathered from 4 devices, on 2 x 4."""
  mesh = jax.make_mesh((2, 4), ('data', 'fsdp'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  rows, cut = jax.P(('data', 'fsdp')), jax.P(None, 'fsdp')

  def layer(x, w):
    def exchange(x, w):
      return jax.lax.all_to_all(
        x @ jax.lax.all_gather(w, 'fsdp', tiled=True), 'fsdp', 0, 0, tiled=True
      )

    specs = (rows, jax.P('fsdp'))
    return jax.shard_map(exchange, in_specs=specs, out_specs=rows, check_vma=False)(x, w), None

  def struct(shape, spec):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.NamedSharding(mesh, spec))

  with jax.set_mesh(mesh):
    run = jax.jit(lambda x, w: jax.lax.scan(layer, x, w)[0])
    text = run.lower(struct((64, 16), rows), struct((5, 16, 16), cut)).compile().as_text()
  return text, mesh


def test_a_real_program():
  found = {one.kind: one for one in collectives.collectives(*compiled())}
  assert found.keys() == {'all-gather', 'all-to-all'}
  gathered, exchanged = found['all-gather'], found['all-to-all']
  assert gathered.axes == exchanged.axes == ('fsdp',)
  assert gathered.count == exchanged.count == 5
  assert gathered.bytes == 16 * 16 * 4 * 3 / 4  # the whole matrix but the device's own quarter
  assert exchanged.bytes == 8 * 16 * 4 * 3 / 4  # a device's 8 rows but its own quarter
  assert collectives.bytes_by_axes(collectives.collectives(*compiled())) == {
    'fsdp': {'all-gather': 5 * gathered.bytes, 'all-to-all': 5 * exchanged.bytes}
  }
