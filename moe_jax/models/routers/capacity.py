"""Which chosen experts a token loses because too many tokens chose them.

An assignment is one (token, expert) pair. Assignments compete for room inside groups of consecutive
rows; the room is a static number, computed once (`group_capacity`) for the dropping (`keep`) and
for the buffers of dispatch 'capacity' (`slots`), so that what is kept always fits. It counts every
place of a row, padding included: shapes must not depend on the data, and padding never competes, so
a group with padding drops less.

Policies, best first; whatever they leave equal keeps token order, then the order of the choices:

  position        all first choices in token order, then all second ones, ... (GShard, Switch)
  score           highest score of the expert for the token
  batch_priority  like position, tokens ordered by their highest score (V-MoE, arXiv 2106.05974)
  device          like score, one budget for all experts of a virtual device (DeepSeek-V2, 2.2.4)

Axis letters are those of `moe_jax.models`, P being virtual devices. Rows that compete form a group,
whose assignments are `places`.
"""

import fractions
import math
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax import errors, integer_hash
from moe_jax.config import moe_config, router_traits
from moe_jax.models.routers import routing

Array = jax.Array


def group_capacity(cfg: moe_config.MoEConfig, tokens: int) -> int:
  """C: assignments that one expert (policy 'device': one virtual device) may keep of a group.

  DeepSeek-V2 gives a device "the average load", a capacity factor of 1.0, and says neither what
  rounds it nor whether whole tokens or single pairs are counted: here it is pairs, rounded up, like
  the capacity of an expert, so that a balanced group loses nothing.

  Args:
    cfg: its router, capacity policy, factor and sizes.
    tokens: places of the group, padding included.

  Returns:
    The router's own bound where it has one; else ceil(factor K tokens / E), with P for E under
    policy 'device'; `tokens` where nothing is dropped.
  """
  bound = router_traits.of(cfg).bound
  if bound:
    return bound.room(cfg, tokens)
  if cfg.capacity.policy == 'none':
    return tokens
  assignments = tokens * cfg.num_experts_per_tok
  bins = cfg.num_virtual_devices if cfg.capacity.policy == 'device' else cfg.num_experts
  # The decimal number that was written: 0.07 as a float is more, and would round 7 up to 8.
  return math.ceil(fractions.Fraction(str(cfg.capacity.factor)) * assignments / bins)


