"""What a step of decoding needs, from shapes alone; see `estimate`.

One token per row, against caches that are full: `max_seq_len` slots. Latent attention is absorbed,
as `models.attention.latent` decodes, so that a query of a head meets the latent itself. A device
reads the experts that the rows of its expert-parallel group choose, and of the embedding its
tokens' rows alone. What fsdp splits is gathered; what is whole everywhere is not.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from moe_jax.config import schema
from moe_jax.devices import partitioning
from moe_jax.planning import estimate as estimate_lib
from moe_jax.planning import flops
from moe_jax.planning.hlo import collectives
from moe_jax.training import train_state


def flops_per_token(model: schema.ModelConfig) -> float:
  """Arithmetic of one new token at the end of a full context."""
  count = flops.count_activated(model, train=False)
  weights = count.total - count.embedding - count.norms
  attention = model.attention
  if attention.kind == 'mla':
    rank = attention.mla.kv_lora_rank
    width = 2 * rank + attention.mla.qk_rope_head_dim
  else:
    width = attention.qk_head_dim + attention.v_head_dim
  return 2.0 * weights + 2.0 * model.num_layers * model.num_heads * width * model.max_seq_len


def estimate(
  cfg: schema.Config, mesh: jax.sharding.AbstractMesh, rows: int, exchange: str
) -> estimate_lib.Estimate:
  """Counts one step.

  Args:
    cfg: the run.
    mesh: sizes of the axes.
    rows: sequences over all devices.
    exchange: a key of `exchange.EXCHANGES`, how tokens travel.
  """
  model, shape = cfg.model, mesh.shape
  a = jnp.dtype(model.dtype).itemsize
  ways = partitioning.row_ways(mesh)
  here = rows / ways
  weights = _weights(cfg, mesh, here * shape['expert'])
  caches = flops.kv_cache_elements_per_token(model) * model.max_seq_len * here * a
  active = flops.active_experts(model.moe, train=False) if model.is_moe else 0
  fsdp = math.prod(shape[axis] for axis in partitioning.FSDP_AXES)
  layer = weights.split * fsdp / max(model.num_layers, 1)
  temporaries = {
    'logits and loss': here * model.vocab_size / shape['tensor'] * 4,
    'experts': here * active * 3 * model.moe.moe_mlp_dim * a,
    'weights in the compute dtype': layer if fsdp > 1 else 0,
  }
  return estimate_lib.Estimate(
    arguments={'parameters': weights.kept, 'caches': int(caches), 'tokens': int(8 * here)},
    temporaries={name: int(size) for name, size in temporaries.items()},
    flops=flops_per_token(model) * rows / mesh.size,
    hbm_bytes=weights.read + caches,
    collectives=_collectives(cfg, mesh, here, weights.split, exchange, a),
  )


@dataclasses.dataclass(frozen=True)
class _Weights:
  """Bytes per device."""

  kept: int
  split: int  # of these, the part of what fsdp splits and a step needs whole
  read: float  # once they are gathered


def _weights(cfg: schema.Config, mesh: jax.sharding.AbstractMesh, sharers: float) -> _Weights:
  """Of a step in which `sharers` rows choose among the experts of a device."""
  model, a = cfg.model, jnp.dtype(cfg.model.dtype).itemsize
  params = train_state.abstract_state(cfg, mesh).params
  kept, split, read = 0, 0, 0.0
  for path, leaf in jax.tree.leaves_with_path(params):
    names = [entry.key for entry in path]
    if names[0] == 'mtp_layers':
      continue
    wide = names[-1] in ('scale', 'router')
    # The absorbed form of MLA's up-projection is made anew, and whole on every device.
    shape_here = leaf.shape if names[-1] == 'kv_b' else leaf.sharding.shard_shape(leaf.shape)
    size = math.prod(shape_here) * (leaf.dtype.itemsize if wide else min(a, leaf.dtype.itemsize))
    kept += size
    if names == ['embedding'] and not model.tie_embeddings:
      continue  # states travel, and not the table
    ways = 1 if names[-1] == 'kv_b' else _fsdp_ways(leaf.sharding)
    split += size if ways > 1 else 0
    routed = names[-2:] in (['moe', 'gate_up'], ['moe', 'down'])
    read += size * ways * (_share(model, sharers) if routed else 1.0)
  return _Weights(kept, split, read)


def _fsdp_ways(sharding: jax.NamedSharding) -> int:
  """Into how many parts the fsdp axes split an array."""
  entries = [(e,) if isinstance(e, str) else e or () for e in sharding.spec]
  used = {axis for axes in entries for axis in axes}
  return math.prod(sharding.mesh.shape[axis] for axis in partitioning.FSDP_AXES if axis in used)


def _share(model: schema.ModelConfig, rows: float) -> float:
  """Of a layer's experts, the part that some of `rows` tokens choose, if they choose evenly."""
  active = flops.active_experts(model.moe, train=False)
  return 1 - (1 - active / model.moe.num_experts) ** rows


def _collectives(
  cfg: schema.Config,
  mesh: jax.sharding.AbstractMesh,
  here: float,
  part: int,
  exchange: str,
  a: int,
) -> list[collectives.Collective]:
  model, shape = cfg.model, mesh.shape
  result = []
  for axis in partitioning.FSDP_AXES:  # the outer axis gathers first
    n = shape[axis]
    if n > 1:
      size = part * collectives.on_the_wire('all-gather', n)
      result.append(collectives.Collective('all-gather', (axis,), size, 1, 'weights'))
    part *= n
  state = here * model.embed_dim * a
  n = shape['tensor']
  if n > 1:
    size = state * collectives.on_the_wire('all-reduce', n)
    result.append(
      collectives.Collective('all-reduce', ('tensor',), size, 2 * model.num_layers, 'states')
    )
  n = shape['expert']
  if n > 1:
    kind, operand = estimate_lib.traveling(model.moe, n, exchange, state, train=False)
    size = operand * collectives.on_the_wire(kind, n)
    result.append(
      collectives.Collective(kind, ('expert',), size, 2 * model.num_moe_layers, 'exchange')
    )
  return result
