"""Images from scikit-learn, or from local files in their published formats, which are checked.

digits: 8x8, from scikit-learn (extra `imbalance`). mnist: the four idx files, plain or .gz.
cifar10, cifar100: the *binary* version; a pickle, the Python version, would run code.
"""

import gzip
import pathlib

import numpy as np

from moe_jax import errors
from moe_jax.federated import methods, partition

TEST_DIGITS = 50  # per class; scikit-learn's digits have no test set of their own

_MNIST = ('train-images-idx3-ubyte', 'train-labels-idx1-ubyte')
_MNIST += ('t10k-images-idx3-ubyte', 't10k-labels-idx1-ubyte')
# Files of training and testing, and bytes before the label that counts (CIFAR-100: the coarse one).
_CIFAR = {
  'cifar10': ([f'data_batch_{i}.bin' for i in range(1, 6)], ['test_batch.bin'], 0),
  'cifar100': (['train.bin'], ['test.bin'], 1),
}
COUNTS = {'mnist': (60_000, 10_000), 'cifar10': (50_000, 10_000), 'cifar100': (50_000, 10_000)}


def load(name: str, data_dir: str | pathlib.Path, seed: int) -> partition.Images:
  """The images of a data set; those of digits are divided into training and test by the seed.

  Args:
    name: a key of methods.DATASETS.
    data_dir: where the files are; of no meaning for digits.
    seed: of the run.

  Raises:
    errors.InputError: a file is missing or is not what was published; scikit-learn is missing.
  """
  if name == 'digits':
    return _digits(seed)
  errors.require(
    bool(data_dir), f'--data_dir is missing: the directory of the files of --dataset={name}'
  )
  directory = pathlib.Path(data_dir)
  if name == 'mnist':
    train_x, train_y, test_x, test_y = (_idx(_found(directory, file, '.gz')) for file in _MNIST)
    images = partition.Images(train_x[..., None], train_y, test_x[..., None], test_y)
  else:
    train, test, skip = _CIFAR[name]
    images = partition.Images(*_cifar(directory, train, skip), *_cifar(directory, test, skip))
  _check(name, directory, images)
  return images._replace(
    train_y=images.train_y.astype(np.int32), test_y=images.test_y.astype(np.int32)
  )


def _digits(seed: int) -> partition.Images:
  try:
    from sklearn import datasets
  except ImportError as e:
    raise errors.InputError(
      "--dataset=digits needs scikit-learn: pip install 'moe_jax[imbalance]'"
    ) from e
  pixels, y = datasets.load_digits(return_X_y=True)
  x, y = pixels.astype(np.uint8).reshape(-1, 8, 8, 1), y.astype(np.int32)
  rng = np.random.default_rng((seed, 0))
  by_class = [rng.permutation(np.flatnonzero(y == c)) for c in range(10)]
  test = np.concatenate([rows[:TEST_DIGITS] for rows in by_class])
  train = np.concatenate([rows[TEST_DIGITS:] for rows in by_class])
  return partition.Images(x[train], y[train], x[test], y[test])


def _found(directory: pathlib.Path, name: str, ending: str = '') -> pathlib.Path:
  """The file `name`, or `name` + ending."""
  for path in (directory / name, directory / (name + ending)):
    if path.is_file():
      return path
  raise errors.InputError(
    f'--data_dir={directory} has no file {name}'
    + (f' or {name}{ending}' if ending else '')
    + '; give the directory of the published files (CIFAR: the binary version)'
  )


def _idx(path: pathlib.Path) -> np.ndarray:
  """The bytes of an idx file: a magic number, the sizes (big-endian), and the values."""
  data = path.read_bytes()
  if path.suffix == '.gz':
    try:
      data = gzip.decompress(data)
    except (OSError, EOFError) as e:
      raise errors.InputError(f'{path} is no whole gzip file ({e}); fetch it again') from e
  rank = data[3] if data[:3] == b'\0\0\x08' else 0  # 8: unsigned bytes
  errors.require(
    rank > 0 and len(data) >= 4 + 4 * rank, f'{path} is no idx file of bytes; fetch it again'
  )
  shape = tuple(int(size) for size in np.frombuffer(data, '>u4', rank, 4))
  body = len(data) - 4 - 4 * rank
  errors.require(
    body == int(np.prod(shape)),
    f'{path} has {body:,} values and says that it has {shape}; fetch it again',
  )
  return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def _cifar(directory: pathlib.Path, names: list[str], skip: int) -> tuple[np.ndarray, np.ndarray]:
  """Images and labels of binary files: rows of label bytes and 3 x 32 x 32 pixels."""
  size, rows = skip + 1 + 3 * 32 * 32, []
  for name in names:
    path = _found(directory, name)
    data = np.frombuffer(path.read_bytes(), np.uint8)
    errors.require(
      len(data) > 0 and len(data) % size == 0,
      f'{path} has {len(data):,} bytes, no multiple of {size}; fetch the binary version again',
    )
    rows.append(data.reshape(-1, size))
  table = np.concatenate(rows)
  pixels = table[:, skip + 1 :].reshape(-1, 3, 32, 32)
  return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)), table[:, skip]


def _check(name: str, directory: pathlib.Path, images: partition.Images):
  """Raises errors.InputError where shape, count or labels are not the published ones."""
  traits = methods.DATASETS[name]
  parts = ((images.train_x, images.train_y), (images.test_x, images.test_y))
  for part, (x, y), count in zip(('training', 'test'), parts, COUNTS[name]):
    errors.require(
      x.shape == (count, *traits.shape) and y.shape == (count,),
      f'--data_dir={directory}: {part} images {x.shape} with labels {y.shape}, but {name} has '
      f'{(count, *traits.shape)}; fetch the published files again',
    )
    errors.require(
      set(np.unique(y)) == set(range(traits.classes)),
      f'--data_dir={directory}: the {part} labels are not 0 to {traits.classes - 1}; is it {name}?',
    )