def slots(cfg: moe_config.MoEConfig, num_rows: int, row_length: int, total_rows: int) -> int:
  """The most tokens that an expert can keep on one device: the size of its buffer there.

  A group is part of the rows of the whole forward pass, which may be spread over devices; then all
  that an expert keeps of it may lie on one device. So the bound is, for the worst device, the sum
  over the groups it holds a part of of min(C, places of that part). Chunks of a router that bounds
  itself are bounded alike where they are consecutive places; else every chunk may take its tokens
  from this device, and the bound is C times all chunks, at most the places here.

  It does not hold for exempt rows (`moe_rules.validate` refuses them with dispatch 'capacity').

  Args:
    cfg: as in `group_capacity`.
    num_rows: rows on this device, consecutive ones.
    row_length: L.
    total_rows: rows of the forward pass on all devices together, a multiple of `num_rows`.

  Returns:
    At most num_rows * row_length: the experts of a token are all different.
  """
  here, total = num_rows * row_length, total_rows * row_length
  group = (cfg.capacity.group_rows or total_rows) * row_length
  bound = router_traits.of(cfg).bound
  if bound:
    group = bound.chunk(cfg, row_length)
  room = group_capacity(cfg, group)
  if bound and not bound.consecutive(cfg):
    return min(here, room * -(-total // group))
  return max(
    sum(min(room, part) for part in _parts(start, start + here, group))
    for start in range(0, total, here)
  )


def _parts(start: int, stop: int, size: int) -> Iterator[int]:
  """How many of the places start..stop-1 lie in each block of `size` places that they touch."""
  for first in range(start // size * size, stop, size):
    yield min(stop, first + size) - max(start, first)


def exempt_rows(cfg: moe_config.MoEConfig, tokens: routing.Tokens) -> Array:
  """[B] bool: rows that lose nothing, drawn anew each step and the same in every layer."""
  noise = integer_hash.uniform(integer_hash.combine(tokens.seed, _EXEMPT_SALT, tokens.row))
  return noise < cfg.capacity.exempt_fraction


def keep(cfg: moe_config.MoEConfig, decision: routing.Routing, tokens: routing.Tokens) -> Array:
  """Which choices survive the capacity.

  Exempt rows come first: what they use is gone for the others of their group, and what exceeds it
  is kept all the same. The result carries no gradient and every remat policy saves it.

  Args:
    cfg: with a capacity policy other than 'none'.
    decision: choices [B, L, K] and scores [B, L, E]; a choice E neither competes nor is kept.
    tokens: the batch; decides which rows are exempt, in all layers or in none.

  Returns:
    [B, L, K] bool.

  Raises:
    errors.InputError: the rows of the forward pass cannot be cut into groups.
  """
  shape = decision.expert_idx.shape
  rows = _rows_per_group(cfg, shape[0])
  decision = jax.lax.stop_gradient(decision)
  keys = _PRIORITIES[cfg.capacity.policy](decision)
  exempt = jnp.zeros(shape, bool)
  if cfg.capacity.exempt_fraction:
    exempt = jnp.broadcast_to(exempt_rows(cfg, tokens)[:, None, None], shape)
    keys = (~exempt, *keys)

  def in_groups(a):
    return jnp.broadcast_to(a, shape).reshape(shape[0] // rows, -1)

  rank = _rank(in_groups(_bins(cfg, decision.expert_idx)), [in_groups(key) for key in keys])
  room = group_capacity(cfg, rows * shape[1])
  used = decision.expert_idx < cfg.num_experts
  return checkpoint_name(used & ((rank.reshape(shape) < room) | exempt), 'routing')


_EXEMPT_SALT = 5  # routers use 1 to 4


def _rows_per_group(cfg: moe_config.MoEConfig, num_rows: int) -> int:
  rows = cfg.capacity.group_rows or num_rows
  errors.require(
    num_rows % rows == 0,
    f'config.model.moe.capacity.group_rows={rows} must divide the rows of a forward pass, '
    f'{num_rows}; choose a divisor of {num_rows}, or 0 for all of them',
  )
  return rows


def _bins(cfg: moe_config.MoEConfig, expert_idx: Array) -> Array:
  """What an assignment competes for, [B, L, K] int32: its expert or device; E if it is not used."""
  if cfg.capacity.policy != 'device':
    return expert_idx
  device = expert_idx // moe_config.group_size(cfg.num_experts, cfg.num_virtual_devices)
  return jnp.where(expert_idx < cfg.num_experts, device, cfg.num_experts)


def _by_position(decision: routing.Routing) -> tuple[Array, ...]:
  return (jnp.arange(decision.expert_idx.shape[-1]),)


def _by_score(decision: routing.Routing) -> tuple[Array, ...]:
  """The raw score of the expert for the token: gates may be normalised, the bias only selects."""
  index = jnp.minimum(decision.expert_idx, decision.scores.shape[-1] - 1)
  return (-jnp.take_along_axis(decision.scores, index, axis=-1),)


def _by_best_score(decision: routing.Routing) -> tuple[Array, ...]:
  return (*_by_position(decision), -decision.scores.max(axis=-1, keepdims=True))


# Sort keys that broadcast to [B, L, K], the most significant first; the smallest key wins.
_PRIORITIES: Mapping[str, Callable[[routing.Routing], tuple[Array, ...]]] = {
  'position': _by_position,
  'score': _by_score,
  'batch_priority': _by_best_score,
  'device': _by_score,
}


def _rank(bins: Array, keys: list[Array]) -> Array:
  """How many assignments of the same bin come before, [groups, places] int32 as bins and keys.

  Sorts along the places only, so that groups split over devices stay there; the second sort undoes
  the first, where a scatter would make the partitioner gather all groups.
  """
  index = jax.lax.broadcasted_iota(jnp.int32, bins.shape, 1)
  operands = (bins, *keys, index)
  bins, *_, order = jax.lax.sort(operands, num_keys=1 + len(keys), is_stable=True)
  begins = bins != jnp.roll(bins, 1, axis=1)  # of no importance at 0, which begins a bin anyway
  rank = index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
  return jax.lax.sort((order, rank), num_keys=1)[1]
