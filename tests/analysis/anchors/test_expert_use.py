import numpy as np

from moe_jax.analysis.anchors import blocking, expert_use, observed_model, prompts
from tests import tiny
from tests.analysis.anchors import batches


def test_shares_are_counts():
  cfg, variables = batches.model(moe=True)
  batch = batches.batch(rows=3)
  got = expert_use.shares(cfg, variables, batch, size=2)
  seen = tiny.jit(lambda: observed_model.apply(cfg, variables, batch.tokens, batch.mask))()
  chosen = np.asarray(seen.expert_idx)[0]  # [B, L, K]
  for kind in range(3):
    here = (batch.kinds == kind) & (np.arange(24) < batch.start[:, None])
    want = np.bincount(chosen[here].ravel(), minlength=8) / chosen[here].size
    np.testing.assert_allclose(got[kind, 0], want, rtol=1e-5)


def test_separation_and_choice():
  shares = np.zeros((3, 2, 4))
  shares[prompts.LABEL] = [[0.5, 0.5, 0, 0], [0.25] * 4]
  shares[prompts.TEXT] = [[0, 0.1, 0.2, 0.7], [0.25] * 4]
  np.testing.assert_allclose(expert_use.separation(shares), [0.9, 0.0])
  rng = np.random.default_rng(0)
  assert expert_use.chosen(shares, 'label', 2, rng)[0].tolist() == [0, 1]
  assert expert_use.chosen(shares, 'text', 1, rng)[0].tolist() == [3]
  assert [len(set(ids.tolist())) for ids in expert_use.chosen(shares, 'random', 3, rng)] == [3, 3]


def test_silenced_experts_give_nothing():
  cfg, variables = batches.model(moe=True)
  batch = batches.batch()
  out = expert_use.silenced(variables, [np.array([1, 4])])
  down = np.asarray(out['params']['moe_layers']['moe']['down'])
  before = np.asarray(variables['params']['moe_layers']['moe']['down'])
  assert not down[0, [1, 4]].any()
  kept = [0, 2, 3, 5, 6, 7]
  np.testing.assert_array_equal(down[0, kept], before[0, kept])
  whole, cut = (blocking.predict(cfg, v, batch, size=2) for v in (variables, out))
  assert np.abs(whole.log_probs - cut.log_probs).max() > 1e-3
