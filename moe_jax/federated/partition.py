"""Long-tailed class sizes, and how the samples are split over clients (sheet of RedGrape, data)."""

from typing import NamedTuple

import numpy as np

from moe_jax import errors
from moe_jax.federated import settings as settings_lib


class Images(NamedTuple):
  """A data set: pixels as bytes [rows, height, width, channels] and class numbers [rows]."""

  train_x: np.ndarray
  train_y: np.ndarray
  test_x: np.ndarray
  test_y: np.ndarray


class Clients(NamedTuple):
  """What each client has, filled up with zeros to the longest."""

  x: np.ndarray  # [clients, rows, height, width, channels], bytes
  y: np.ndarray  # [clients, rows], int32
  real: np.ndarray  # [clients, rows], False where filled up


class Federation(NamedTuple):
  """The data of one seed."""

  clients: Clients
  test_x: np.ndarray
  test_y: np.ndarray
  server_x: np.ndarray  # [classes * server_samples, height, width, channels], by class
  server_y: np.ndarray


def class_sizes(available: np.ndarray, imbalance: float) -> np.ndarray:
  """How many samples each class keeps: int(N_c (1 / imbalance)^(c / (classes - 1))).

  Args:
    available: samples of each class, [classes].
    imbalance: what the first class has for one of the last.

  Raises:
    errors.InputError: a class would keep none.
  """
  powers = np.arange(len(available)) / (len(available) - 1)
  # A whole number may come out of the division a rounding error too small.
  sizes = (available / imbalance**powers * (1 + 1e-12)).astype(int)
  with np.errstate(over='ignore'):  # of the first of many classes; the last ones are the limit
    most = int(np.min(available[1:] ** (1 / powers[1:])) * (1 + 1e-12))
  errors.require(
    bool(sizes.min() > 0),
    f'--imbalance={imbalance:g} leaves class {int(sizes.argmin())} without a sample; it may be '
    f'{most} at most here',
  )
  return sizes


def split(sizes: np.ndarray, clients: int, alpha: float, rng: np.random.Generator) -> np.ndarray:
  """How many samples of each class each client gets, [clients, classes].

  All clients get equally many samples, the last one also what does not divide. Each in turn draws
  shares from Dirichlet(alpha * global shares) and takes that many of what is left of each class;
  where a class runs short, the rest comes from the other classes by what is left of them.

  Raises:
    errors.InputError: there are fewer samples than clients, or alpha is beyond what can be drawn.
  """
  total = int(sizes.sum())
  errors.require(
    total >= clients, f'--clients={clients} must be at most {total}, the samples of the long tail'
  )
  left, rows = sizes.copy(), []
  for client in range(clients):
    size = total // clients if client < clients - 1 else int(left.sum())
    taken = np.minimum(_rounded(_shares(alpha, sizes, rng), size), left)
    while short := size - int(taken.sum()):  # each pass finds room for a sample at least
      room = left - taken
      taken += np.minimum(_rounded(room / room.sum(), short), room)
    left -= taken
    rows.append(taken)
  return np.stack(rows)


def _shares(alpha: float, sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Draws from Dirichlet(alpha * global shares), [classes]."""
  with np.errstate(over='ignore'):
    concentration = alpha * sizes / sizes.sum()
  known = bool(np.isfinite(concentration).all() and concentration.any())
  found = rng.dirichlet(concentration) if known else concentration
  errors.require(
    known and bool(np.isfinite(found).all()),
    f'--alpha={alpha:g} gives no shares that can be drawn; take one from 1e-6, a class or two for '
    'each client, to 1e6, the shares of the whole',
  )
  return found


def _rounded(shares: np.ndarray, total: int) -> np.ndarray:
  """Whole numbers near shares * total whose sum is total: the largest remainders are rounded up."""
  exact = shares * total
  whole = np.floor(exact).astype(int)
  whole[np.argsort(whole - exact, kind='stable')[: total - whole.sum()]] += 1
  return whole


def federate(images: Images, settings: settings_lib.Settings, seed: int) -> Federation:
  """Long tail, clients' and server's samples of one seed; the method changes none but the server's.

  Raises:
    errors.InputError: there are too few samples.
  """
  rng = np.random.default_rng((seed, 1))
  pools = [
    rng.permutation(np.flatnonzero(images.train_y == c)) for c in range(settings.data.classes)
  ]
  sizes = class_sizes(np.array([len(pool) for pool in pools]), settings.imbalance)
  counts = split(sizes, settings.clients, settings.alpha, rng)
  ends = counts.cumsum(axis=0)
  parts = [
    np.concatenate([pool[end - n : end] for pool, end, n in zip(pools, ends[k], counts[k])])
    for k in range(settings.clients)
  ]
  server = _server_rows(pools, settings)
  return Federation(
    _filled(images, parts),
    images.test_x,
    images.test_y,
    images.train_x[server],
    images.train_y[server],
  )


def _server_rows(pools: list[np.ndarray], settings: settings_lib.Settings) -> np.ndarray:
  """The last samples of each class, which clients have only where the tail leaves too few."""
  if settings.rules.server != 'ratio':
    return np.zeros(0, int)
  least = min(map(len, pools))
  errors.require(
    settings.server_samples <= least,
    f'--server_samples={settings.server_samples} must be at most {least}, the samples of a class',
  )
  return np.concatenate([pool[-settings.server_samples :] for pool in pools])


def _filled(images: Images, parts: list[np.ndarray]) -> Clients:
  longest = max(map(len, parts))
  real = np.stack([np.arange(longest) < len(part) for part in parts])
  rows = np.stack([np.pad(part, (0, longest - len(part))) for part in parts])
  x, y = images.train_x[rows], images.train_y[rows]
  x[~real], y[~real] = 0, 0
  return Clients(x, y, real)
