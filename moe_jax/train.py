"""Training: the state, one optimizer step, and the loop around it.

The loop resumes by these rules:
  1. The newest whole checkpoint decides the step; metrics past it are dropped, and the steps are
  redone. 2. The batch at step n is a pure function of (seed, n), so n is all the data pipeline
  needs. 3. State and batch being equal, the redone steps are bit-identical on the same hardware.
"""

import collections
import functools
import signal
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from moe_jax import balance, config, losses, optim, partitioning
from moe_jax import metrics as metrics_lib
from moe_jax.models import transformer

Array = jax.Array
Batch = dict[str, Array]

BATCH_KEYS = ('tokens', 'targets', 'positions', 'segment_ids')

# Steps the host may run ahead of the device: enough to keep it busy, few enough that waiting for
# data is seen as waiting.
MAX_IN_FLIGHT = 2


@struct.dataclass
class TrainState:
  """Everything that a step changes."""

  step: Array  # [] int32, optimizer steps done
  params: Any  # nested dict of weights
  opt_state: Any


@struct.dataclass
class StepMetrics:
  """What one step reports; left on the device until somebody logs it."""

  loss: Array  # [] float32, mean cross-entropy per real target, nats
  lr: Array  # [] float32
  grad_norm: Array  # [] float32, before clipping
  load: Array | None  # [num_moe_layers, E] int32, tokens per expert over the global batch


def _init(cfg: config.Config, rng: Array) -> TrainState:
  """A fresh state whose leaves are boxed with logical axis names."""
  params = transformer.init(cfg.model, rng)
  opt_state = optim.optimizer(cfg.optim, cfg.train.num_steps).init(params)
  return TrainState(jnp.zeros((), jnp.int32), params, opt_state)


def abstract_state(cfg: config.Config, mesh: jax.sharding.Mesh) -> TrainState:
  """Shape, dtype and sharding of every leaf; allocates nothing."""
  boxed = jax.eval_shape(lambda: _init(cfg, jax.random.key(0)))
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    partitioning.unbox(boxed),
    partitioning.shardings(boxed, mesh),
  )


def init_state(cfg: config.Config, mesh: jax.sharding.Mesh) -> TrainState:
  """The state at step 0, made on the mesh from `train.seed`."""
  out = jax.tree.map(lambda x: x.sharding, abstract_state(cfg, mesh))
  create = jax.jit(lambda rng: partitioning.unbox(_init(cfg, rng)), out_shardings=out)
  return create(jax.random.key(cfg.train.seed))


def batch_loss(
  cfg: config.Config, params: Any, batch: Batch, num_targets: Array, num_tokens: Array
) -> tuple[Array, tuple[Array, Array | None]]:
  """This (micro-)batch's share of the loss of the whole batch.

  Args:
    cfg: the run.
    params: weights.
    batch: tokens, targets, positions, segment_ids, each [B, L] int32.
    num_targets: [] real targets of the whole batch; the cross-entropy's denominator.
    num_tokens: [] real tokens of the whole batch; the balance loss's denominator.

  Returns:
    (the loss that is minimised, (its cross-entropy part, load [layers, E])); shares of
    micro-batches add up to the values of the whole batch.
  """
  out = transformer.Transformer(cfg.model).apply(
    {'params': params}, batch['tokens'], batch['positions'], batch['segment_ids']
  )
  with jax.named_scope('head_loss'):
    cross_entropy, z = losses.next_token(out.logits, batch['targets'])
  cross_entropy /= num_targets
  total = cross_entropy + cfg.train.z_loss_weight * z / num_targets
  if out.stats is None:
    return total, (cross_entropy, None)
  balance_loss = out.stats.load_balance_loss.sum() / num_tokens
  total += cfg.model.moe.load_balance_loss_weight * balance_loss
  return total, (cross_entropy, out.stats.load)


