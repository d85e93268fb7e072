import numpy as np
import pytest

from moe_jax import errors
from moe_jax.graphs import splits

LABELS = np.random.default_rng(0).permutation(np.repeat([-1, 0, 1, 2, 3], [5, 99, 100, 100, 101]))


def sizes(mask):
  return np.bincount(LABELS[mask], minlength=4).tolist()


def test_balanced():
  found = splits.balanced(LABELS, 0)
  assert sizes(found.train) == [20] * 4 and sizes(found.valid) == [30] * 4
  assert sizes(found.test) == [49, 50, 50, 51]
  assert (sum(mask.astype(int) for mask in found) == (LABELS >= 0)).all()


def test_a_split_is_its_seeds():
  first, again, other = (splits.balanced(LABELS, seed, 10, 10) for seed in (3, 3, 4))
  assert (first.train == again.train).all() and (first.test == again.test).all()
  assert (first.train != other.train).any()


def test_stepped_by_hand():
  # 405 nodes, 10 % labelled: int(40.5 / (2 + 2 * 5)) = 3 per tail class, 15 per head class.
  found = splits.stepped(LABELS, 0, ratio=5, label_share=0.1)
  assert sizes(found.train) == [15, 15, 3, 3] and sizes(found.valid) == [30] * 4
  # One head: int(40.5 / (3 + 5)) = 5.
  found = splits.stepped(LABELS, 0, ratio=5, label_share=0.1, heads=[2])
  assert sizes(found.train) == [5, 5, 25, 5]


def test_too_few_nodes_are_refused():
  with pytest.raises(
    errors.InputError, match='class 0 has 99 nodes, which must be more than the 70'
  ):
    splits.balanced(LABELS, 0, 70)
  with pytest.raises(errors.InputError, match='label_share=0.01 of 405 nodes leaves a tail class'):
    splits.stepped(LABELS, 0, ratio=10)
