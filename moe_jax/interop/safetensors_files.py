"""Reading and writing sets of *.safetensors files, a part of one tensor at a time.

The format is simple: the length of a header as 8 bytes, little endian; the header, JSON, with
dtype, shape and place of every tensor; then their bytes. It is read and written here directly
because the safetensors package writes a file from tensors that are all in memory, and reads through
a memory map whose pages then count as the process's own. Nothing in a file is ever executed.
"""

import io
import json
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from moe_jax import errors, trees
from moe_jax.data import json_files

SINGLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'
SHARD_BYTES = 5_000_000_000  # of a written file; memory does not depend on it
_MAX_HEADER = 100_000_000  # the format's own limit

# The format's names of types.
DTYPES = {
  'F64': np.dtype(np.float64),
  'F32': np.dtype(np.float32),
  'F16': np.dtype(np.float16),
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'F8_E4M3': np.dtype(ml_dtypes.float8_e4m3fn),
  'F8_E5M2': np.dtype(ml_dtypes.float8_e5m2),
  'I64': np.dtype(np.int64),
  'I32': np.dtype(np.int32),
  'I16': np.dtype(np.int16),
  'I8': np.dtype(np.int8),
  'U8': np.dtype(np.uint8),
  'BOOL': np.dtype(np.bool_),
}


class Tensor(NamedTuple):
  """Where a tensor lies."""

  path: pathlib.Path
  offset: int  # in the file, bytes
  dtype: str  # key of DTYPES
  shape: tuple[int, ...]

  @property
  def num_bytes(self) -> int:
    """Bytes of the tensor."""
    return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class Spec(NamedTuple):
  """A tensor that is to be written."""

  name: str
  dtype: str  # key of DTYPES
  shape: tuple[int, ...]

  @property
  def num_bytes(self) -> int:
    """Bytes of the tensor."""
    return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def find(directory: str | os.PathLike[str]) -> dict[str, Tensor]:
  """All tensors of a checkpoint, by name; reads headers only.

  Raises:
    errors.InputError: there are no safetensors files, or one is missing, cut short or malformed.
  """
  directory = pathlib.Path(directory)
  if not (directory / INDEX).exists():
    return _header(_single(directory))
  weight_map = _weight_map(directory / INDEX)
  tensors: dict[str, Tensor] = {}
  for file in sorted(set(weight_map.values())):
    errors.require(
      pathlib.PurePath(file).name == file,
      f'{directory / INDEX} names the file {file!r}, which must be a plain name in the same '
      'directory; download the checkpoint again',
    )
    errors.require(
      os.path.isfile(directory / file),  # False too for names that no file can have
      f'{directory / INDEX} names the file {file!r}, which is not in --from_hf={directory}; '
      'download what is missing',
    )
    tensors |= _header(directory / file)
  actual = {name: tensor.path.name for name, tensor in tensors.items()}
  different = sorted(k for k in actual | weight_map if actual.get(k) != weight_map.get(k))
  errors.require(
    not different,
    f'{directory / INDEX} and the headers of its files disagree on {some(different)}; download the '
    'checkpoint again',
  )
  return tensors


def find_all(directory: pathlib.Path) -> dict[str, Tensor]:
  """The tensors of all *.safetensors in a directory, by name; reads headers only.

  Raises:
    errors.InputError: a file is cut short or malformed, or two have a tensor of the same name.
  """
  tensors: dict[str, Tensor] = {}
  for path in sorted(directory.glob('*.safetensors')):
    found = _header(path)
    twice = sorted(tensors.keys() & found.keys())
    errors.require(not twice, f'{path} has {some(twice)} again, as another file has; remove one')
    tensors |= found
  return tensors


def _single(directory: pathlib.Path) -> pathlib.Path:
  """The one file of a checkpoint without an index."""
  path = directory / SINGLE
  if path.is_file():
    return path
  others = sorted(file.name for file in directory.glob('*.safetensors'))
  errors.require(
    not others,
    f'--from_hf={directory} holds {some(others)} but neither {SINGLE} nor {INDEX}, which says what '
    'is in which file; download it too',
  )
  pickles = sorted(
    file.name for kind in ('bin', 'pt', 'pth') for file in directory.glob(f'*.{kind}')
  )
  errors.require(
    not pickles,
    f'--from_hf={directory} holds its weights as {some(pickles)}, pickles that could run any code '
    'when they are opened; only *.safetensors are read: convert them where you trust them',
  )
  raise errors.InputError(
    f'--from_hf={directory} holds no *.safetensors; give the directory of a downloaded checkpoint'
  )


def _weight_map(path: pathlib.Path) -> dict[str, str]:
  try:
    weight_map = json_files.read_object(path, 'download it again')['weight_map']
    if not isinstance(weight_map, dict) or not weight_map:
      raise ValueError('its weight_map is not a table of names')
    if not all(isinstance(file, str) for file in weight_map.values()):
      raise ValueError('its weight_map names something else than files')
  except errors.InputError:
    raise
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise errors.InputError(
      f'{path} is not an index of safetensors files ({e!r}); download it again'
    ) from e
  return weight_map


