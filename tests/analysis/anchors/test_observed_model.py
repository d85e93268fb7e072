"""A whole model through the observed layers: what it says, and which layer a control is for."""

import jax
import numpy as np

from moe_jax.analysis.anchors import blocking, observed_model
from moe_jax.models import transformer
from tests import tiny
from tests.analysis.anchors import batches


def test_it_says_what_the_model_says():
  cfg, variables = batches.model(moe=True, **tiny.MLA)
  batch = batches.batch()
  positions = np.broadcast_to(np.arange(24, dtype=np.int32), batch.tokens.shape)

  @tiny.jit
  def both(hidden):
    plain = transformer.apply(cfg, variables, batch.tokens, positions, batch.mask.astype(np.int32))
    seen = observed_model.apply(cfg, variables, batch.tokens, batch.mask)
    changed = observed_model.apply(cfg, variables, batch.tokens, batch.mask, {'hidden': hidden})
    return plain.logits, seen, changed

  hidden = blocking.hide_label_words(batch, [1], 2)
  logits, seen, changed = jax.device_get(both(hidden))
  np.testing.assert_allclose(seen.logits[batch.mask], logits[batch.mask], rtol=1e-4, atol=1e-4)
  assert seen.probs.shape == (2, 2, 4, 24, 24) and seen.expert_idx.shape == (1, 2, 24, 2)
  assert seen.queries.shape == seen.keys.shape == (2, 2, 24, 4, 8)
  # The second layer alone is changed: there label words see themselves alone, others what they saw.
  np.testing.assert_allclose(changed.probs[0], seen.probs[0], rtol=1e-6)
  place = batch.places[0, 1]
  np.testing.assert_allclose(changed.probs[1, 0, :, place, place], 1.0, rtol=1e-6)
  assert (seen.probs[1, 0, :, place, place] < 0.99).all()
  np.testing.assert_allclose(
    changed.probs[1, 0, :, place + 1], seen.probs[1, 0, :, place + 1], rtol=1e-4, atol=1e-6
  )
