"""What a step needs, from shapes alone: for GPUs, and to rank candidates before any is compiled.

State is exact, by the shapes and layouts of the real train state. The rest is a model of the step:
layers are gathered over the fsdp axes for the forward and again for the backward pass, gradients
are reduced where their layer is done, each token travels once to every device that it needs, and
every array that a kernel cannot keep on the chip passes through HBM. The slow network carries one
fsdp axis's share of a layer, which the fast one completes. A row that is split over `sequence` is
unequal work (`models.attention.kernels.sharded`): the estimate is of the last device. The figures
of a compiled program, where there is one, are better.

Letters: t tokens of a device in a forward pass, a bytes per number.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.config import mesh_config, moe_config, router_traits, schema
from moe_jax.devices import partitioning
from moe_jax.models.exchange import buffers
from moe_jax.planning import compile_ahead, virtual_devices
from moe_jax.planning import flops as flops_lib
from moe_jax.planning.hlo import collectives as collectives_lib
from moe_jax.training import objective, train_state

_WIDE = 4  # bytes of float32
# Forward passes' worth of what is recomputed: of attention's projections and shared experts in
# moe_core, of whole layers where only their input is kept.
_REPEATS_LAYERS = ('full', 'offload')


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Of one step, per device."""

  arguments: dict[str, int]  # bytes by name
  temporaries: dict[str, int]  # bytes by name, at the moment of most
  flops: float  # that the busiest device computes, recomputation included
  hbm_bytes: float  # read and written
  collectives: list[collectives_lib.Collective]


@dataclasses.dataclass(frozen=True)
class Work:
  """Training FLOPs per token."""

  model: float  # `flops.train_flops_per_token`
  # The part of routed experts, which imbalance stretches, passes that are repeated included.
  experts: float
  repeated: float  # what the backward pass recomputes
  attention: float  # the part of scores and weighted sums, passes that are repeated included
  latents: float  # the part that makes keys and values from latents, likewise


def work(cfg: schema.Config) -> Work:
  """The arithmetic of a config, per token."""
  model, moe = cfg.model, cfg.model.moe
  total = flops_lib.train_flops_per_token(model)
  expert = 3 * model.embed_dim * moe.moe_mlp_dim
  layers = _moe_layers(model)
  heads = (1 + model.num_mtp_layers) * model.embed_dim * model.vocab_size
  forward = (total - flops_lib.TRAIN_FLOPS_PER_WEIGHT * heads) / 3
  count = flops_lib.count_parameters(model)
  kept = {'none': 0.0, 'moe_core': 2.0 * (count.attention + count.shared_experts + count.dense_ffn)}
  repeated = forward if model.remat in _REPEATS_LAYERS else kept[model.remat]
  passes = 4 if model.remat in _REPEATS_LAYERS else 3
  experts = passes * 2.0 * layers * flops_lib.active_experts(moe) * expert
  attention = passes * flops_lib.attention_flops_per_token(model)
  again = passes if model.remat == 'none' else 4
  latents = again * 2.0 * (model.num_layers + model.num_mtp_layers) * _up_projection(model)
  return Work(total, experts if model.is_moe else 0.0, repeated, attention, latents)


def _up_projection(model: schema.ModelConfig) -> int:
  """Weights of a layer that make keys and values of all heads from a latent; 0 without latents."""
  attention, mla = model.attention, model.attention.mla
  if attention.kind != 'mla':
    return 0
  return mla.kv_lora_rank * model.num_heads * (mla.qk_nope_head_dim + mla.v_head_dim)


def _moe_layers(model: schema.ModelConfig) -> int:
  return model.num_moe_layers + (model.num_mtp_layers if model.is_moe else 0)


def abstract_mesh(mesh: mesh_config.MeshConfig, num_devices: int) -> jax.sharding.AbstractMesh:
  """A mesh without devices.

  Raises:
    errors.InputError: the sizes do not multiply to the number of devices.
  """
  sizes = mesh_config.resolve(mesh, num_devices)
  auto = (jax.sharding.AxisType.Auto,) * len(sizes)
  return jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=auto)


