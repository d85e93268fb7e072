import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.analysis.anchors import blocking, compress, prompts
from moe_jax.inference import cached_model
from moe_jax.models.attention import rope
from tests import tiny
from tests.analysis.anchors import batches


@pytest.mark.parametrize('kind', ['gqa', pytest.param('mla', marks=pytest.mark.slow)])
def test_a_compressed_cache_is_a_mask(kind):
  """All kept is the full model; some kept is the model whose query does not see the others."""
  cfg, variables = batches.model(**({'moe': True} | tiny.MLA if kind == 'mla' else {}))
  batch = batches.batch(rows=4)
  weights = cached_model.unstack(cfg, variables)

  def ask(kept, **options):
    return compress.predict(cfg, weights, batch, kept, size=4, **options).log_probs

  everything = compress.demonstrations(batch)
  whole = blocking.predict(cfg, variables, batch, size=4).log_probs
  np.testing.assert_allclose(ask(everything), whole, rtol=1e-3, atol=1e-4)
  kept = compress.anchors(batch)
  kept[1, batch.places[1, 0]] = False  # rows that keep another number
  in_query = ~everything[:, :, None]
  gone = np.broadcast_to(in_query & (everything & ~kept)[:, None], (2, 4, 24, 24))
  masked = blocking.predict(cfg, variables, batch, size=4, hidden=lambda rows: gone[:, rows])
  np.testing.assert_allclose(ask(kept), masked.log_probs, rtol=1e-3, atol=1e-4)
  assert np.abs(masked.log_probs - whole).max() > 0.01
  # Behind the kept entries the distances are others.
  assert np.abs(ask(kept, keep_distances=False) - masked.log_probs).max() > 0.003


def test_turned_keys_are_those_of_other_positions():
  cfg = tiny.make().model.attention.rope
  k = np.random.default_rng(0).normal(size=(2, 5, 2, 8)).astype(np.float32)
  positions, delta = jnp.asarray([[0, 1, 2, 3, 4], [3, 4, 6, 8, 9]]), jnp.asarray([0, -3])
  at, moved = (
    rope.rotate(k, rope.angles(p, 8, cfg), cfg) for p in (positions, positions + delta[:, None])
  )
  np.testing.assert_allclose(compress.turned(at, delta, cfg), moved, rtol=1e-4, atol=1e-5)
  shared = compress.turned(at[:, :, 0], delta, cfg)  # a key of all heads, as latent attention has
  np.testing.assert_allclose(shared, moved[:, :, 0], rtol=1e-4, atol=1e-5)


def test_what_is_kept():
  batch = batches.batch(rows=8)
  here, kept = compress.demonstrations(batch), compress.anchors(batch)
  assert (here.sum(axis=1) == batch.start).all()
  assert not (kept & (batch.kinds == prompts.TEXT)).any() and not (kept & ~here).any()
  assert (kept.sum(axis=1) == 1 + 4 * batches.CLASSES).all()
  assert (compress.labels_only(batch).sum(axis=1) == batches.CLASSES).all()
  drawn = compress.random_words(batch, np.random.default_rng(0))
  assert (drawn.sum(axis=1) == kept.sum(axis=1)).all()
  assert not (drawn & compress.labels_only(batch)).any() and not (drawn & ~here).any()
  assert ((drawn & (batch.kinds == prompts.TEXT)).sum(axis=1) == batches.CLASSES).all()


def test_prompts_without_texts():
  batch = batches.batch()
  texts = compress.demonstrations(batch) & (batch.kinds == prompts.TEXT)
  found = compress.without(batch, texts)
  for row in range(2):
    want = [
      t for t, gone, real in zip(batch.tokens[row], texts[row], batch.mask[row]) if real > gone
    ]
    assert found.tokens[row][found.mask[row]].tolist() == want
    ids = batches.LABEL_IDS[batch.classes[row]].tolist()
    assert found.tokens[row][found.places[row]].tolist() == ids
    assert found.target[row] == len(want) - 1
    query = batch.tokens[row][batch.start[row] : batch.target[row] + 1].tolist()
    assert found.tokens[row][found.start[row] : found.target[row] + 1].tolist() == query
  assert (found.kinds[~found.mask] == -1).all()


def test_queries_alone():
  batch = batches.batch()
  found = compress.query_tokens(batch)
  assert found.shape == (2, 4)
  for row in range(2):
    want = batch.tokens[row][batch.start[row] : batch.target[row] + 1].tolist()
    assert found[row][: len(want)].tolist() == want
