import numpy as np

from moe_jax.analysis.anchors import blocking, prompts
from tests.analysis.anchors import batches


def test_which_keys_are_hidden():
  batch = batches.batch()
  hidden = blocking.hide_label_words(batch, [0, 2], 3)
  assert hidden.shape == (3, 2, 24, 24) and not hidden[1].any()
  np.testing.assert_array_equal(hidden[0], hidden[2])
  for row in range(2):
    for i in range(24):
      want = np.arange(24) < (i if i in batch.places[row] else 0)
      np.testing.assert_array_equal(hidden[0, row, i], want)


def test_random_words_are_others_and_as_many():
  batch = batches.batch(rows=40)
  hidden = blocking.hide_random_words(batch, [0, 1], 2, np.random.default_rng(0))
  chosen = hidden.any(axis=-1)  # [X, B, L], of which the begin token never is
  assert (chosen.sum(axis=-1) == batches.CLASSES).all()
  assert not (chosen & (batch.kinds == prompts.LABEL)).any() and not chosen[..., 0].any()
  assert not (chosen & (np.arange(24) >= batch.target[:, None])).any()  # the last format token
  assert (chosen[0] != chosen[1]).any(axis=1).mean() > 0.9
  # Every other token is drawn some time.
  assert ((chosen.any(axis=0).any(axis=0)) == blocking.other_words(batch).any(axis=0)).all()


def test_fewer_words_than_wanted_are_all_taken():
  allowed = np.array([[False, True, False, True]])
  places = blocking.draw(allowed, 3, np.random.default_rng(0))
  assert sorted(places[0].tolist()) == [-1, 1, 3]
  assert blocking.isolated(places, 4).any(axis=-1).tolist() == [[False, True, False, True]]


def test_loyalties():
  whole = blocking.Predictions(np.array([0, 1]), np.array([range(5), range(5)]), np.zeros((2, 3)))
  other = whole._replace(label=np.array([0, 2]), words=np.array([[4, 3, 9, 1, 8], range(5, 10)]))
  assert blocking.label_loyalty(other, whole).tolist() == [1.0, 0.0]
  np.testing.assert_allclose(blocking.word_loyalty(other, whole), [3 / 7, 0.0])
  assert blocking.word_loyalty(whole, whole).tolist() == [1.0, 1.0]


def test_predictions_by_hand():
  batch = batches.batch()
  logits = np.random.default_rng(3).normal(size=(2, 24, 32)).astype(np.float32)
  found = blocking.predictions_of(logits, batch)
  for row in range(2):
    last = logits[row, batch.target[row]]
    assert found.label[row] == last[batches.LABEL_IDS].argmax()
    assert found.words[row].tolist() == np.argsort(-last)[:5].tolist()
    np.testing.assert_allclose(np.exp(found.log_probs[row]).sum(), 1.0, rtol=1e-5)
