"""Marked ids without a model: logits that are drawn, a proxy that is tiny."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.inference import processors
from moe_jax.watermark import encode, partition, proxy
from tests import tiny

V = 32
CFG = tiny.make(
  model__num_layers=1,
  model__num_dense_layers=1,
  model__moe__num_experts=0,
  model__moe__num_shared_experts=0,
).model
SCHEMES = {
  kind: partition.Scheme(kind, key=5, message_bits=8, chunk_bits=8, tokens_per_bit=5, window=3)
  for kind in partition.KINDS
}


@functools.cache
def known(kind: str) -> proxy.Proxy | None:
  """A proxy of random weights; kept, so they must be numbers even if first asked for in a trace."""
  if kind != 'balance':
    return None
  with jax.ensure_compile_time_eval():
    return proxy.of(CFG, {'params': tiny.params(CFG)})


def write(scheme, messages, delta, length, seed=0) -> np.ndarray:
  """ids [B, length]: greedy tokens of random logits under the processor."""
  made = encode.processor(scheme, known(scheme.kind), messages, delta)

  def step(ids, count):
    drawn = jax.random.normal(jax.random.fold_in(jax.random.key(seed), count), (len(messages), V))
    logits, _ = made.function(made.constants, drawn, processors.Written(ids, count), ())
    return ids.at[:, count].set(logits.argmax(axis=-1)), None

  ids = jnp.full((len(messages), length), -1, jnp.int32)
  return np.asarray(tiny.jit(lambda i: jax.lax.scan(step, i, jnp.arange(length))[0])(ids))
