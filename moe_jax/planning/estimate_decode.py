"""What a step of decoding needs, from shapes alone; see `estimate`.

One token per row, against caches that are full: `max_seq_len` slots. Latent attention is absorbed,
as `models.mla` decodes, so that a query of a head meets the latent itself.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import schema
from moe_jax.devices import partitioning
from moe_jax.planning import estimate as estimate_lib
from moe_jax.planning import flops, virtual_devices
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
  cfg: schema.Config, mesh: jax.sharding.AbstractMesh, rows: int
) -> estimate_lib.Estimate:
  """Counts one step of `rows` sequences over all devices."""
  model, shape = cfg.model, mesh.shape
  a = jnp.dtype(model.dtype).itemsize
  ways = math.prod(shape[axis] for axis in partitioning.ROW_AXES)
  here = rows / ways
  state = train_state.abstract_state(cfg, mesh)
  weights = caches = 0
  for path, leaf in jax.tree.leaves_with_path(state.params):
    if path[0].key == 'mtp_layers':
      continue
    kept = path[-1].key in ('scale', 'router')
    # The absorbed form of MLA's up-projection is made anew, and whole on every device.
    shape_here = leaf.shape if path[-1].key == 'kv_b' else leaf.sharding.shard_shape(leaf.shape)
    size = int(np.prod(shape_here))
    weights += size * (leaf.dtype.itemsize if kept else min(a, leaf.dtype.itemsize))
  caches = flops.kv_cache_elements_per_token(model) * model.max_seq_len * here * a
  fsdp = math.prod(shape[axis] for axis in partitioning.FSDP_AXES)
  active = flops.active_experts(model.moe, train=False) if model.is_moe else 0
  share = 1 - (1 - active / model.moe.num_experts) ** rows if model.is_moe else 1.0
  count = flops.count_parameters(model)
  routed = count.routed_experts / max(count.total, 1)
  read = weights * fsdp * (1 - routed * (1 - share))
  layer = weights * fsdp / max(model.num_layers, 1)
  temporaries = {
    'logits and loss': here * model.vocab_size / shape['tensor'] * 4,
    'experts': here * active * 3 * model.moe.moe_mlp_dim * a,
    'weights in the compute dtype': layer if fsdp > 1 else 0,
  }
  return estimate_lib.Estimate(
    arguments={'parameters': weights, 'caches': int(caches), 'tokens': int(8 * here)},
    temporaries={name: int(size) for name, size in temporaries.items()},
    flops=flops_per_token(model) * rows / mesh.size,
    hbm_bytes=read + caches,
    collectives=_collectives(cfg, mesh, here, weights * fsdp, a),
  )


def _collectives(
  cfg: schema.Config, mesh: jax.sharding.AbstractMesh, here: float, weights: float, a: int
) -> list[collectives.Collective]:
  model, shape = cfg.model, mesh.shape
  result = []
  for axis in partitioning.FSDP_AXES:
    n = shape[axis]
    if n > 1:
      size = weights / n * collectives.on_the_wire('all-gather', n)
      result.append(collectives.Collective('all-gather', (axis,), size, 1, 'weights'))
  state = here * model.embed_dim * a
  n = shape['tensor']
  if n > 1:
    size = state * collectives.on_the_wire('all-reduce', n)
    result.append(
      collectives.Collective('all-reduce', ('tensor',), size, 2 * model.num_layers, 'states')
    )
  n = shape['expert']
  if n > 1:
    moe = dataclasses.replace(model.moe, num_virtual_devices=n)
    copies = virtual_devices.expected_devices_per_token(moe, train=False)
    size = state * copies * collectives.on_the_wire('all-to-all', n)
    result.append(
      collectives.Collective('all-to-all', ('expert',), size, 2 * model.num_moe_layers, 'exchange')
    )
  return result
