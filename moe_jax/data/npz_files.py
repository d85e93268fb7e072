"""Arrays of .npz files from anywhere: headers are read before data, and nothing is unpickled."""

import os
import pathlib
import zipfile
import zlib

import numpy as np

# What a file that is none, or is damaged, raises below here.
DAMAGE = (*(OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error),)


def headers(path: str | os.PathLike[str]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
  """Shape and dtype of every array, by name; reads no data.

  Raises:
    one of DAMAGE: it is no .npz file, or an array is not as large as its header says.
  """
  found = {}
  with zipfile.ZipFile(path) as archive:
    for item in archive.infolist():
      with archive.open(item) as file:
        version = np.lib.format.read_magic(file)
        first = version == (1, 0)
        read_header = (
          np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
        )
        try:
          shape, _, dtype = read_header(file)
        except Exception as e:  # it is read as a Python literal, with whatever that raises
          raise ValueError(f'the header of {item.filename} cannot be read') from e
        if dtype.hasobject or file.tell() + num_bytes(shape, dtype) != item.file_size:
          raise ValueError(f'{item.filename} is not the plain array that its header describes')
      found[pathlib.PurePath(item.filename).stem] = shape, dtype
  return found


def num_bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
  """Bytes of an array, however large its header says it is."""
  size = dtype.itemsize
  for n in shape:
    size *= n
  return size


def read(path: str | os.PathLike[str], name: str) -> np.ndarray:
  """One array; ask `headers` first how large it is.

  Raises:
    one of DAMAGE: there is none, or it is damaged.
  """
  with zipfile.ZipFile(path) as archive, archive.open(f'{name}.npy') as file:
    return np.lib.format.read_array(file, allow_pickle=False)
