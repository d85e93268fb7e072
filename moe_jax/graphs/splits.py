"""Which nodes are labelled, for validation and for the test; a pure function of a seed.

The nodes are shuffled and dealt out class by class, as by ReNode's authors: the split that comes
with Planetoid's files is not used, and results are not comparable with papers that use it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moe_jax import errors

PER_CLASS, VALID_PER_CLASS = 20, 30


class Split(NamedTuple):
  """Masks [nodes] bool that do not meet; a node with label -1 is in none."""

  train: np.ndarray
  valid: np.ndarray
  test: np.ndarray


def balanced(
  labels: np.ndarray, seed: int, per_class: int = PER_CLASS, valid_per_class: int = VALID_PER_CLASS
) -> Split:
  """Returns a split with as many labelled nodes in every class (topology imbalance alone).

  Raises:
    errors.InputError: a class is too small to leave a node for the test.
  """
  return _deal(labels, seed, [per_class] * (labels.max() + 1), valid_per_class)


def stepped(
  labels: np.ndarray,
  seed: int,
  ratio: float,
  label_share: float = 0.01,
  heads: Sequence[int] | None = None,
  valid_per_class: int = VALID_PER_CLASS,
) -> Split:
  """Returns a split whose head classes have `ratio` times the labels of the others.

  Args:
    labels: [nodes] classes, -1 for unknown ones.
    seed: of the shuffle.
    ratio: labels of a head class over those of a tail class.
    label_share: share of all nodes that is labelled; classes get whole numbers, rounded down.
    heads: head classes; the first half, if None.
    valid_per_class: validation nodes, in tail classes too.

  Raises:
    errors.InputError: a tail class would have no label; a class is too small.
  """
  num_classes = labels.max() + 1
  heads = range(num_classes // 2) if heads is None else heads
  num_heads = len(set(heads))
  tail = int(len(labels) * label_share / (num_classes - num_heads + num_heads * ratio))
  errors.require(
    tail >= 1,
    f'label_share={label_share} of {len(labels)} nodes leaves a tail class without a label at '
    f'ratio {ratio}; raise label_share',
  )
  sizes = [int(tail * ratio) if c in heads else tail for c in range(num_classes)]
  return _deal(labels, seed, sizes, valid_per_class)


def _deal(labels: np.ndarray, seed: int, sizes: Sequence[int], valid_per_class: int) -> Split:
  order = np.random.default_rng(seed).permutation(len(labels))
  train, valid = np.zeros((2, len(labels)), bool)
  for c, size in enumerate(sizes):
    members = order[labels[order] == c]
    need = size + valid_per_class
    errors.require(
      len(members) > need,
      f'class {c} has {len(members)} nodes, which must be more than the {size} labelled and '
      f'{valid_per_class} for validation; ask for fewer',
    )
    train[members[:size]] = True
    valid[members[size:need]] = True
  return Split(train, valid, ~train & ~valid & (labels >= 0))
