"""Multi-head latent attention (MLA, DeepSeek-V2, arXiv 2405.04434, section 2.1 and Appendix C).

Keys and values of all heads are made from one latent of width R per token; position enters through
a separate rotated part, whose key is shared by all heads (decoupled RoPE). Two forms of the same
mathematics:

* expanded: keys and values of every head are computed, then it is multi-head attention with keys of
  width Hn + Hr and values of width Hv. For training and prefill, where many queries share the work.
* absorbed: W^UK is applied to the queries and W^UV to the weighted sum, so that scores are taken
  with the latents themselves: multi-query attention with one key of width R + Hr. For decoding: the
  cache holds one latent and one rotated key per token, and nothing is expanded.

The latents are RMS-normed before their up-projections, and the cache holds them normed.

Axis letters are those of `moe_jax.models`: Q is q_lora_rank, R kv_lora_rank.
"""

import functools
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from moe_jax.config import attention_config
from moe_jax.devices import partitioning
from moe_jax.models import layers
from moe_jax.models.attention import multi_head
from moe_jax.models.attention import rope as rope_lib
from moe_jax.models.attention.kernels import latent_decode, sharded

Array = jax.Array

# The norms of the latents have this epsilon in DeepSeek's code whatever that of the layers is.
LATENT_NORM_EPS = 1e-6


class LatentCache(NamedTuple):
  """What decoding keeps of a layer."""

  latent: Array  # [B, S, R], normed
  rope_key: Array  # [B, S, Hr], rotated


class Absorbed(NamedTuple):
  """The up-projection of keys and values as decoding multiplies with it, head by head."""

  uk: Array  # [N, Hn, R], W^UK
  uv: Array  # [N, R, Hv], W^UV


class Queries(NamedTuple):
  """Both parts of the queries."""

  nope: Array  # [B, L, N, Hn]
  rope: Array  # [B, L, N, Hr], rotated


class Projected(NamedTuple):
  """The projections of a layer's input."""

  q: Array  # [B, L, Q] where `q_lora_rank` is set, else [B, L, N, Hn + Hr] or these two in one
  q_up: Array | None  # [Q, N, Hn + Hr], what is left to multiply q with
  kv: Array  # [B, L, R + Hr]


def lay_out(kv_b: Array, cfg: attention_config.AttentionConfig) -> Absorbed:
  """kv_b [..., R, N, Hn + Hv] -> Absorbed; copies it."""
  uk, uv = jnp.split(kv_b, [cfg.mla.qk_nope_head_dim], axis=-1)
  return Absorbed(jnp.moveaxis(uk, -3, -1), jnp.swapaxes(uv, -3, -2))


def restore(laid_out: Absorbed) -> Array:
  """The inverse of `lay_out`."""
  return jnp.concatenate([jnp.moveaxis(laid_out.uk, -1, -3), jnp.swapaxes(laid_out.uv, -3, -2)], -1)


def expanded(
  q: Queries,
  own: LatentCache,
  kv_b: Array,
  ctx: multi_head.Context,
  cfg: attention_config.AttentionConfig,
  attend: Callable[..., Array] = multi_head.attend_own,
) -> Array:
  """Attention of a call's tokens among themselves.

  Where the queries of a row are split over devices, latents and rotated keys are gathered, and
  every device makes the keys and values of its heads (see `sharded`).

  Args:
    q: queries.
    own: latents [B, L, R] and rotated keys [B, L, Hr] of the same tokens.
    kv_b: [R, N, Hn + Hv], W^UK and W^UV side by side.
    ctx: which tokens see each other.
    cfg: sizes, implementation, scale.
    attend: has the arguments of `multi_head.attend_own`.

  Returns:
    [B, L, N, Hv].
  """
  mla = cfg.mla

  def keys_and_values(latent: Array, rope_key: Array, kv_b: Array) -> tuple[Array, Array]:
    kv = jnp.einsum('BSR,RNH->BSNH', latent, partitioning.gather_shards(kv_b, axis=0))
    k_nope, v = jnp.split(kv, [mla.qk_nope_head_dim], axis=-1)
    k_rope = jnp.broadcast_to(rope_key[:, :, None], (*k_nope.shape[:3], rope_key.shape[-1]))
    return jnp.concatenate([k_nope, k_rope], axis=-1), v

  source = sharded.Source(tuple(own), keys_and_values, (kv_b,), (('kv_lora', 'heads', 'head_dim'),))
  return attend(cfg, jnp.concatenate(q, axis=-1), source, ctx, mla.v_head_dim)


def absorbed(
  q: Queries,
  cache: LatentCache,
  up: Absorbed,
  positions: Array,
  cfg: attention_config.AttentionConfig,
) -> Array:
  """The same against a cache, without ever expanding it; scores in float32.

  The scale stays that of the expanded form, not 1 / sqrt(R + Hr). One token per row on a GPU is
  left to a kernel that reads the cache once (`latent_decode`), unless `cfg.impl` is 'reference'.

  Args:
    q: queries.
    cache: latents [B, S, R] and rotated keys [B, S, Hr].
    up: see `lay_out`.
    positions: [B, L] int32, of the queries: they see the slots up to there.
    cfg: implementation, sizes and scale.

  Returns:
    [B, L, N, Hv].
  """
  batch, length, num_heads, _ = q.nope.shape

  # One batch of matrices after the other, the heads of all queries as rows: nothing is transposed.
  def rows(a: Array) -> Array:
    return a.reshape(batch, length * num_heads, -1)

  q_latent = rows(jnp.einsum('BLNH,NHR->BLNR', q.nope, up.uk))
  if length == 1 and latent_decode.serves(cfg.impl, *cache):
    mixed = latent_decode.attend(q_latent, rows(q.rope), *cache, positions[:, 0], cfg.softmax_scale)
    return _values(mixed.reshape(batch, length, num_heads, -1), up)

  def dot(a: Array, b: Array, axis: int) -> Array:
    dims = (((2,), (axis,)), ((0,), (0,)))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)

  scores = dot(q_latent, cache.latent, 2) + dot(rows(q.rope), cache.rope_key, 2)
  scores = scores.reshape(batch, length, num_heads, -1) * cfg.softmax_scale
  mask = multi_head.seen_slots(positions, cache.latent.shape[1])
  scores = jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
  probs = jax.nn.softmax(scores, axis=-1).astype(cache.latent.dtype)
  mixed = dot(rows(probs), cache.latent, 1).astype(cache.latent.dtype)
  return _values(mixed.reshape(batch, length, num_heads, -1), up)


