import numpy as np
import pytest

from moe_jax.analysis import information


def test_half_of_the_tokens_decided():
  rng = np.random.default_rng(0)
  ids = rng.integers(8, size=20_000)
  choices = np.where(rng.random(20_000) < 0.5, ids, rng.integers(8, size=20_000))[:, None]
  # Half of the tokens follow the id: p = 1/2 + 1/16 on its own expert, 1/16 on each other one.
  p = np.array([0.5625] + 7 * [0.0625])
  want = 1 - (-(p * np.log(p)).sum()) / np.log(8)
  assert information.decided_share(choices, ids, 8) == pytest.approx(want, abs=0.01)


def test_all_experts_leave_nothing_to_decide():
  choices = np.tile(np.arange(4), (100, 1))
  assert np.isnan(information.decided_share(choices, np.arange(100) % 5, 4))
