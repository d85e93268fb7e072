import numpy as np

from moe_jax.analysis.anchors import blocking, prompts, reweight
from tests.analysis.anchors import batches


def test_factors_stand_at_the_label_words_of_their_class():
  batch = batches.batch()
  beta = np.random.default_rng(0).normal(size=(2, 2, 4, 3)).astype(np.float32)
  got = np.asarray(reweight.factors(beta, batch))
  want = np.ones((2, 2, 4, 24, 24), np.float32)
  for row in range(2):
    for place, label in zip(batch.places[row], batch.classes[row]):
      want[:, row, :, batch.target[row], place] = np.exp(beta[row, :, :, label])
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_zeros_change_nothing_and_sets_learn_apart():
  cfg, variables = batches.model()
  batch = batches.batch()
  zeros = np.zeros((2, 2, 4, 3), np.float32)
  same = reweight.predict(cfg, variables, batch, zeros, size=2)
  plain = blocking.predict(cfg, variables, batch, size=2)
  np.testing.assert_allclose(same.log_probs, plain.log_probs, rtol=1e-4, atol=1e-5)
  # Four examples of two sets; the same fit with another second set leaves the first as it is.
  rows = [batches.batch(seed=i) for i in range(4)]
  sets = prompts.Batch(*(np.stack(arrays) for arrays in zip(*rows)))
  found = reweight.fit(cfg, variables, sets, rate=0.1, epochs=10)
  assert found.beta.shape == zeros.shape and found.losses.shape == (10, 2)
  assert (found.losses[-1] < found.losses[0]).all()
  other = prompts.Batch(*(a.copy() for a in sets))
  other.answer[:, 1] = (other.answer[:, 1] + 1) % 3
  again = reweight.fit(cfg, variables, other, rate=0.1, epochs=10)
  np.testing.assert_allclose(again.beta[0], found.beta[0], rtol=1e-3, atol=1e-4)
  assert np.abs(again.beta[1] - found.beta[1]).max() > 0.05
