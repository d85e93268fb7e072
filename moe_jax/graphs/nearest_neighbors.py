"""Graphs that join each sample with its nearest others, from features alone."""

from typing import Any

import numpy as np

from moe_jax import errors
from moe_jax.graphs import dataset, structs

_BLOCK = 1024  # rows of distances at a time


def graph(features: np.ndarray, k: int) -> structs.Graph:
  """Returns the undirected graph of every sample and its k nearest others, by Euclidean distance.

  A sample that is near to many has more than k neighbours; none has fewer.

  Raises:
    errors.InputError: there are no k others.
  """
  num = len(features)
  errors.require(1 <= k < num, f'k={k} must be from 1 to {num - 1}, the number of other samples')
  features = np.asarray(features, np.float32)
  squares = (features**2).sum(1)
  pairs = []
  for begin in range(0, num, _BLOCK):
    rows = np.arange(begin, min(begin + _BLOCK, num))
    distances = squares - 2 * features[rows] @ features.T  # but for a constant per row
    distances[np.arange(len(rows)), rows] = np.inf
    nearest = np.argpartition(distances, k - 1, axis=1)[:, :k]
    pairs.append(np.stack([np.repeat(rows, k), nearest.ravel()], 1))
  return structs.undirected(np.concatenate(pairs), num)


def digits(k: int = 10) -> dataset.Dataset:
  """Returns scikit-learn's 1,797 images of digits, joined by their pixels.

  Raises:
    errors.InputError: scikit-learn is not installed.
  """
  try:
    from sklearn import datasets
  except ImportError as e:
    raise errors.InputError(
      "--graph=digits needs scikit-learn: pip install 'moe_jax[imbalance]'"
    ) from e
  found: Any = datasets.load_digits()
  pixels = (found.data / 16).astype(np.float32)
  return dataset.Dataset(
    'digits',
    graph(pixels, k),
    dataset.unit_rows(pixels),
    found.target.astype(np.int32),
    tuple(map(str, range(10))),
  )