def estimate(
  cfg: schema.Config, mesh: jax.sharding.AbstractMesh, max_vio: float, exchange: str
) -> Estimate:
  """Counts one train step.

  Args:
    cfg: the run.
    mesh: sizes of the axes.
    max_vio: the busiest device of the expert axis has 1 + max_vio times the mean load.
    exchange: a key of `exchange.EXCHANGES`, how tokens travel.
  """
  sizes = _Sizes(cfg, mesh, _stretch(mesh.shape, max_vio), exchange)
  tokens = cfg.train.batch_size * cfg.model.max_seq_len / mesh.size
  batch = len(objective.BATCH_KEYS) * tokens * mesh.shape['tensor'] * 4
  arguments = state_bytes(cfg, mesh) | {'batch': int(batch)}
  return Estimate(
    arguments=arguments,
    temporaries=_temporaries(sizes, arguments['parameters']),
    flops=busiest_flops_per_token(cfg, mesh.shape, max_vio) * tokens,
    hbm_bytes=_traffic(sizes, arguments),
    collectives=_collectives(sizes),
  )


def busiest_flops_per_token(cfg: schema.Config, shape: Mapping[str, int], max_vio: float) -> float:
  """What the busiest device computes, per token of the mean device, see `estimate`."""
  need, split = work(cfg), shape['sequence']
  experts = need.experts * (_stretch(shape, max_vio) - 1)
  # Of s devices the last has (2 s - 1) / s of the mean pairs, and all make the keys of whole rows.
  rows = need.attention * (1 - 1 / split) + need.latents * (split - 1)
  return need.model + need.repeated + experts + rows


def _stretch(shape: Mapping[str, int], max_vio: float) -> float:
  return 1 + max_vio if shape['expert'] > 1 else 1.0


def state_bytes(cfg: schema.Config, mesh: jax.sharding.AbstractMesh) -> dict[str, int]:
  """Bytes per device of the parts of the train state, see `compile_ahead.train_arguments`."""
  loop = dataclasses.replace(cfg.train, batch_size=1, micro_batch_size=0, batch_ramp=())
  model = dataclasses.replace(cfg.model, remat='none')
  return dict(_state_bytes(model, cfg.objective, cfg.trainable, cfg.optim, loop, cfg.mesh, mesh))


# A search asks again for each policy and micro-batch, which change nothing about the state.
@functools.lru_cache(maxsize=256)
def _state_bytes(
  model: schema.ModelConfig,
  aim: schema.ObjectiveConfig,
  trained: schema.TrainableConfig,
  optim: schema.OptimConfig,
  loop: schema.TrainConfig,
  sizes: mesh_config.MeshConfig,
  mesh: jax.sharding.AbstractMesh,
) -> dict[str, int]:
  boxed = _boxed_state(model, aim, trained, optim, loop)
  state = train_state.laid_out(boxed, mesh, zero1=sizes.zero1)
  return compile_ahead.train_arguments(state)


# Tracing the initialisation takes longest, and no mesh changes what it gives.
@functools.lru_cache(maxsize=16)
def _boxed_state(
  model: schema.ModelConfig,
  aim: schema.ObjectiveConfig,
  trained: schema.TrainableConfig,
  optim: schema.OptimConfig,
  loop: schema.TrainConfig,
) -> train_state.TrainState:
  unread: Any = None
  cfg = schema.Config(
    init_from='',
    model=model,
    data=unread,
    objective=aim,
    trainable=trained,
    optim=optim,
    train=loop,
    checkpoint=unread,
    mesh=unread,
    paper=unread,
  )
  return train_state.boxed_state(cfg)


