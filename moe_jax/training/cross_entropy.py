"""Next-token cross-entropy and z-loss: pure functions of arrays.

`next_token` is the readable reference, on logits. `head_loss` is what training and evaluation use:
it makes the logits itself, a tile of tokens at a time, so that no device ever holds them all.
`token_log_probs` does so for losses that weigh tokens by more than whether they are targets.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.devices import partitioning

Array = jax.Array


def next_token(logits: Array, targets: Array) -> tuple[Array, Array]:
  """Sums over the real targets, so that micro-batches and devices add up.

  Args:
    logits: [B, L, V] float32.
    targets: [B, L] int32; -1 where there is nothing to predict.

  Returns:
    (cross-entropy in nats, squared log-partition (z-loss, PaLM section 5)), both [] float32.
  """
  real = targets >= 0
  log_z = jax.nn.logsumexp(logits, axis=-1)
  label = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
  cross_entropy = jnp.where(real, log_z - label, 0.0).sum()
  return cross_entropy, jnp.where(real, log_z * log_z, 0.0).sum()


class HeadLoss(NamedTuple):
  """Sums over the real targets of the whole batch, each [] float32."""

  total: Array  # cross_entropy + z_weight * z; the only one with a gradient
  cross_entropy: Array  # nats
  z: Array  # squared log-partition


def head_loss(x: Array, head: Array, targets: Array, *, chunk: int, z_weight: float) -> HeadLoss:
  """`next_token` of x @ head, with at most `chunk` tokens' logits at once on a device.

  Gradients are formed in the forward pass while a tile's logits are at hand, so that they are never
  computed twice: three products of T D V instead of four. They are those of `total` alone;
  `cross_entropy` and `z` carry none. A call that is not differentiated computes none.

  Under a mesh every device takes its own rows and tokens (act_batch, act_len) against its own part
  of the vocabulary (`tensor`): the log-partition is a maximum and a sum over `tensor`, the label's
  logit a sum to which one device contributes. The head is gathered over the fsdp axes in the dtype
  of x, its gradient is scattered back over them as a sum in float32.

  Args:
    x: [B, L, D] normed hidden states, in the compute dtype.
    head: [D, V] the parameter; cast to the dtype of x, products accumulate in float32.
    targets: [B, L] int32; -1 where there is nothing to predict.
    chunk: tokens per device whose logits [chunk, V] exist at once.
    z_weight: of the z-loss in `total`.
  """
  total, cross_entropy, z = _with_gradients()(chunk, z_weight, x, head, targets)
  return HeadLoss(total, *jax.lax.stop_gradient((cross_entropy, z)))


@functools.cache
def _with_gradients() -> Callable[..., tuple[Array, Array, Array]]:
  """(chunk, z_weight, x, head, targets) -> (total, cross-entropy, z)."""

  def values(chunk, z_weight, x, head, targets):
    return _over_shards(False, chunk, z_weight)(x, head, targets)

  def forward(chunk, z_weight, x, head, targets):
    sums, d_x, d_head = _over_shards(True, chunk, z_weight)(x, head, targets)
    return sums, (d_x, d_head, jnp.empty((0,), head.dtype))

  def backward(chunk, z_weight, residuals, d_sums):
    d_x, d_head, like = residuals
    scale = d_sums[0]
    return (d_x * scale).astype(d_x.dtype), (d_head * scale).astype(like.dtype), None

  fn = jax.custom_vjp(values, nondiff_argnums=(0, 1))
  fn.defvjp(forward, backward)
  return fn


def token_log_probs(
  x: Array, head: Array, targets: Array, *, chunk: int, temperature: float = 1.0
) -> Array:
  """Log-probabilities of the targets, [B, L] float32 in nats; 0 where there is none.

  As `head_loss`, with any loss of them behind it; so its gradients make each tile's logits a second
  time, four products of T D V.

  Args:
    x: [B, L, D] normed hidden states, in the compute dtype.
    head: [D, V] the parameter; cast to the dtype of x, products accumulate in float32.
    targets: [B, L] int32; -1 where there is nothing to predict.
    chunk: tokens per device whose logits [chunk, V] exist at once.
    temperature: that the logits, in float32, are divided by.
  """
  return _log_probs()(chunk, temperature, x, head, targets)


@functools.cache
def _log_probs() -> Callable[..., Array]:
  """(chunk, temperature, x, head, targets) -> [B, L]."""
  tokens, head_axes = ('act_batch', 'act_len'), ('embed', 'vocab')
  operands = ((*tokens, None), head_axes, tokens)

  def values(chunk, temperature, x, head, targets):
    fn = functools.partial(_log_prob_shard, chunk, temperature)
    return partitioning.per_shard(fn, operands, tokens)(x, head, targets)

  def forward(chunk, temperature, x, head, targets):
    return values(chunk, temperature, x, head, targets), (x, head, targets)

  def backward(chunk, temperature, residuals, d_log_probs):
    x, head, targets = residuals
    fn = functools.partial(_log_prob_gradient_shard, chunk, temperature)
    over_shards = partitioning.per_shard(fn, (*operands, tokens), operands[:2])
    d_x, d_head = over_shards(x, head, targets, d_log_probs)
    return d_x.astype(x.dtype), d_head.astype(head.dtype), None

  fn = jax.custom_vjp(values, nondiff_argnums=(0, 1))
  fn.defvjp(forward, backward)
  return fn


def _log_prob_shard(chunk: int, temperature: float, x: Array, head: Array, targets: Array) -> Array:
  """One device's part of `token_log_probs`."""
  weight = partitioning.gather_shards(head.astype(x.dtype), axis=0)
  tiles, num_tokens = _tiles(x, targets, chunk)
  found = jax.lax.map(lambda tile: _softmax(weight, *tile, temperature=temperature).log_prob, tiles)
  return found.reshape(-1)[:num_tokens].reshape(targets.shape)