def gradients(cfg: config.Config, params: Any, batch: Batch) -> tuple[Array, Array | None, Any]:
  """(cross-entropy, load, gradients) of a global batch, accumulated over micro-batches if asked."""
  num_targets = jnp.maximum((batch['targets'] >= 0).sum(), 1)
  num_tokens = jnp.maximum((batch['segment_ids'] > 0).sum(), 1)
  grad_fn = jax.value_and_grad(functools.partial(batch_loss, cfg), has_aux=True)

  def share(micro: Batch):
    (_, (cross_entropy, load)), grads = grad_fn(params, micro, num_targets, num_tokens)
    return cross_entropy, load, grads

  batch_size = batch['tokens'].shape[0]
  num_micro = batch_size // (cfg.train.micro_batch_size or batch_size)
  if num_micro == 1:
    return share(batch)
  # Micro-batch i takes rows i, i + n, i + 2n ...: every device keeps its own rows.
  split = lambda x: x.reshape(-1, num_micro, x.shape[-1]).swapaxes(0, 1)
  micros = jax.tree.map(split, batch)
  shapes = jax.eval_shape(share, jax.tree.map(lambda x: x[0], micros))
  # Sums of bfloat16 gradients would lose the small ones: floats add up in float32.
  wide = lambda dtype: jnp.float32 if jnp.issubdtype(dtype, jnp.floating) else dtype
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, wide(s.dtype)), shapes)
  add = lambda total, micro: (jax.tree.map(jnp.add, total, share(micro)), None)
  cross_entropy, load, grads = jax.lax.scan(add, zeros, micros)[0]
  return cross_entropy, load, jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)


def make_train_step(cfg: config.Config, mesh: jax.sharding.Mesh) -> Any:
  """The jitted step: (state, batch) -> (state, StepMetrics). The state is donated.

  Trace and call it under `partitioning.activate(mesh)`.
  """
  schedule = optim.learning_rate(cfg.optim, cfg.train.num_steps)
  optimizer = optim.optimizer(cfg.optim, cfg.train.num_steps)

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
    loss, load, grads = gradients(cfg, state.params, batch)
    with jax.named_scope('optimizer'):
      updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
      params = optax.apply_updates(state.params, updates)
    metrics = StepMetrics(loss, schedule(state.step), optax.tree.norm(grads), load)
    return TrainState(state.step + 1, params, opt_state), metrics

  out = jax.tree.map(lambda x: x.sharding, abstract_state(cfg, mesh))
  replicated = jax.NamedSharding(mesh, jax.P())
  return jax.jit(train_step, donate_argnums=0, out_shardings=(out, replicated))


class StopSignal:
  """Turns SIGTERM and SIGINT into a flag that the loop reads between steps.

  A second signal ends the program at once, as the first would have without this.
  """

  def __init__(self):
    self.name = ''

  def __enter__(self) -> 'StopSignal':
    self._old = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
    return self

  def __exit__(self, *unused):
    for number, handler in self._old.items():
      signal.signal(number, handler)

  def _handle(self, number: int, unused_frame: Any):
    if self.name:
      raise KeyboardInterrupt
    self.name = signal.Signals(number).name


class StepReport(NamedTuple):
  """What the loop hands to its caller after each step."""

  step: int  # optimizer steps done, this one included
  state: TrainState
  metrics: StepMetrics


def steps(
  cfg: config.Config,
  mesh: jax.sharding.Mesh,
  state: TrainState,
  batches: Iterator[dict[str, np.ndarray]],
  timer: metrics_lib.StepTimer,
) -> Iterator[StepReport]:
  """Runs one optimizer step per batch, a few steps ahead of the device, and yields after each.

  The yielded state is donated to the next step: use it before asking for the next report. Each
  batch size of a ramp is compiled when it first comes, and `timer` leaves that time out.
  """
  train_step = make_train_step(cfg, mesh)
  compiled = {}
  in_flight = collections.deque()
  step = int(state.step)
  while True:
    with timer.waiting():
      host_batch = next(batches, None)
    if host_batch is None:
      return
    batch = partitioning.put_batch({key: host_batch[key] for key in BATCH_KEYS}, mesh)
    shape = batch['tokens'].shape
    with partitioning.activate(mesh):
      if shape not in compiled:
        with timer.paused():
          compiled[shape] = train_step.lower(state, batch).compile()
      state, metrics = compiled[shape](state, batch)
    step += 1
    in_flight.append(metrics.loss)
    if len(in_flight) > MAX_IN_FLIGHT:
      in_flight.popleft().block_until_ready()
    timer.add_tokens(batch['tokens'].size)
    yield StepReport(step, state, metrics)


def host_metrics(metrics: StepMetrics) -> dict[str, float | None]:
  """Waits for a step and returns its scalars: loss, lr, grad_norm, max_vio (None if dense)."""
  values = jax.device_get(metrics)
  max_vio = None
  if values.load is not None:
    max_vio = float(balance.max_vio(np.asarray(values.load, np.float64)).mean())
  return {
    'loss': float(values.loss),
    'lr': float(values.lr),
    'grad_norm': float(values.grad_norm),
    'max_vio': max_vio,
  }