class _Sizes:
  """Numbers that every part of the estimate needs."""

  def __init__(
    self, cfg: schema.Config, mesh: jax.sharding.AbstractMesh, stretch: float, exchange: str
  ):
    model, shape = cfg.model, mesh.shape
    self.cfg, self.model, self.moe, self.shape, self.stretch = cfg, model, model.moe, shape, stretch
    self.exchange = exchange
    self.a = jnp.dtype(model.dtype).itemsize
    self.p = jnp.dtype(model.param_dtype).itemsize

    def ways(axes):
      return math.prod(shape[axis] for axis in axes)

    self.fsdp = ways(partitioning.FSDP_AXES)
    self.rows = ways(partitioning.ROW_AXES)
    self.tensor = shape['tensor']
    micro = cfg.train.micro_batch_size or cfg.train.batch_size
    self.micros = cfg.train.batch_size // micro
    self.t = micro * model.max_seq_len / self.rows / shape['sequence']
    count = flops_lib.count_parameters(model)
    self.dense = (count.attention + count.dense_ffn + count.shared_experts) / self.tensor
    self.experts = count.routed_experts / self.tensor / shape['expert']
    self.heads = (count.embedding + count.head) / self.tensor
    if model.num_mtp_layers:
      routed = model.num_mtp_layers * model.moe.num_experts * self._expert
      self.dense += (count.mtp - routed) / self.tensor
      self.experts += routed / self.tensor / shape['expert']
    self.layers = model.num_layers + model.num_mtp_layers
    self.moe_layers = _moe_layers(model)
    # Rows of routed tokens that a device computes, and that its buffers hold.
    self.routed = self.t * flops_lib.active_experts(self.moe) if model.is_moe else 0.0
    self.buffered = self.routed
    self.sent = self.received = 0.0  # rows of the exchange's buffers
    if model.is_moe and shape['expert'] > 1:
      sent, received = exchange_copies(self.moe, shape['expert'], exchange)
      self.sent, self.received = self.t * sent, self.t * received
      here = self.moe.num_experts // shape['expert']
      # A received row has as many experts here as it chooses, or as there are.
      most = self.received * min(flops_lib.active_experts(self.moe), here)
      factor = self.moe.exchange.buffer_factor
      self.buffered = min(most, factor * self.routed) if factor else most

  @property
  def _expert(self) -> int:
    return 3 * self.model.embed_dim * self.moe.moe_mlp_dim

  @property
  def head_width(self) -> float:
    """Numbers of all heads of a layer on a device: query, key and value."""
    return self.key_width + self.model.num_heads * self.model.attention.qk_head_dim / self.tensor

  @property
  def key_width(self) -> float:
    """Numbers of all heads of a layer on a device: key and value."""
    attention = self.model.attention
    return self.model.num_heads * (attention.qk_head_dim + attention.v_head_dim) / self.tensor

  @property
  def gathered_width(self) -> float:
    """Numbers per token and layer that keys and values are made from, which `sequence` gathers."""
    attention = self.model.attention
    if attention.kind == 'mla':
      return attention.mla.kv_lora_rank + attention.mla.qk_rope_head_dim
    return 2 * attention.num_kv_heads * attention.head_dim / self.tensor


def exchange_copies(
  moe: moe_config.MoEConfig, devices: int, exchange: str, train: bool = True
) -> tuple[float, float]:
  """Rows per token of a device of the buffers that it (sends from, receives into).

  Args:
    moe: experts and buffers.
    devices: P, more than one.
    exchange: a key of `exchange.EXCHANGES`.
    train: whether the pass is one of training.
  """
  factor = moe.exchange.buffer_factor
  # Where the number of a token's experts varies it may choose all.
  ranked = router_traits.of(moe).ranked
  choices = flops_lib.active_experts(moe, train) if ranked else moe.num_experts
  fan = buffers.fan_out(moe, choices, devices)
  bounded = min(float(devices), factor * fan) if factor else float(devices)
  return {
    'all_gather': (float(devices), float(devices)),  # gradients are gathered too
    'ragged_all_to_all': (float(fan), bounded),
    'all_to_all': (bounded, bounded),
  }[exchange]


def traveling(
  moe: moe_config.MoEConfig,
  devices: int,
  exchange: str,
  activations: float,
  stretch: float = 1.0,
  train: bool = True,
) -> tuple[str, float]:
  """(collective, bytes of its operand) of one way of the tokens of a layer.

  Args:
    moe: experts and buffers.
    devices: P, more than one.
    exchange: a key of `exchange.EXCHANGES`.
    activations: bytes of a device's tokens.
    stretch: the load of the busiest device, of the mean.
    train: whether the pass is one of training.
  """
  if exchange == 'all_gather':
    return 'all-gather', activations
  if exchange == 'ragged_all_to_all':
    return 'ragged-all-to-all', activations * _devices_per_token(moe, devices, train) * stretch
  return 'all-to-all', activations * exchange_copies(moe, devices, exchange, train)[0]


@functools.lru_cache(maxsize=256)
def _devices_per_token(moe: moe_config.MoEConfig, devices: int, train: bool) -> float:
  """On how many devices of the expert axis a token has experts, its own among them or not."""
  moe = dataclasses.replace(moe, num_virtual_devices=devices)
  return virtual_devices.expected_devices_per_token(moe, train)


