import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.analysis.anchors import observed_model, saliency
from tests.analysis.anchors import batches


def test_flow_is_the_change_of_the_loss():
  """Finite differences: one probability, in all heads of a layer, is made larger and smaller."""
  cfg, variables = batches.model()
  batch = batches.batch()
  found = np.asarray(saliency.flow(cfg, variables, batch))
  assert found.shape == (2, 2, 24, 24) and (found >= 0).all()
  assert not np.diagonal(found, axis1=2, axis2=3).any()

  @jax.jit
  def losses(factors):
    out = observed_model.apply(cfg, variables, batch.tokens, batch.mask, {'factors': factors})
    return saliency.label_losses(out.logits, batch)

  ones = np.ones((2, 2, 1, 24, 24), np.float32)
  label, last, step = batch.places[0, 1], batch.target[1], 0.03
  places = [(0, 0, label, 3), (1, 1, last, batch.places[1, 2]), (0, 1, last, 0), (1, 0, label, 2)]
  for layer, row, i, j in places:
    change = ones.copy()
    change[layer, row, 0, i, j] = step
    change -= ones * (change == 1)
    slope = (losses(ones + change)[row] - losses(ones - change)[row]) / (2 * step)
    np.testing.assert_allclose(found[layer, row, i, j], abs(slope), rtol=2e-2, atol=2e-5)
  # What reaches label words in the last layer goes nowhere.
  assert not found[1, 0, label].any() and found[1, 0, batch.target[0]].any()
  per_head = np.asarray(saliency.flow(cfg, variables, batch, True))
  assert (per_head >= found * (1 - 1e-4) - 1e-6).all() and (per_head > found + 1e-5).any()


def test_the_loss_is_among_the_label_words():
  batch = batches.batch()
  logits = jnp.asarray(np.random.default_rng(1).normal(size=(2, 24, 32)), jnp.float32)
  got = saliency.label_losses(logits, batch)
  for row in range(2):
    three = np.asarray(logits)[row, batch.target[row], batches.LABEL_IDS]
    want = np.log(np.exp(three).sum()) - three[batch.answer[row]]
    np.testing.assert_allclose(got[row], want, rtol=1e-5)


def test_means_have_the_right_pairs():
  """Sums by loops, and the denominators of the sheet: sum p_k, C, q (q + 1) / 2 less both."""
  batch = batches.batch()
  flow = np.random.default_rng(2).random((2, 2, 24, 24)).astype(np.float32)
  flow *= 1 - np.eye(24)
  got = saliency.summarise(jnp.asarray(flow), batch.places, batch.target)
  for row in range(2):
    labels, q = batch.places[row].tolist(), int(batch.target[row])
    wp = sum(flow[:, row, p, j] for p in labels for j in range(p)) / sum(labels)
    pq = sum(flow[:, row, q, p] for p in labels) / len(labels)
    all_pairs = sum(flow[:, row, i, j] for i in range(q + 1) for j in range(i))
    rest = q * (q + 1) // 2 - sum(labels) - len(labels)
    ww = (all_pairs - wp * sum(labels) - pq * len(labels)) / rest
    for mean, want in zip(got, (wp, pq, ww)):
      np.testing.assert_allclose(mean[:, row], want, rtol=1e-4)