def _log_prob_gradient_shard(
  chunk: int, temperature: float, x: Array, head: Array, targets: Array, d_log_probs: Array
) -> tuple[Array, Array]:
  """One device's part of the gradients of `token_log_probs` in x and head."""
  weight = partitioning.gather_shards(head.astype(x.dtype), axis=0)
  (xs, labels), num_tokens = _tiles(x, targets, chunk)
  fill = labels.size - num_tokens
  slopes = jnp.pad(d_log_probs.reshape(-1), (0, fill)).reshape(labels.shape)

  def tile(d_weight, operands):
    x, targets, slope = operands
    found = _softmax(weight, x, targets, temperature)
    probs = found.weights / found.total[:, None]
    slope = slope[:, None] / temperature
    d_logits = jnp.where(found.real[:, None], slope * (found.hit - probs), 0.0)
    d_x, d_weight_here = _head_gradients(x, weight, d_logits)
    return d_weight + d_weight_here, d_x.astype(x.dtype)

  start = jnp.zeros(weight.shape, jnp.float32)
  d_weight, d_x = jax.lax.scan(tile, start, (xs, labels, slopes))
  d_x = d_x.reshape(-1, x.shape[-1])[:num_tokens].reshape(x.shape)
  return d_x, _reduced(d_weight)


# The custom VJP is around the map over devices, not inside, so that each reduction is written once,
# here, and none is left to the transposition of the map.
def _over_shards(gradients: bool, chunk: int, z_weight: float) -> Callable[..., tuple]:
  """(x, head, targets) -> (total, cross-entropy, z), or with gradients (these, d_x, d_head)."""
  tokens, head_axes = ('act_batch', 'act_len'), ('embed', 'vocab')
  out_axes = (None, (*tokens, None), head_axes) if gradients else None
  return partitioning.per_shard(
    functools.partial(_shard, gradients, chunk, z_weight),
    ((*tokens, None), head_axes, tokens),
    out_axes,
  )


def _shard(
  gradients: bool, chunk: int, z_weight: float, x: Array, head: Array, targets: Array
) -> tuple:
  """One device's part: x [B, L, D], head [D / fsdp, V / tensor], targets [B, L] of this device."""
  rows = _used((*partitioning.ROW_AXES, 'sequence'))
  weight = partitioning.gather_shards(head.astype(x.dtype), axis=0)
  tiles, num_tokens = _tiles(x, targets, chunk)
  tile = functools.partial(_tile, gradients, z_weight, weight)
  zero = jnp.zeros((), jnp.float32)
  d_weight = jnp.zeros(weight.shape, jnp.float32) if gradients else None
  (*sums, d_weight), d_x = jax.lax.scan(tile, (zero, zero, d_weight), tiles)
  cross_entropy, z = jax.lax.psum(tuple(sums), rows) if rows else sums
  values = cross_entropy + z_weight * z, cross_entropy, z
  if d_x is None or d_weight is None:  # without gradients
    return values

  d_x = d_x.reshape(-1, x.shape[-1])[:num_tokens].reshape(x.shape)
  return values, d_x, _reduced(d_weight)


