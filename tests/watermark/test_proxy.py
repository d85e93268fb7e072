import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.models import transformer
from moe_jax.watermark import proxy
from tests import tiny
from tests.watermark import writing


def test_probabilities_are_those_of_the_model_on_the_window_alone_in_float32():
  cfg = dataclasses.replace(writing.CFG, dtype='bfloat16')
  found = proxy.of(cfg, {'params': tiny.params(writing.CFG)})
  assert found.cfg == writing.CFG
  before = np.random.default_rng(0).integers(writing.V, size=(2, 5)).astype(np.int32)
  got = tiny.jit(proxy.next_probs, static_argnums=0)(found.cfg, found.weights, before)
  at = jnp.broadcast_to(jnp.arange(5), before.shape)
  apply = tiny.jit(transformer.Transformer(writing.CFG).apply)
  logits = apply({'params': tiny.params(writing.CFG)}, before, at, jnp.ones_like(before)).logits
  np.testing.assert_allclose(got, jax.nn.softmax(logits[:, -1]), rtol=1e-4)
