"""From gates to the routed experts' output: dispatch on one device, or exchange over the mesh.

`apply` runs `_on_device` on every device's own tokens. That makes the kernels whole where FSDP
splits them, and lets a dispatch move and compute the tokens, here or on the devices of the mesh
axis `expert` that an exchange brings them to.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.config import moe_config, router_traits
from moe_jax.devices import partitioning
from moe_jax.models import exchange, layers
from moe_jax.models.dispatch import DISPATCHES, gather
from moe_jax.models.exchange import buffers
from moe_jax.models.experts import sorted_plan
from moe_jax.models.routers import capacity, decision

Array = jax.Array

GATE_UP_AXES = ('expert', 'expert_embed', 'gate_up', 'expert_mlp')
DOWN_AXES = ('expert', 'expert_mlp', 'expert_embed')


class Kernels(NamedTuple):
  """The weights of all experts, or a device's part of them."""

  gate_up: Array  # [E, D, 2, F]
  down: Array  # [E, F, D]


class _Forward(NamedTuple):
  """The rows of a forward pass, on all devices together and on this one."""

  rows: int
  length: int
  rows_here: int
  length_here: int  # rows may be cut along their length

  def slots(self, cfg: moe_config.MoEConfig, num_rows: int) -> int:
    """Tokens of `num_rows` neighbouring rows that one expert can keep at most."""
    here = num_rows * self.length_here
    return min(here, capacity.slots(cfg, num_rows, self.length, self.rows))


def dispatch_name(cfg: moe_config.MoEConfig, train: bool, num_choices: int) -> str:
  """The key of `DISPATCHES` for `num_choices` = T K choices.

  Buffers of a fixed size serve where routing bounds them; elsewhere nothing may be lost. Outside of
  training, few choices are served by the weights of their experts alone.
  """
  bounded = decision.drops(cfg, train) or router_traits.of(cfg).bound is not None
  name = cfg.dispatch if cfg.dispatch != 'capacity' or bounded else 'dropless'
  few = not train and num_choices <= gather.STREAMED_CHOICES * cfg.num_experts
  few = few and partitioning.axis_size('expert') == 1
  return 'gather' if name == 'dropless' and few else name


def apply(
  cfg: moe_config.MoEConfig,
  train: bool,
  x: Array,
  gates: Array,
  expert_idx: Array,
  kernels: Kernels,
) -> tuple[Array, Array]:
  """The gated sum of each token's experts.

  Args:
    cfg: dispatch, exchange, backend.
    train: whether the pass is one of training.
    x: [B, L, D].
    gates: [B, L, K] float32.
    expert_idx: [B, L, K] int32; E = not routed.
    kernels: in the compute dtype.

  Returns:
    ([B, L, D]; int32, one number per device, choices that did not fit its buffers).
  """
  tokens = layers.TOKEN_AXES
  in_axes = (tokens, tokens, tokens, GATE_UP_AXES, DOWN_AXES)
  on_device = functools.partial(_on_device, cfg, train, (x.shape[0], x.shape[1]))
  return partitioning.per_shard(on_device, in_axes, (tokens, tokens))(
    x, gates, expert_idx, *kernels
  )


def _on_device(
  cfg: moe_config.MoEConfig,
  train: bool,
  whole: tuple[int, int],
  x: Array,
  gates: Array,
  expert_idx: Array,
  gate_up: Array,
  down: Array,
) -> tuple[Array, Array]:
  """`apply` for this device's part of the arrays; `whole` is (B, L) of the forward pass."""
  forward = _Forward(*whole, *x.shape[:2])
  tokens = sorted_plan.Assigned(*(a.reshape(-1, a.shape[-1]) for a in (x, gates, expert_idx)))
  kernels = _whole(gate_up, down)
  name = dispatch_name(cfg, train, expert_idx.size)
  if partitioning.axis_size('expert') == 1:
    room = forward.slots(cfg, forward.rows_here) if name == 'capacity' else 0
    out = DISPATCHES[name](*tokens, *kernels, cfg.grouped_matmul, room)
    overflow = jnp.int32(0)
  else:
    out, overflow = _exchanged(cfg, name, forward, tokens, kernels)
  # Each device had a part of every expert's width.
  out = partitioning.sum_over('expert_mlp', out)
  return out.reshape(x.shape), overflow.reshape(1, 1)


def _whole(gate_up: Array, down: Array) -> Kernels:
  """The kernels of this device's experts, gathered where FSDP splits them along D."""
  # Flat while it travels: a TPU would pad an axis of 2, and copy what it has gathered.
  flat = gate_up.reshape(*gate_up.shape[:2], -1)
  flat = partitioning.gather_shards(flat, GATE_UP_AXES.index('expert_embed'))
  return Kernels(
    flat.reshape(*flat.shape[:2], *gate_up.shape[2:]),
    partitioning.gather_shards(down, DOWN_AXES.index('expert_embed')),
  )


def _exchanged(
  cfg: moe_config.MoEConfig,
  name: str,
  forward: _Forward,
  tokens: sorted_plan.Assigned,
  kernels: Kernels,
) -> tuple[Array, Array]:
  """Brings tokens to the experts' devices and back; (gated sums [T, D], choices without room)."""
  ways, num_here = partitioning.axis_size('expert'), len(kernels.gate_up)
  buffered = name == 'capacity'
  most = len(tokens.x)
  if buffered:
    most = min(most, num_here * forward.slots(cfg, forward.rows_here))

  def room_for(received: sorted_plan.Assigned) -> int:
    if buffered:  # an exchange's group holds neighbouring rows
      return forward.slots(cfg, ways * forward.rows_here)
    rows, k = received.expert_idx.shape
    most_here = rows * min(k, num_here)
    return buffers.rows_for(cfg.exchange.buffer_factor, tokens.expert_idx.size, most_here)

  def compute(received: sorted_plan.Assigned) -> tuple[Array, Array]:
    room = room_for(received)
    out = DISPATCHES[name](*received, *kernels, cfg.grouped_matmul, room)
    if name != 'dropless':
      return out, jnp.int32(0)
    chosen = (received.expert_idx < num_here).sum(dtype=jnp.int32)
    return out, jnp.maximum(chosen - room, 0)

  bring = exchange.EXCHANGES[exchange.choose(cfg.exchange.kind)]
  return bring(compute, cfg, *tokens, most)