def _header(path: pathlib.Path) -> dict[str, Tensor]:
  """The tensors of one file, checked against the file's size."""
  size = path.stat().st_size
  with path.open('rb') as file:
    length = int.from_bytes(file.read(8), 'little')
    errors.require(
      size >= 8 and length <= min(size - 8, _MAX_HEADER),
      f'{path} has {size} bytes, fewer than its own header; download it again',
    )
    try:
      header = json_files.parse(file.read(length))
      items = {
        name: _tensor(path, 8 + length, item)
        for name, item in header.items()
        if name != '__metadata__'
      }
    except (ValueError, KeyError, TypeError, AttributeError) as e:
      raise errors.InputError(
        f'{path} is not a safetensors file: its header cannot be read ({e!r}); download it again'
      ) from e
  end = 8 + length
  for tensor in sorted(items.values(), key=lambda t: (t.offset, t.num_bytes)):
    errors.require(
      tensor.offset == end,
      f'{path} is malformed: its tensors overlap or leave gaps; download it again',
    )
    end += tensor.num_bytes
  errors.require(
    end == size,
    f'{path} has {size} bytes, but its header describes {end}; it was cut short or altered: '
    'download it again',
  )
  return items


def _tensor(path: pathlib.Path, data: int, item: trees.Json) -> Tensor:
  begin, end = item['data_offsets']
  tensor = Tensor(path, data + begin, item['dtype'], tuple(item['shape']))
  if any(type(n) is not int or n < 0 for n in (*tensor.shape, begin)):
    raise ValueError(f'shape {tensor.shape} at {begin}')
  if tensor.num_bytes != end - begin:
    raise ValueError(f'{end - begin} bytes for {tensor.dtype}{list(tensor.shape)}')
  return tensor


class Reader:
  """Reads parts of the tensors that `find` has found; keeps one file open."""

  def __init__(self, tensors: Mapping[str, Tensor]):
    self.tensors = tensors
    self._path: pathlib.Path | None = None
    self._file: io.BufferedReader | None = None

  def read(self, name: str, start: int, shape: Sequence[int]) -> np.ndarray:
    """Elements `start` and following of a tensor, as an array of `shape`.

    Raises:
      errors.InputError: the file has become shorter meanwhile.
    """
    tensor = self.tensors[name]
    file = self._open(tensor.path)
    dtype = DTYPES[tensor.dtype]
    array = np.empty(math.prod(shape), dtype)
    file.seek(tensor.offset + start * dtype.itemsize)
    errors.require(
      file.readinto(array.view(np.uint8).data) == array.nbytes,
      f'{tensor.path} ended inside of tensor {name!r}; it was changed while it was read',
    )
    return array.reshape(shape)

  def _open(self, path: pathlib.Path) -> io.BufferedReader:
    if self._file is None or self._path != path:
      self.close()
      self._path, self._file = path, path.open('rb')
    return self._file

  def close(self):
    """Closes the open file."""
    if self._file is not None:
      self._file.close()
    self._path = self._file = None

  def __enter__(self) -> 'Reader':
    return self

  def __exit__(self, *unused_exc):
    self.close()


def write(
  directory: str | os.PathLike[str],
  specs: Sequence[Spec],
  parts: Iterable[np.ndarray],
  *,
  shard_bytes: int = SHARD_BYTES,
) -> int:
  """Writes tensors, in this order, as one file or as shards with an index.

  Args:
    directory: where; exists.
    specs: the tensors.
    parts: arrays of the specs' dtypes whose bytes, one after the other, are those of the tensors.
    shard_bytes: largest size of a file, unless it holds a single tensor.

  Returns:
    The number of bytes of all tensors.

  Raises:
    ValueError: the parts are not those of the specs.
  """
  directory, parts = pathlib.Path(directory), iter(parts)
  shards = list(_shards(specs, shard_bytes))
  weight_map = {}
  for number, shard in enumerate(shards, start=1):
    name = SINGLE if len(shards) == 1 else f'model-{number:05d}-of-{len(shards):05d}.safetensors'
    with (directory / name).open('wb') as file:
      file.write(_encode_header(shard))
      for spec in shard:
        _write_tensor(file, spec, parts)
    weight_map |= {spec.name: name for spec in shard}
  if next(parts, None) is not None:
    raise ValueError('there are more parts than the specs describe')
  total = sum(spec.num_bytes for spec in specs)
  if len(shards) > 1:
    index = {'metadata': {'total_size': total}, 'weight_map': weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + '\n', encoding='utf-8')
  return total


def _write_tensor(file: BinaryIO, spec: Spec, parts: Iterator[np.ndarray]):
  missing = spec.num_bytes
  while missing > 0:
    part = next(parts)
    missing -= part.nbytes
    if part.dtype != DTYPES[spec.dtype] or missing < 0:
      raise ValueError(f'a part {part.dtype}{list(part.shape)} does not fit into {spec}')
    file.write(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)


def _shards(specs: Sequence[Spec], shard_bytes: int) -> Iterator[list[Spec]]:
  shard, size = [], 0
  for spec in specs:
    if shard and size + spec.num_bytes > shard_bytes:
      yield shard
      shard, size = [], 0
    shard.append(spec)
    size += spec.num_bytes
  yield shard


def _encode_header(shard: Sequence[Spec]) -> bytes:
  header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}  # transformers asks for it
  end = 0
  for spec in shard:
    begin, end = end, end + spec.num_bytes
    header[spec.name] = {
      'dtype': spec.dtype,
      'shape': list(spec.shape),
      'data_offsets': [begin, end],
    }
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)  # the data are aligned then
  return len(text).to_bytes(8, 'little') + text


def some(names: Sequence[str], limit: int = 5) -> str:
  """The first few names, and how many more there are."""
  shown = ', '.join(map(repr, names[:limit]))
  return shown if len(names) <= limit else f'{shown} and {len(names) - limit} more'
