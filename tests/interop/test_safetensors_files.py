"""The format, held against the safetensors package in both directions; damage by name."""

import json

import ml_dtypes
import numpy as np
import pytest

from moe_jax import errors
from moe_jax.interop import safetensors_files
from tests.interop import checkpoints

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn]


def weights() -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  return {f't{i}': rng.normal(size=(3, 2 + i)).astype(dtype) for i, dtype in enumerate(DTYPES)}


def specs() -> list[safetensors_files.Spec]:
  code = {np.dtype(dtype): name for name, dtype in safetensors_files.DTYPES.items()}
  return [safetensors_files.Spec(k, code[x.dtype], x.shape) for k, x in weights().items()]


def test_reads_what_the_package_wrote(tmp_path):
  checkpoints.write_file(tmp_path / 'model.safetensors', weights())
  tensors = safetensors_files.find(tmp_path)
  with safetensors_files.Reader(tensors) as reader:
    for name, want in weights().items():
      got = reader.read(name, 0, tensors[name].shape)
      assert got.dtype == want.dtype
      np.testing.assert_array_equal(got, want)
      part = reader.read(name, want.shape[1], (1, want.shape[1]))  # the second row
      np.testing.assert_array_equal(part, want[1:2])


@pytest.mark.parametrize('shard_bytes, num_files', [(1000, 1), (40, 3), (1, 4)])
def test_the_package_reads_what_is_written(tmp_path, shard_bytes, num_files):
  """Parts of tensors, transposed views among them, arrive as whole tensors."""
  parts = [part for x in weights().values() for part in (x[:1], x[1:])]
  parts[0] = np.asfortranarray(parts[0])
  total = safetensors_files.write(tmp_path, specs(), parts, shard_bytes=shard_bytes)
  assert total == sum(x.nbytes for x in weights().values())
  files = sorted(tmp_path.glob('*.safetensors'))
  assert len(files) == num_files
  got = checkpoints.read(tmp_path)
  assert {k: v[2] for k, v in got.items()} == {k: x.tobytes() for k, x in weights().items()}
  assert {k: v[1] for k, v in got.items()} == {k: x.shape for k, x in weights().items()}
  assert safetensors_files.find(tmp_path).keys() == got.keys()
  for file in files:
    header = int.from_bytes(file.read_bytes()[:8], 'little')
    assert header % 8 == 0 and b'"format":"pt"' in file.read_bytes()
  assert (tmp_path / 'model.safetensors.index.json').exists() == (num_files > 1)


def test_parts_that_are_not_those_of_the_specs(tmp_path):
  parts = list(weights().values())
  with pytest.raises(ValueError, match='does not fit into'):
    safetensors_files.write(tmp_path, specs(), parts[::-1])
  with pytest.raises(ValueError, match='more parts'):
    safetensors_files.write(tmp_path, specs(), [*parts, parts[0]])


def refused(directory, message):
  with pytest.raises(errors.InputError, match=message):
    safetensors_files.find(directory)


def test_cut_short(tmp_path):
  path = tmp_path / 'model.safetensors'
  checkpoints.write_file(path, weights())
  whole = path.read_bytes()
  path.write_bytes(whole[:-1])
  refused(tmp_path, f'has {len(whole) - 1} bytes, but its header describes {len(whole)}')
  path.write_bytes(whole + b'x')
  refused(tmp_path, 'cut short or altered')
  path.write_bytes(whole[:20])
  refused(tmp_path, 'has 20 bytes, fewer than its own header')
  path.write_bytes(b'')
  refused(tmp_path, 'has 0 bytes')


def with_header(path, header: bytes, data: bytes = b''):
  path.write_bytes(len(header).to_bytes(8, 'little') + header + data)


HEADERS = [
  (b'not json', 'its header cannot be read'),
  (b'[1]', 'its header cannot be read'),
  (b'{"a": {"dtype": "F4", "shape": [1], "data_offsets": [0, 1]}}', "KeyError.'F4'"),
  (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 3]}}', '3 bytes for F32'),
  (b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}', 'shape'),
  (b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}', 'overlap or leave gaps'),
  (
    b'{"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]},'
    b' "b": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}',
    'overlap or leave gaps',
  ),
]


@pytest.mark.parametrize('header, message', HEADERS)
def test_malformed_headers(tmp_path, header, message):
  with_header(tmp_path / 'model.safetensors', header, b'xx')
  refused(tmp_path, message)


def test_pickles_and_nothing(tmp_path):
  refused(tmp_path, r'holds no \*.safetensors')
  (tmp_path / 'pytorch_model-00001-of-00002.bin').touch()
  refused(tmp_path, 'pickles that could run any code when they are opened')
  checkpoints.write_file(tmp_path / 'model-00001-of-00002.safetensors', weights())
  refused(tmp_path, 'neither model.safetensors nor model.safetensors.index.json')


def test_index(tmp_path):
  checkpoints.write_file(tmp_path / 'a.safetensors', weights())
  index = tmp_path / 'model.safetensors.index.json'
  whole = dict.fromkeys(weights(), 'a.safetensors')
  for weight_map, message in (
    (whole | {'t0': 'b.safetensors'}, "names the file 'b.safetensors', which is not in"),
    (whole | {'t0': '../a.safetensors'}, 'must be a plain name'),
    (whole | {'t9': 'a.safetensors'}, "disagree on 't9'"),
    ({'t0': 'a.safetensors'}, "disagree on 't1', 't2', 't3'"),
    ({}, 'is not an index'),
  ):
    index.write_text(json.dumps({'weight_map': weight_map}))
    refused(tmp_path, message)
  index.write_text('{}')
  refused(tmp_path, 'is not an index')
  index.write_text(json.dumps({'weight_map': whole}))
  assert safetensors_files.find(tmp_path).keys() == whole.keys()


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
  path = tmp_path / 'model.safetensors'
  checkpoints.write_file(path, weights())
  tensors = safetensors_files.find(tmp_path)
  last = max(tensors, key=lambda name: tensors[name].offset)
  path.write_bytes(path.read_bytes()[:-1])
  with safetensors_files.Reader(tensors) as reader:
    with pytest.raises(errors.InputError, match='changed while it was read'):
      reader.read(last, 0, tensors[last].shape)


def test_some():
  assert safetensors_files.some(['a', 'b']) == "'a', 'b'"
  assert safetensors_files.some(list('abcdefg')) == "'a', 'b', 'c', 'd', 'e' and 2 more"
