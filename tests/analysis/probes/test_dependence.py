import numpy as np
import pytest

from moe_jax.analysis import information
from moe_jax.analysis.probes import (
  dependence,
)


def choices_of(ids, num_experts, k, seed=0):
  """A fixed, random set of k experts per id."""
  rng = np.random.default_rng(seed)
  table = np.stack([rng.permutation(num_experts)[:k] for _ in range(int(ids.max()) + 1)])
  return table[ids]


@pytest.mark.parametrize('k', [1, 3])
def test_a_router_that_looks_at_the_label_only_is_decided_by_it(k):
  rng = np.random.default_rng(0)
  ids = rng.integers(40, size=6000)
  choices = choices_of(ids, 8, k)
  assert information.decided_share(choices, ids, 8) == pytest.approx(1.0, abs=1e-6)
  # Labels that have nothing to do with it, few and many per token.
  for num in (5, 2000):
    other = rng.integers(num, size=6000)
    assert abs(information.decided_share(choices, other, 8)) < 0.03


def test_words_of_an_expert():
  table = np.zeros((6, 2), int)
  table[0] = 50, 50
  table[3] = 40, 0  # only ever expert 0
  table[5] = 10, 90
  table[4] = 0, 3  # too rare for a list
  ids, lift = dependence.words_of(table)
  assert ids[0, :2].tolist() == [3, 0] and ids[0, 2] == -1  # 0 is above expert 0's mean share
  assert ids[1, :1].tolist() == [5] and 4 not in ids
  assert lift[0, 0] == pytest.approx(1 / (100 / 243))
