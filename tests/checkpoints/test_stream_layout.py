import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.checkpoints import checkpointer, integrity, stream_layout, stream_reader
from tests.checkpoints import streams

# Orbax leaves coroutines behind when a read fails.
pytestmark = pytest.mark.filterwarnings('ignore:coroutine .* was never awaited')


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


def test_chunks_are_the_slices_and_no_larger_than_the_cap(streamed, tmp_path, monkeypatch):
  files = {p.name for p in (streamed / '0/state/params.moe_layers.gate_up').iterdir()}
  parts = np.ndindex(streams.LAYERS, streams.EXPERTS, 2)
  assert files == {'.zarray'} | {f'{layer}.{e}.0.{half}.0' for layer, e, half in parts}
  monkeypatch.setattr(checkpointer, 'MAX_CHUNK_BYTES', 3 * streams.EMBED * 4)
  embed = {
    'params': {'embed': np.arange(24 * streams.EMBED, dtype=np.float32).reshape(24, streams.EMBED)}
  }
  streams.write(tmp_path, embed)
  sizes = {p.stat().st_size for p in (tmp_path / '0/state/params.embed').glob('[0-9]*')}
  assert sizes == {3 * streams.EMBED * 4}
  with stream_reader.Reader(tmp_path, verify=True) as reader:
    np.testing.assert_array_equal(
      reader.read('params/embed', slice(2, 11)), embed['params']['embed'][2:11]
    )


def test_boxes_that_touch_do_not_overlap():
  tally = stream_layout.Tally((12,))
  tally.add(stream_layout.Box((4,), (8,)), 0)
  boxes = [((0,), (4,)), ((8,), (12,)), ((3,), (5,)), ((7,), (9,)), ((5,), (6,)), ((0,), (12,))]
  found = [tally.overlaps(stream_layout.Box(*box)) for box in boxes]
  assert found == [False, False, True, True, True, True]
