import itertools
import json
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts

from moe_jax import errors
from moe_jax.checkpoints import checkpointer, integrity, stream_layout, stream_reader, stream_writer
from moe_jax.config import schema

# Orbax leaves coroutines behind when a read fails.
pytestmark = pytest.mark.filterwarnings('ignore:coroutine .* was never awaited')

META = {'config': {'train': {'ramp': (1, 2)}}, 'tokenizer': 'digest'}
GATE_UP = 'params/moe_layers/gate_up'
LAYERS, EXPERTS, EMBED, FFN = 2, 8, 16, 8


def make_tree() -> dict[str, Any]:
  """Weights as a model has them, without an optimizer."""
  rng = np.random.default_rng(0)

  def normal(*shape):
    return rng.standard_normal(shape).astype(np.float32)

  moe = {
    'gate_up': normal(LAYERS, EXPERTS, EMBED, 2, FFN).astype(jnp.bfloat16),
    'scale': normal(LAYERS, EMBED),
    'table': rng.integers(0, 99, (LAYERS, 40)).astype(np.int32),
  }
  params = {'embed': normal(24, EMBED), 'bias': normal(EXPERTS).astype(jnp.bfloat16)}
  extra = {'count': np.array(7, np.int32), 'mask': np.array([True, False, True])}
  return {'params': {**params, 'moe_layers': moe}, 'router_state': extra, 'empty': {}}


