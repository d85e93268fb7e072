"""What the tests of models.attention.kernels share."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.devices import hardware
from moe_jax.models.attention import kernels as kernels_lib
from moe_jax.models.attention.kernels import (
  splash,
  tokamax,
)
from tests import tiny

ATTENDS = kernels_lib.ATTENDS | {
  'splash': functools.partial(splash.attend, interpret=True),
  'tokamax': functools.partial(tokamax.attend, kernels=('xla',)),
  'tokamax_chunked': functools.partial(tokamax.attend, kernels=('xla_chunked',)),
}
L = 150  # no multiple of the blocks below
# One document; three and padding inside and across blocks; padding only; a document of one token.
LENGTHS = ((150,), (40, 70, 20), (), (1, 33, 64, 52))
# Both sides multiply float32 numbers of order 1 and add up to 150 of them.
CLOSE = dict(rtol=1e-4, atol=1e-5)


class Shape(NamedTuple):
  heads: int
  kv_heads: int
  head_dim: int
  v_head_dim: int
  scale: float


SHAPES = {
  'MHA': Shape(2, 2, 8, 8, 8**-0.5),
  'GQA': Shape(4, 2, 8, 8, 0.5),
  'MQA': Shape(3, 1, 8, 8, 0.2),
  'MLA': Shape(2, 2, 24, 16, 0.3),
}


def batch(lengths=LENGTHS, length=L):
  """(positions, segment_ids)."""
  rows = [tiny.row(entry, length) for entry in lengths]
  return tuple(
    jnp.asarray(np.stack([row[key] for row in rows])) for key in ('positions', 'segment_ids')
  )


def operands(shape, dtype='float32', rows=4, length=L, seed=0):
  """q, k, v and a cotangent of the outputs."""
  rng = np.random.default_rng(seed)

  def draw(n, h):
    return jnp.asarray(rng.normal(size=(rows, length, n, h)), dtype)

  n, kv, h, hv, _ = shape
  return draw(n, h), draw(kv, h), draw(kv, hv), draw(n, hv)


@functools.cache
def compiled(name, scale):
  """(q, k, v, d_out, positions, segment_ids) -> (out, the gradients of q, k and v)."""

  def run(q, k, v, d_out, positions, segment_ids):
    def fn(q, k, v):
      return ATTENDS[name](q, k, v, positions, segment_ids, scale)

    out, pullback = jax.vjp(fn, q, k, v)
    return out, pullback(jnp.where(segment_ids[..., None, None] > 0, d_out, 0))

  return tiny.jit(run)


def written_out(q, k, v, d_out, segment_ids, scale):
  """The same in numpy; earlier in the row is earlier in the text. Rows of padding are 0."""
  q, k, v, d_out = (np.asarray(a, np.float64) for a in (q, k, v, d_out))
  ids = np.asarray(segment_ids)
  out = np.zeros_like(d_out)
  d_q, d_k, d_v = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
  group = q.shape[2] // k.shape[2]
  for b, n in np.ndindex(len(q), q.shape[2]):
    m = n // group
    seen = np.tril(ids[b][:, None] == ids[b]) & (ids[b] > 0)
    weight = np.where(seen, np.exp(q[b, :, n] @ k[b, :, m].T * scale), 0)
    prob = weight / np.maximum(weight.sum(-1, keepdims=True), 1e-30)
    out[b, :, n] = prob @ v[b, :, m]
    d_prob = d_out[b, :, n] @ v[b, :, m].T
    d_score = prob * (d_prob - (prob * d_prob).sum(-1, keepdims=True)) * scale
    d_q[b, :, n] = d_score @ k[b, :, m]
    d_k[b, :, m] += d_score.T @ q[b, :, n]
    d_v[b, :, m] += prob.T @ d_out[b, :, n]
  return out, (d_q, d_k, d_v)


# choose


def choose(name='auto', dims=(64, 64), length=256, dtype='bfloat16'):
  head_dim, v_head_dim = dims
  return kernels_lib.choose(
    name, head_dim=head_dim, v_head_dim=v_head_dim, length=length, dtype=dtype
  )


def on(monkeypatch, platform, capability=()):
  monkeypatch.setattr(hardware, 'platform', lambda: platform)
  monkeypatch.setattr(hardware, 'compute_capability', lambda: capability)