def _values(mixed: Array, up: Absorbed) -> Array:
  """W^UV applied to weighted sums of latents: [B, L, N, R] -> [B, L, N, Hv]."""
  return jnp.einsum('BLNR,NRH->BLNH', mixed, up.uv)


class MLA(nn.Module):
  """Latent attention with its projections, without biases."""

  cfg: attention_config.AttentionConfig
  num_heads: int
  init_std: float
  dtype: jnp.dtype
  param_dtype: jnp.dtype

  attend: ClassVar[Callable[..., Array]] = staticmethod(multi_head.attend_unobserved)

  @nn.compact
  def __call__(
    self, x: Array, ctx: multi_head.Context, cache: LatentCache | None
  ) -> tuple[Array, LatentCache, None]:
    """Applies the layer; arguments and results as of `multi_head.Attention`, no mixture."""
    with jax.named_scope('mla_proj'):
      angle = rope_lib.angles(ctx.positions, self.cfg.mla.qk_rope_head_dim, self.cfg.rope)
      projected = self._project_in(x)
      q, own = self._queries(projected, angle), self._latent(projected.kv, angle)
    with jax.named_scope('mla_core'):
      if cache is None:
        attend = functools.partial(self.attend, self)
        cache, out = own, expanded(q, own, self._kv_b(), ctx, self.cfg, attend)
      else:
        cache = multi_head.write(cache, own, ctx.positions)
        out = absorbed(q, cache, self._absorbed(), ctx.positions, self.cfg)
    return self._project_out(out, x.shape[-1]), cache, None

  # Initial numbers depend on the order in which a layer's parameters are made:
  # q_a, q_b (or q), kv_a, kv_b, o.

  def _project_in(self, x: Array) -> Projected:
    mla, d = self.cfg.mla, x.shape[-1]
    if mla.q_lora_rank:
      q = jnp.einsum('BLD,DQ->BLQ', x, self._weight('q_a', (d, mla.q_lora_rank), 'embed', 'q_lora'))
    else:
      shape = (d, self.num_heads, self.cfg.qk_head_dim)
      q = jnp.einsum('BLD,DNH->BLNH', x, self._weight('q', shape, 'embed', 'heads', 'head_dim'))
    q_up = self._query_up()
    down = self._weight('kv_a', (d, mla.latent_width), 'embed', 'kv_lora')
    return Projected(q, q_up, jnp.einsum('BLD,DR->BLR', x, down))

  def _query_up(self) -> Array | None:
    rank = self.cfg.mla.q_lora_rank
    if not rank:
      return None
    shape = (rank, self.num_heads, self.cfg.qk_head_dim)
    return self._weight('q_b', shape, 'q_lora', 'heads', 'head_dim')

  def _kv_b(self) -> Array:
    mla = self.cfg.mla
    shape = (mla.kv_lora_rank, self.num_heads, mla.qk_nope_head_dim + mla.v_head_dim)
    return self._weight('kv_b', shape, 'kv_lora', 'heads', 'head_dim')

  def _absorbed(self) -> Absorbed:
    return lay_out(self._kv_b(), self.cfg)

  def _project_out(self, out: Array, d: int) -> Array:
    shape = (*out.shape[2:], d)
    return multi_head.project_out(out, self._weight('o', shape, 'heads', 'head_dim', 'embed'))

  def _queries(self, projected: Projected, angle: Array) -> Queries:
    mla, q = self.cfg.mla, projected.q
    if projected.q_up is not None:
      latent = checkpoint_name(self._norm('q_a_norm', q), 'latent')
      q = jnp.einsum('BLQ,QNH->BLNH', latent, projected.q_up)
    q = q.reshape(*q.shape[:2], self.num_heads, self.cfg.qk_head_dim)
    nope, rotated = jnp.split(q, [mla.qk_nope_head_dim], axis=-1)
    return Queries(nope, rope_lib.rotate(rotated, angle, self.cfg.rope))

  def _latent(self, kv: Array, angle: Array) -> LatentCache:
    latent, key = jnp.split(kv, [self.cfg.mla.kv_lora_rank], axis=-1)
    latent = self._norm('kv_a_norm', latent)
    key = rope_lib.rotate(key[:, :, None], angle, self.cfg.rope)[:, :, 0]
    return jax.tree.map(lambda a: checkpoint_name(a, 'latent'), LatentCache(latent, key))

  def _norm(self, name: str, x: Array) -> Array:
    return layers.RMSNorm(LATENT_NORM_EPS, self.dtype, name=name)(x)

  def _weight(self, name: str, shape: tuple[int, ...], *axes: str) -> Array:
    """A parameter in the compute dtype."""
    init = layers.init_weight(self.init_std, *axes)
    return self.param(name, init, shape, self.param_dtype).astype(self.dtype)