def named(tree: Any) -> dict[str, np.ndarray]:
  return {integrity.leaf_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def write_all(writer: stream_writer.Writer, tree: Any, skip: str = ''):
  """As a converter does: matrices of experts, transposed; the rest whole."""
  for name, x in named(tree).items():
    if name == GATE_UP:
      for layer, expert, half in np.ndindex(LAYERS, EXPERTS, 2):
        matrix = np.ascontiguousarray(x[layer, expert, :, half].T)  # [F, D], as in a source file
        if skip != f'{name}/{expert}':
          writer.write(name, (layer, expert, slice(None), half), matrix.T)
    elif name != skip:
      writer.write(name, (), x)


def write(path: pathlib.Path, tree: Any, step: int = 0, **kwargs):
  with stream_writer.Writer(path, step, tree, META) as writer:
    write_all(writer, tree, **kwargs)


def abstract(tree: Any, sharding: Any = None) -> Any:
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture(scope='module')
def tree():
  return make_tree()


@pytest.fixture(scope='module')
def streamed(tmp_path_factory, tree) -> pathlib.Path:
  path = tmp_path_factory.mktemp('streamed') / 'checkpoints'
  write(path, tree)
  return path


@pytest.fixture(scope='module')
def saved(tmp_path_factory, tree) -> pathlib.Path:
  """The same tree, saved as a training run saves."""
  path = tmp_path_factory.mktemp('saved') / 'checkpoints'
  with checkpointer.Checkpointer(path, schema.CheckpointConfig(1, 1, 0)) as ckpt:
    ckpt.save(0, jax.tree.map(jnp.asarray, tree), META)
  return path


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int32', 'bool', 'int8'])
def test_checksums_of_slices_add_up_to_that_of_the_whole(dtype):
  rng = np.random.default_rng(1)
  shape = (3, 4, 5, 2, 7)
  x = rng.integers(0, 2 if dtype == 'bool' else 99, shape).astype(jnp.dtype(dtype))
  whole = integrity.checksums({'x': jnp.asarray(x)})['x']
  assert stream_layout.checksum(x, (0,) * 5, shape) == whole
  for cuts in itertools.product([(0, 3), (0, 1, 3)], [(0, 4), (0, 3, 4)], [(0, 2, 5)], [(0, 1, 2)]):
    total = 0
    for parts in itertools.product(*(list(itertools.pairwise(c)) for c in (*cuts, (0, 7)))):
      block = x[tuple(slice(a, b) for a, b in parts)]
      total += stream_layout.checksum(block, tuple(a for a, _ in parts), shape)
    assert total % 2**32 == whole


def test_checksum_of_rows_longer_and_more_than_a_tile():
  x = np.random.default_rng(2).standard_normal((5, 70_000), np.float32)
  whole = integrity.checksums({'x': jnp.asarray(x)})['x']
  parts = [stream_layout.checksum(x[:, a:b], (0, a), x.shape) for a, b in ((0, 9), (9, 70_000))]
  assert stream_layout.checksum(x, (0, 0), x.shape) == whole
  assert sum(parts) % 2**32 == whole
  tall = x.reshape(70_000, 5)
  assert (
    stream_layout.checksum(tall[:, 1:], (0, 1), tall.shape)
    == (
      integrity.checksums({'x': jnp.asarray(tall)})['x']
      - stream_layout.checksum(tall[:, :1], (0, 0), tall.shape)
    )
    % 2**32
  )


def test_positions_beyond_32_bits_wrap_as_on_the_devices():
  shape = (70_000, 70_000)
  block = np.arange(6, dtype=np.float32).reshape(2, 3)
  got = stream_layout.checksum(block, (69_998, 69_990), shape)

  def mix(x):
    x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
    x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
    return x ^ (x >> 16)

  want = 0
  for i, j in np.ndindex(2, 3):
    position = ((69_998 + i) * 70_000 + 69_990 + j) % 2**32
    want += mix(int(block.view(np.uint32)[i, j]) ^ mix((position + 0x9E3779B9) % 2**32))
  assert got == want % 2**32


def test_restores_like_a_step_of_a_training_run(streamed, saved, tree, caplog):
  with (
    checkpointer.Checkpointer(streamed, None) as ours,
    checkpointer.Checkpointer(saved, None) as its,
  ):
    assert ours.read_record() == its.read_record()
    restored = ours.restore(abstract(tree))
    assert_same(restored.state, its.restore(abstract(tree)).state)
  assert_same(restored.state, tree)
  assert restored.meta == {'config': {'train': {'ramp': [1, 2]}}, 'tokenizer': 'digest', 'step': 0}
  assert not caplog.text


def test_restores_sharded(streamed, tree):
  mesh = jax.make_mesh((2, 4), ('data', 'expert'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  target = abstract(tree, jax.NamedSharding(mesh, jax.P()))
  spec = jax.NamedSharding(mesh, jax.P(None, 'expert', 'data'))
  gate_up = target['params']['moe_layers']['gate_up']
  target['params']['moe_layers']['gate_up'] = gate_up.update(sharding=spec)
  with checkpointer.Checkpointer(streamed, None) as ckpt:
    restored = ckpt.restore(target).state
  assert restored['params']['moe_layers']['gate_up'].sharding == spec
  assert_same(restored, tree)


def test_plain_orbax_restores_it_and_its_tree_is_described_alike(streamed, saved, tree):
  with ocp.StandardCheckpointer() as plain:
    target = abstract(tree, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    assert_same(plain.restore(streamed / '0/state', target), tree)
  ours, its = (json.loads((p / '0/state/_METADATA').read_text()) for p in (streamed, saved))
  for node in its['tree_metadata'].values():
    node['value_metadata'].pop('write_shape', None)
  assert ours == {**its, 'use_ocdbt': False}
  ours, its = (json.loads((p / '0/_CHECKPOINT_METADATA').read_text()) for p in (streamed, saved))
  assert ours.keys() == its.keys() and ours['item_handlers'] == its['item_handlers']


def test_chunks_are_the_slices_and_no_larger_than_the_cap(streamed, tmp_path, monkeypatch):
  files = {p.name for p in (streamed / '0/state/params.moe_layers.gate_up').iterdir()}
  parts = np.ndindex(LAYERS, EXPERTS, 2)
  assert files == {'.zarray'} | {f'{layer}.{e}.0.{half}.0' for layer, e, half in parts}
  monkeypatch.setattr(checkpointer, 'MAX_CHUNK_BYTES', 3 * EMBED * 4)
  embed = {'params': {'embed': np.arange(24 * EMBED, dtype=np.float32).reshape(24, EMBED)}}
  write(tmp_path, embed)
  sizes = {p.stat().st_size for p in (tmp_path / '0/state/params.embed').glob('[0-9]*')}
  assert sizes == {3 * EMBED * 4}
  with stream_reader.Reader(tmp_path, verify=True) as reader:
    np.testing.assert_array_equal(
      reader.read('params/embed', slice(2, 11)), embed['params']['embed'][2:11]
    )


@pytest.mark.parametrize('source', ['streamed', 'saved'])
def test_reads_slices(source, tree, request):
  path = request.getfixturevalue(source)
  with stream_reader.Reader(path, verify=True) as reader:
    assert reader.step == 0 and reader.meta['tokenizer'] == 'digest'
    assert reader.leaves == {n: (x.shape, x.dtype) for n, x in named(tree).items()}
    for name, x in named(tree).items():
      for index in [(), 0, slice(1, None), (slice(None), 1)]:
        if len(index if isinstance(index, tuple) else (index,)) > x.ndim:
          continue
        got = reader.read(name, index)
        assert got.dtype == x.dtype
        np.testing.assert_array_equal(got, x[index])
    x = named(tree)[GATE_UP]
    got = reader.read(GATE_UP, (1, 3, slice(4, 9), 1))
    np.testing.assert_array_equal(got, x[1, 3, 4:9, 1])


def bytes_read() -> int:
  found = ts.experimental_collect_matching_metrics('/tensorstore/kvstore/file/bytes_read')
  return sum(metric['values'][0]['value'] for metric in found)


def test_a_large_chunk_is_read_once_for_all_its_slices(saved, tree, monkeypatch):
  monkeypatch.setattr(checkpointer, 'MAX_CHUNK_BYTES', 128)
  with stream_reader.Reader(saved) as reader:
    for name in (GATE_UP, 'params/embed', GATE_UP):
      before, read = bytes_read(), []
      for i in range(LAYERS):
        np.testing.assert_array_equal(reader.read(name, i), named(tree)[name][i])
        read.append(bytes_read() - before)
      # Two openings of the array and its chunk; then nothing more.
      assert read[0] > 0.5 * named(tree)[name].nbytes and read[1] == read[0]


@pytest.mark.parametrize(
  'shape, chunk',
  [
    ((2, 4, 32, 2, 32), (1, 1, 32, 2, 32)),
    ((8, 16, 8, 16), (1, 16, 8, 16)),
    ((256, 64), (128, 64)),
    ((257, 64), (257, 64)),
    ((2, 10), (2, 10)),
  ],
  ids=['experts', 'small experts', 'matrix', 'matrix of prime length', 'small'],
)
def test_a_training_run_cuts_large_arrays_into_chunks(shape, chunk, tmp_path, monkeypatch):
  monkeypatch.setattr(checkpointer, 'MAX_CHUNK_BYTES', 2**15)
  monkeypatch.setattr(checkpointer, 'MIN_CHUNK_BYTES', 2**10)
  x = jnp.zeros(shape).at[(1,) * len(shape)].set(1)
  with checkpointer.Checkpointer(tmp_path, schema.CheckpointConfig(1, 1, 0)) as ckpt:
    ckpt.save(0, {'x': x}, {})
    assert (ckpt.restore({'x': x}).state['x'] == x).all()
  base = {'driver': 'file', 'path': f'{tmp_path}/0/state/'}
  spec = {'driver': 'zarr', 'kvstore': {'driver': 'ocdbt', 'base': base, 'path': 'x/'}}
  assert ts.open(spec).result().chunk_layout.read_chunk.shape == chunk
  with stream_reader.Reader(tmp_path, verify=True) as reader:
    np.testing.assert_array_equal(reader.read('x', 1), x[1])


def test_incomplete_leaf_is_refused_by_name(tree, tmp_path):
  message = f'{GATE_UP} got 3584 of its 4096 elements, the first of 1 unfinished arrays of step 0'
  with pytest.raises(errors.InputError, match=message):
    write(tmp_path, tree, skip=f'{GATE_UP}/5')
  with pytest.raises(errors.InputError, match='router_state/count got 0 of its 1 elements'):
    write(tmp_path, tree, skip='router_state/count')
  assert not list(tmp_path.iterdir())


def test_killed_writer_leaves_no_step_and_does_not_block_the_next(tree, tmp_path):
  with pytest.raises(KeyboardInterrupt), stream_writer.Writer(tmp_path, 0, tree, META) as writer:
    writer.write('params/embed', (), tree['params']['embed'])
    raise KeyboardInterrupt
  assert not list(tmp_path.iterdir())
  # Killed without a word: nothing is cleaned up.
  killed = stream_writer.Writer(tmp_path, 0, tree, META).__enter__()
  write_all(killed, tree)
  assert [p.name for p in tmp_path.iterdir()] == ['0.orbax-checkpoint-tmp']
  with checkpointer.Checkpointer(tmp_path, None, read_only=True) as ckpt:
    assert ckpt.steps() == [] and ckpt.restore(abstract(tree)) is None
  write(tmp_path, tree)
  assert [p.name for p in tmp_path.iterdir()] == ['0']
  # A training run that opens the directory clears such a leftover away.
  stream_writer.Writer(tmp_path, 1, tree, META).__enter__()
  with checkpointer.Checkpointer(tmp_path, schema.CheckpointConfig(1, 1, 0)) as ckpt:
    assert_same(ckpt.restore(abstract(tree)).state, tree)
  assert [p.name for p in tmp_path.iterdir()] == ['0']


def test_an_existing_step_is_not_overwritten(tree, tmp_path):
  write(tmp_path, tree)
  with pytest.raises(errors.InputError, match='step=0 is already among the checkpoints'):
    write(tmp_path, tree)
  with pytest.raises(errors.InputError, match='step=5 is already'):
    with stream_writer.Writer(tmp_path, 5, tree, META) as writer:
      write_all(writer, tree)
      (tmp_path / '5').mkdir()  # somebody else was faster
  assert sorted(p.name for p in tmp_path.iterdir()) == ['0', '5']
  with checkpointer.Checkpointer(tmp_path, None) as ckpt:
    assert ckpt.restore(abstract(tree), step=0).step == 0


def test_misuse_is_refused(tree, streamed, tmp_path):
  with pytest.raises(RuntimeError, match='done'):
    with stream_writer.Writer(tmp_path, 0, tree, META) as writer:
      gate = np.zeros((EMBED, FFN), jnp.bfloat16)
      with pytest.raises(ValueError, match="not a leaf .* did you mean 'params/embed'"):
        writer.write('params/embedd', (), gate)
      with pytest.raises(ValueError, match=r'takes bfloat16\[16, 8\], not bfloat16\[8, 16\]'):
        writer.write(GATE_UP, (0, 0, slice(None), 0), gate.T)
      with pytest.raises(ValueError, match=r'not float32\[16, 8\]'):
        writer.write(GATE_UP, (0, 0, slice(None), 0), gate.astype(np.float32))
      for index in ((0, EXPERTS), (-1, 0), (0, 0, slice(0, 4, 2))):
        with pytest.raises(ValueError, match='is no block of an array'):
          writer.write(GATE_UP, index, gate)
      writer.write(GATE_UP, (0, 0, slice(None), 0), gate)
      with pytest.raises(ValueError, match='already written'):
        writer.write(GATE_UP, (0, 0), np.zeros((EMBED, 2, FFN), jnp.bfloat16))
      raise RuntimeError('done')
  with stream_reader.Reader(streamed) as reader:
    with pytest.raises(ValueError, match='more axes'):
      reader.read('params/bias', (0, 0))
    with pytest.raises(ValueError, match='not a leaf'):
      reader.read('params/none')
  with pytest.raises(errors.InputError, match='step=3 is not among'):
    stream_reader.Reader(streamed, 3)
  with pytest.raises(errors.InputError, match='holds no checkpoints'):
    stream_reader.Reader(tmp_path / 'none')
  with pytest.raises(errors.InputError, match='not on a local disk'):
    stream_writer.Writer('gs://bucket/checkpoints', 0, tree, META)


def test_too_little_room_is_refused_before_a_byte_is_written(tmp_path):
  leaves = {'params': {'x': jax.ShapeDtypeStruct((2**30, 2**20), jnp.float32)}}
  with pytest.raises(errors.InputError, match='a checkpoint of 4503599.6 GB is to be written'):
    with stream_writer.Writer(tmp_path / 'new', 0, leaves, META):
      pass
  assert not list(tmp_path.iterdir())


def test_damage_is_found(tree, tmp_path):
  write(tmp_path, tree)
  chunk = tmp_path / '0/state/params.moe_layers.gate_up/1.3.0.0.0'
  original = chunk.read_bytes()
  chunk.write_bytes(original[:40] + bytes([original[40] ^ 1]) + original[41:])
  with checkpointer.Checkpointer(tmp_path, None) as ckpt:
    with pytest.raises(errors.InputError, match=f'differ from their checksums, first {GATE_UP}'):
      ckpt.restore(abstract(tree))
  wrong = f'{GATE_UP} of checkpoint step 0 .* differs from its checksum'
  with stream_reader.Reader(tmp_path, verify=True) as reader:
    reader.check('params/embed')
    for layer, expert in np.ndindex(LAYERS, EXPERTS):
      if (layer, expert) != (LAYERS - 1, EXPERTS - 1):
        reader.read(GATE_UP, (layer, expert))
    with pytest.raises(errors.InputError, match=wrong):
      reader.read(GATE_UP, (LAYERS - 1, EXPERTS - 1))
  # Read in part, even the undamaged part: found on the way out.
  with pytest.raises(errors.InputError, match=wrong):
    with stream_reader.Reader(tmp_path, verify=True) as reader:
      reader.read(GATE_UP, (0, 0))
  chunk.unlink()
  with checkpointer.Checkpointer(tmp_path, None) as ckpt:
    with pytest.raises(errors.InputError, match='its arrays cannot be read'):
      ckpt.restore(abstract(tree))
    others = {'router_state': tree['router_state'], 'empty': {}}
    assert_same(ckpt.restore(abstract(others), partial=True).state, others)
  with stream_reader.Reader(tmp_path) as reader:
    with pytest.raises(errors.InputError, match=f'{GATE_UP} .* cannot be read'):
      reader.read(GATE_UP, (1, 3))


def test_a_training_run_is_told_to_start_from_an_import(streamed, tree):
  full = abstract({**tree, 'step': np.array(0), 'opt_state': {'mu': tree['params']}})
  with checkpointer.Checkpointer(streamed, None) as ckpt:
    message = f'holds weights only.*--config.init_from={streamed.parent} and another --workdir'
    with pytest.raises(errors.InputError, match=message):
      ckpt.restore(full)


_PROGRAM = """
import resource, sys
import jax, jax.numpy as jnp, numpy as np
from moe_jax.checkpoints import stream_reader, stream_writer
mode, path = sys.argv[1:]
shape = (24, 16, 512, 2, 2048)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
leaf = np.arange(shape[2] * shape[4], dtype=np.uint32).reshape(shape[2], shape[4])
piece = lambda *at: (leaf * np.uint32(1 + sum(at))).view(np.uint16)[:, ::2].view(jnp.bfloat16)
piece(0)
leaves = {'params': {'x': jax.ShapeDtypeStruct(shape, jnp.bfloat16)}}
before = peak()
if mode == 'write':
  with stream_writer.Writer(path, 0, leaves, {}) as writer:
    for at in np.ndindex(shape[0], shape[1], 2):
      writer.write('params/x', (at[0], at[1], slice(None), at[2]), piece(*at))
else:
  with stream_reader.Reader(path, verify=True) as reader:
    for at in np.ndindex(shape[0], shape[1], 2):
      got = reader.read('params/x', (at[0], at[1], slice(None), at[2]))
      assert (got.view(np.uint16) == piece(*at).view(np.uint16)).all()
print((peak() - before) // 1024)
"""


@pytest.mark.slow
def test_memory_stays_far_below_the_size_of_a_leaf(tmp_path):
  for mode in ('write', 'read'):
    command = [sys.executable, '-c', _PROGRAM, mode, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # The leaf has 1,611 MB.
    assert int(done.stdout) < 600