def _temporaries(s: _Sizes, parameters: int) -> dict[str, int]:
  d, f, a = s.model.embed_dim, s.moe.moe_mlp_dim / s.tensor, s.a
  attention = s.model.attention
  latent = (
    attention.mla.kv_lora_rank + attention.mla.qk_rope_head_dim if attention.kind == 'mla' else 0
  )
  out = s.model.num_heads * attention.v_head_dim / s.tensor
  kept = {
    'none': s.t * (6 * d + 2 * s.head_width + 2 * latent) + s.buffered * (2 * f + f + d),
    'moe_core': s.t * (d + out + latent) + s.buffered * 2 * f,
    'full': s.t * d,
    'offload': 0.0,
  }[s.model.remat]
  layer = (s.dense / s.layers + (s.experts / s.moe_layers if s.moe_layers else 0)) * a
  sums = 2 if s.micros > 1 else 1
  vocab = s.model.vocab_size / s.tensor
  cast = parameters * a / s.p if s.a != s.p else 0
  sizes_of = {
    'gradients': parameters * sums,
    'weights in the compute dtype': cast + (2 * layer if s.fsdp > 1 else 0),
    'activations kept for the backward pass': kept * a * s.layers,
    'experts': s.buffered * (4 * d * a + 2 * f * (2 * a + 2 * _WIDE)),
    'exchange': 2 * (s.sent + s.received) * d * a,  # there and back
    # Keys and values are those of whole rows.
    'attention': 3 * s.t * (s.head_width + (s.shape['sequence'] - 1) * s.key_width) * a,
    'logits and loss': min(s.cfg.train.loss_chunk, s.t) * vocab * (_WIDE + a) + d * vocab * _WIDE,
  }
  return {name: int(size) for name, size in sizes_of.items()}


def _traffic(s: _Sizes, arguments: Mapping[str, int]) -> float:
  """Bytes through HBM in a step."""
  d, f, a = s.model.embed_dim, s.moe.moe_mlp_dim / s.tensor, s.a
  passes = 4 if s.model.remat in _REPEATS_LAYERS else 3
  weights = (s.dense + s.experts + s.heads) * a * passes
  # Gather, products and combine of the experts; norms, residuals, projections and attention.
  routed = s.routed * s.stretch * (4 * d + 7 * f) * s.moe_layers
  dense = s.t * (10 * d + 2 * s.head_width) * s.layers
  gradients = arguments['parameters'] * (2 if s.micros > 1 else 1)
  state = 2 * (arguments['parameters'] + arguments['optimizer_state'])
  return s.micros * (weights + (routed + dense) * a * passes + 2 * gradients) + state


def _collectives(s: _Sizes) -> list[collectives_lib.Collective]:
  result = []

  def add(kind: str, axes: tuple[str, ...], operand: float, count: int, name: str):
    used = tuple(axis for axis in axes if s.shape[axis] > 1)
    n = math.prod(s.shape[axis] for axis in used)
    if n > 1 and operand and count:
      size = operand * collectives_lib.on_the_wire(kind, n)
      result.append(collectives_lib.Collective(kind, used, size, count, name))

  m = s.micros
  copies = (*partitioning.COPIES, 'sequence')  # all of whose devices have a weight's gradient
  for weights, others in ((s.dense + s.heads, (*copies, 'expert')), (s.experts, copies)):
    part = weights / s.fsdp  # what a device keeps: the outer axis gathers it first
    for axis in partitioning.FSDP_AXES:
      add('all-gather', (axis,), part * s.a, 2 * m, 'weights')
      part *= s.shape[axis]
      add('reduce-scatter', (axis,), part * s.a, m, 'gradients')
    for axis in others:
      add('all-reduce', (axis,), weights / s.fsdp * s.a, m, 'gradients')
  activations = s.t * s.model.embed_dim * s.a
  passes = 3 if s.model.remat in _REPEATS_LAYERS else 2
  add('all-reduce', ('tensor',), activations, 2 * passes * s.layers * m, 'activations')
  keys = s.t * s.gathered_width * s.a
  add('all-gather', ('sequence',), keys, passes * s.layers * m, 'keys and values')
  if s.moe_layers and s.shape['expert'] > 1:
    kind, operand = traveling(s.moe, s.shape['expert'], s.exchange, activations, s.stretch)
    # There and back; the backward pass likewise, and there again if it recomputes.
    add(kind, ('expert',), operand, (2 * passes - (passes == 3)) * s.moe_layers * m, 'exchange')
  return result
