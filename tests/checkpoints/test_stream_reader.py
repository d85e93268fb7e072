import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts

from moe_jax import errors
from moe_jax.checkpoints import checkpointer, stream_reader
from moe_jax.config import schema
from tests.checkpoints import streams

# Orbax leaves coroutines behind when a read fails.
pytestmark = pytest.mark.filterwarnings('ignore:coroutine .* was never awaited')


@pytest.mark.parametrize('source', ['streamed', 'saved'])
def test_reads_slices(source, tree, request):
  path = request.getfixturevalue(source)
  with stream_reader.Reader(path, verify=True) as reader:
    assert reader.step == 0 and reader.meta['tokenizer'] == 'digest'
    assert reader.leaves == {n: (x.shape, x.dtype) for n, x in streams.named(tree).items()}
    for name, x in streams.named(tree).items():
      for index in [(), 0, slice(1, None), (slice(None), 1)]:
        if len(index if isinstance(index, tuple) else (index,)) > x.ndim:
          continue
        got = reader.read(name, index)
        assert got.dtype == x.dtype
        np.testing.assert_array_equal(got, x[index])
    x = streams.named(tree)[streams.GATE_UP]
    got = reader.read(streams.GATE_UP, (1, 3, slice(4, 9), 1))
    np.testing.assert_array_equal(got, x[1, 3, 4:9, 1])


def bytes_read() -> int:
  found = ts.experimental_collect_matching_metrics('/tensorstore/kvstore/file/bytes_read')
  return sum(metric['values'][0]['value'] for metric in found)


def test_a_large_chunk_is_read_once_for_all_its_slices(saved, tree, monkeypatch):
  monkeypatch.setattr(checkpointer, 'MAX_CHUNK_BYTES', 128)
  with stream_reader.Reader(saved) as reader:
    for name in (streams.GATE_UP, 'params/embed', streams.GATE_UP):
      before, read = bytes_read(), []
      for i in range(streams.LAYERS):
        np.testing.assert_array_equal(reader.read(name, i), streams.named(tree)[name][i])
        read.append(bytes_read() - before)
      # Two openings of the array and its chunk; then nothing more.
      assert read[0] > 0.5 * streams.named(tree)[name].nbytes and read[1] == read[0]


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


def test_damage_is_found(tree, tmp_path):
  streams.write(tmp_path, tree)
  chunk = tmp_path / '0/state/params.moe_layers.gate_up/1.3.0.0.0'
  original = chunk.read_bytes()
  chunk.write_bytes(original[:40] + bytes([original[40] ^ 1]) + original[41:])
  with checkpointer.Checkpointer(tmp_path, None) as ckpt:
    with pytest.raises(
      errors.InputError, match=f'differ from their checksums, first {streams.GATE_UP}'
    ):
      ckpt.restore(streams.abstract(tree))
  wrong = f'{streams.GATE_UP} of checkpoint step 0 .* differs from its checksum'
  with stream_reader.Reader(tmp_path, verify=True) as reader:
    reader.check('params/embed')
    for layer, expert in np.ndindex(streams.LAYERS, streams.EXPERTS):
      if (layer, expert) != (streams.LAYERS - 1, streams.EXPERTS - 1):
        reader.read(streams.GATE_UP, (layer, expert))
    with pytest.raises(errors.InputError, match=wrong):
      reader.read(streams.GATE_UP, (streams.LAYERS - 1, streams.EXPERTS - 1))
  # Read in part, even the undamaged part: found on the way out.
  with pytest.raises(errors.InputError, match=wrong):
    with stream_reader.Reader(tmp_path, verify=True) as reader:
      reader.read(streams.GATE_UP, (0, 0))
  chunk.unlink()
  with checkpointer.Checkpointer(tmp_path, None) as ckpt:
    with pytest.raises(errors.InputError, match='its arrays cannot be read'):
      ckpt.restore(streams.abstract(tree))
    others = {'router_state': tree['router_state'], 'empty': {}}
    streams.assert_same(ckpt.restore(streams.abstract(others), partial=True).state, others)
  with stream_reader.Reader(tmp_path) as reader:
    with pytest.raises(errors.InputError, match=f'{streams.GATE_UP} .* cannot be read'):
      reader.read(streams.GATE_UP, (1, 3))
