"""Cora, CiteSeer and PubMed from local files in Planetoid's format (arXiv 1603.08861).

The files `ind.NAME.{x,tx,allx,y,ty,ally,graph}` are pickles of Python 2, `ind.NAME.test.index` is
text. A pickle may run any code when it is opened; the reader here knows arrays, sparse matrices and
dictionaries of lists, and refuses everything else.
"""

import collections
import io
import pathlib
import pickle
from typing import Any

import numpy as np
from scipy import sparse

from moe_jax import errors
from moe_jax.graphs import dataset, structs

NAMES = ('cora', 'citeseer', 'pubmed')


def _reconstruct(kind: type, shape: tuple, code: Any) -> np.ndarray:
  """The empty array that a pickled array is filled into."""
  errors.require(kind is np.ndarray, f'a pickled array of type {kind!r} is not read')
  return np.ndarray.__new__(np.ndarray, shape, code)


def _encode(text: str, encoding: str) -> bytes:
  """Bytes, as Python 3 writes them for Python 2."""
  errors.require(encoding == 'latin1', f'pickled bytes in {encoding!r} are not read')
  return text.encode('latin1')


class _Matrix:
  """A sparse matrix's attributes, of whatever version of scipy."""


def _instance(kind: type, base: type, state: None) -> Any:
  """The empty matrix that a pickle of protocol 0 fills."""
  errors.require(
    kind is _Matrix and base is object and state is None, f'a pickled {kind!r} is not read'
  )
  return _Matrix()


# (module, name) of a pickle -> what is made; modules under their old names too.
_ALLOWED: dict[tuple[str, str], Any] = {
  **{(f'numpy.{core}.multiarray', '_reconstruct'): _reconstruct for core in ('core', '_core')},
  ('numpy', 'ndarray'): np.ndarray,
  ('numpy', 'dtype'): np.dtype,
  **{
    (module, name): _Matrix
    for module in ('scipy.sparse.csr', 'scipy.sparse._csr')
    for name in ('csr_matrix', 'csr_array')
  },
  ('collections', 'defaultdict'): collections.defaultdict,
  **{(module, 'list'): list for module in ('__builtin__', 'builtins')},
  **{(module, 'object'): object for module in ('__builtin__', 'builtins')},
  **{(module, '_reconstructor'): _instance for module in ('copy_reg', 'copyreg')},
  ('_codecs', 'encode'): _encode,
}


class _Reader(pickle.Unpickler):
  def find_class(self, module_name: str, global_name: str) -> Any:
    """Returns what a pickle names, if it is known to be harmless.

    Raises:
      errors.InputError: it is something else.
    """
    found = _ALLOWED.get((module_name, global_name))
    if found is None:
      raise errors.InputError(
        f'it names {module_name}.{global_name}, which could run code; only numpy arrays, scipy '
        'matrices and dictionaries of lists are read'
      )
    return found


def unpickle(path: pathlib.Path) -> Any:
  """Returns the array, matrix or dictionary of a file; a matrix as csr_array.

  Raises:
    errors.InputError: it is not there, is no such file, or holds anything else.
  """
  errors.require(
    path.is_file(), f'{path} is missing; --data_dir must hold all files of the data set'
  )
  try:
    found = _Reader(io.BytesIO(path.read_bytes()), encoding='latin1').load()
  except errors.InputError as e:
    raise errors.InputError(f'{path} is not read: {e}') from e
  except Exception as e:  # a damaged pickle raises anything
    raise errors.InputError(f'{path} is no pickle of Planetoid: {type(e).__name__}: {e}') from e
  return _as_array(path, found) if isinstance(found, _Matrix) else found


def _as_array(path: pathlib.Path, found: _Matrix) -> sparse.csr_array:
  values = vars(found)
  parts = [values.get(name) for name in ('data', 'indices', 'indptr', '_shape')]
  errors.require(all(part is not None for part in parts), f'{path} holds an incomplete matrix')
  try:
    matrix = sparse.csr_array(tuple(parts[:3]), parts[3])
    matrix.check_format(full_check=True)
  except (ValueError, TypeError) as e:
    raise errors.InputError(f'{path} holds a damaged matrix: {e}') from e
  return matrix


def _sparse(path: pathlib.Path) -> Any:
  found = unpickle(path)
  errors.require(
    sparse.issparse(found), f'{path} must hold a sparse matrix and has {type(found).__name__}'
  )
  return found


def read(directory: str | pathlib.Path, name: str) -> dataset.Dataset:
  """Returns a data set; features of length 1, and -1 for test nodes that the files do not describe.

  Those are CiteSeer's fifteen nodes without an edge. The split of the files is not used.

  Raises:
    errors.InputError: a file is missing, damaged or does not fit the others.
  """
  errors.choice('graph', name, NAMES)
  base = pathlib.Path(directory)

  def file(part: str) -> pathlib.Path:
    return base / f'ind.{name}.{part}'

  features, test_features = _sparse(file('allx')), _sparse(file('tx'))
  known = np.concatenate([_classes(file('ally')), _classes(file('ty'))])
  index = _test_index(file('test.index'))
  neighbors = unpickle(file('graph'))
  errors.require(
    isinstance(neighbors, dict), f'{file("graph")} must hold a dictionary of neighbours'
  )
  first, num = features.shape[0], len(neighbors)
  fits = (
    features.shape[1] == test_features.shape[1]
    and len(known) == first + test_features.shape[0]
    and len(index) == test_features.shape[0] == len(np.unique(index))
    and index.min() >= first
    and index.max() < num
    and known.shape[1] >= 2
  )
  errors.require(
    fits,
    f'the files of {name} in {base} do not fit together: allx {features.shape}, tx '
    f'{test_features.shape}, classes {known.shape}, {len(index)} test nodes, {num} nodes in graph',
  )
  place = np.concatenate([np.arange(first), index])
  labels = np.full(num, -1, np.int32)
  labels[place] = known.argmax(1)
  x = np.zeros((num, features.shape[1]), np.float32)
  x[place] = sparse.vstack([features, test_features]).toarray()
  pairs = [(int(node), int(other)) for node, others in neighbors.items() for other in others]
  return dataset.Dataset(
    name,
    structs.undirected(np.array(pairs), num),
    dataset.unit_rows(x),
    labels,
    tuple(map(str, range(known.shape[1]))),
  )


def _classes(path: pathlib.Path) -> np.ndarray:
  """[nodes, classes], a single 1 per row."""
  found = unpickle(path)
  good = isinstance(found, np.ndarray) and found.ndim == 2 and (found.sum(1) == 1).all()
  errors.require(good, f'{path} must hold one class per node, as rows with a single 1')
  return found


def _test_index(path: pathlib.Path) -> np.ndarray:
  errors.require(
    path.is_file(), f'{path} is missing; --data_dir must hold all files of the data set'
  )
  try:
    index = np.array([int(word) for word in path.read_text().split()])
  except ValueError as e:
    raise errors.InputError(f'{path} must hold a node number per line: {e}') from e
  errors.require(index.size > 0, f'{path} is empty')
  return index
