"""Small fake files in the published formats."""

import gzip
import struct

import numpy as np
import pytest

from moe_jax import errors
from moe_jax.federated import datasets


@pytest.fixture
def few(monkeypatch):
  monkeypatch.setattr(
    datasets, 'COUNTS', {'mnist': (30, 20), 'cifar10': (50, 10), 'cifar100': (100, 100)}
  )


def idx(values: np.ndarray) -> bytes:
  head = struct.pack(f'>HBB{values.ndim}I', 0, 8, values.ndim, *values.shape)
  return head + values.astype(np.uint8).tobytes()


def mnist(directory) -> dict[str, np.ndarray]:
  rng, made = np.random.default_rng(0), {}
  for part, number in (('train', 30), ('t10k', 20)):
    made[f'{part}_x'] = rng.integers(0, 256, (number, 28, 28))
    made[f'{part}_y'] = np.arange(number) % 10
    (directory / f'{part}-images-idx3-ubyte').write_bytes(idx(made[f'{part}_x']))
    packed = gzip.compress(idx(made[f'{part}_y']))
    (directory / f'{part}-labels-idx1-ubyte.gz').write_bytes(packed)
  return made


def test_mnist_plain_and_packed(tmp_path, few):
  made = mnist(tmp_path)
  found = datasets.load('mnist', tmp_path, 0)
  assert (found.train_x[..., 0] == made['train_x']).all() and found.train_x.shape[3] == 1
  assert (found.test_y == made['t10k_y']).all() and found.test_y.dtype == np.int32


def test_what_is_no_mnist_is_refused(tmp_path, few):
  made = mnist(tmp_path)
  path = tmp_path / 'train-images-idx3-ubyte'
  whole = path.read_bytes()
  for data, words in (
    (whole[:-1], 'has 23,519 values and says that it has'),
    (b'\0\0\x0d' + whole[3:], 'is no idx file of bytes'),
    (idx(made['train_x'][:29]), r'training images \(29, 28, 28, 1\) with labels \(30,\)'),
  ):
    path.write_bytes(data)
    with pytest.raises(errors.InputError, match=words):
      datasets.load('mnist', tmp_path, 0)
  path.write_bytes(whole)
  labels = tmp_path / 't10k-labels-idx1-ubyte.gz'
  labels.write_bytes(gzip.compress(idx(np.zeros(20))))
  with pytest.raises(errors.InputError, match='the test labels are not 0 to 9'):
    datasets.load('mnist', tmp_path, 0)
  labels.write_bytes(labels.read_bytes()[:-9])
  with pytest.raises(errors.InputError, match='no whole gzip file'):
    datasets.load('mnist', tmp_path, 0)
  labels.unlink()
  with pytest.raises(errors.InputError, match='has no file t10k-labels-idx1-ubyte or t10k-l'):
    datasets.load('mnist', tmp_path, 0)
  with pytest.raises(errors.InputError, match='--data_dir is missing'):
    datasets.load('mnist', '', 0)


def cifar(path, labels: np.ndarray, pixels: np.ndarray):
  rows = np.concatenate([labels, pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)], axis=1)
  path.write_bytes(rows.astype(np.uint8).tobytes())


def test_cifar10_in_order_of_its_files(tmp_path, few):
  x = np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3))
  y = np.arange(60)[:, None] % 10
  for i, name in enumerate([f'data_batch_{n}.bin' for n in range(1, 6)] + ['test_batch.bin']):
    cifar(tmp_path / name, y[10 * i : 10 * i + 10], x[10 * i : 10 * i + 10])
  found = datasets.load('cifar10', tmp_path, 0)
  assert (found.train_x == x[:50]).all() and (found.test_x == x[50:]).all()
  assert (found.train_y == y[:50, 0]).all()
  path = tmp_path / 'data_batch_3.bin'
  path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(errors.InputError, match='30,729 bytes, no multiple of 3073'):
    datasets.load('cifar10', tmp_path, 0)


def test_cifar100_by_its_fine_labels(tmp_path, few):
  x = np.random.default_rng(0).integers(0, 256, (100, 32, 32, 3))
  labels = np.stack([np.arange(100) // 5, np.arange(100)], axis=1)  # coarse, fine
  for name in ('train.bin', 'test.bin'):
    cifar(tmp_path / name, labels, x)
  found = datasets.load('cifar100', tmp_path, 0)
  assert (found.train_y == np.arange(100)).all() and (found.train_x == x).all()


def test_digits_are_divided_by_the_seed():
  found, again, other = (datasets.load('digits', '', seed) for seed in (3, 3, 4))
  assert found.test_x.shape == (500, 8, 8, 1) and found.train_x.shape == (1297, 8, 8, 1)
  assert (np.bincount(found.test_y) == 50).all() and found.train_x.max() == 16
  assert (found.test_x == again.test_x).all() and (found.test_x != other.test_x).any()
  both = np.concatenate([found.train_x, found.test_x]).reshape(1797, -1)
  from sklearn import datasets as published

  assert sorted(map(bytes, both)) == sorted(map(bytes, published.load_digits().data.astype('u1')))