def _reduced(d_weight: Array) -> Array:
  """The head's gradient summed over the devices, each left with its part over the fsdp axes."""
  fsdp, rows = _used(partitioning.FSDP_AXES), _used((*partitioning.ROW_AXES, 'sequence'))
  if fsdp:
    d_weight = jax.lax.psum_scatter(d_weight, fsdp, scatter_dimension=0, tiled=True)
  others = tuple(axis for axis in rows if axis not in fsdp)
  return jax.lax.psum(d_weight, others) if others else d_weight


def _used(axes: tuple[str, ...]) -> tuple[str, ...]:
  """Those of size above 1 in the mesh in force."""
  return tuple(axis for axis in axes if partitioning.axis_size(axis) > 1)


def _tiles(x: Array, targets: Array, chunk: int) -> tuple[tuple[Array, Array], int]:
  """((x [tiles, tokens, D], targets [tiles, tokens]), tokens in all), tiles equal and filled up."""
  num_tokens = math.prod(targets.shape)
  num_tiles = -(-num_tokens // chunk)
  size = -(-num_tokens // num_tiles)
  fill = num_tiles * size - num_tokens
  x = jnp.pad(x.reshape(num_tokens, -1), ((0, fill), (0, 0))).reshape(num_tiles, size, -1)
  targets = jnp.pad(targets.reshape(-1), (0, fill), constant_values=-1)
  return (x, targets.reshape(num_tiles, size)), num_tokens


def _tile(
  gradients: bool, z_weight: float, weight: Array, carry: tuple, tile: tuple[Array, Array]
) -> tuple[tuple, Array | None]:
  """Adds one tile x [T, D], targets [T] to (cross-entropy, z, d_weight); also gives its d_x."""
  (cross_entropy, z, d_weight), (x, targets) = carry, tile
  real, hit, weights, total, log_z, label = _softmax(weight, x, targets)
  cross_entropy += jnp.where(real, log_z - label, 0.0).sum()
  z += jnp.where(real, log_z * log_z, 0.0).sum()
  if not gradients:
    return (cross_entropy, z, None), None

  slope = (1 + 2 * z_weight * log_z) / total  # of `total` in the log-partition, over its sum
  d_logits = jnp.where(real[:, None], weights * slope[:, None] - hit, 0.0)
  d_x, d_weight_here = _head_gradients(x, weight, d_logits)
  return (cross_entropy, z, d_weight + d_weight_here), d_x.astype(x.dtype)


class _Softmax(NamedTuple):
  """Of one tile of T tokens, on one device's part of the vocabulary."""

  real: Array  # [T] bool
  hit: Array  # [T, V] bool, the target's place
  weights: Array  # [T, V] exponentials
  total: Array  # [T] their sums over the whole vocabulary
  log_z: Array  # [T]
  label: Array  # [T] logits of the targets

  @property
  def log_prob(self) -> Array:
    """[T], 0 where there is no target."""
    return jnp.where(self.real, self.label - self.log_z, 0.0)


def _softmax(weight: Array, x: Array, targets: Array, temperature: float = 1.0) -> _Softmax:
  """Of x [T, D] against weight [D, V], over temperature, in float32."""
  tensor = _used(('tensor',))
  real = targets >= 0
  logits = jnp.einsum('TD,DV->TV', x, weight, preferred_element_type=jnp.float32)
  logits = logits / temperature if temperature != 1 else logits
  first = jax.lax.axis_index('tensor') * weight.shape[1] if tensor else 0
  hit = targets[:, None] == first + jnp.arange(weight.shape[1])

  top = logits.max(axis=-1)
  top = jax.lax.pmax(top, tensor) if tensor else top
  weights = jnp.exp(logits - top[:, None])
  sums = weights.sum(axis=-1), jnp.where(hit, logits, 0.0).sum(axis=-1)
  total, label = jax.lax.psum(sums, tensor) if tensor else sums
  return _Softmax(real, hit, weights, total, top + jnp.log(total), label)


def _head_gradients(x: Array, weight: Array, d_logits: Array) -> tuple[Array, Array]:
  """Of logits [T, V] in x [T, D] and in this device's part of the head [D, V], both float32."""
  tensor = _used(('tensor',))
  d_logits = d_logits.astype(x.dtype)  # float32 products would run at a fraction of the speed
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  d_x = product('TV,DV->TD', d_logits, weight)
  d_x = jax.lax.psum(d_x, tensor) if tensor else d_x
  return d_x, product('TD,TV->DV', x, d_logits)
