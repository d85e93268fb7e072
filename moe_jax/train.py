"""Training: the state, one optimizer step, and the loop around it.

The loop resumes by these rules:
  1. The newest whole checkpoint decides the step; metrics past it are dropped, and the steps are
  redone. 2. The batch at step n is a pure function of (seed, n), so n is all the data pipeline
  needs. 3. State and batch being equal, the redone steps are bit-identical on the same hardware.
"""

import collections
import functools
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from moe_jax import (
  balance,
  bits,
  compile_options,
  config,
  config_moe,
  losses,
  optim,
  partitioning,
)
from moe_jax import metrics as metrics_lib
from moe_jax.models import transformer
from moe_jax.models.routers import state as router_state_lib

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
  seed: Array  # [] uint32, fixed; with the step it decides the random choices of routing
  params: Any  # nested dict of weights
  router_state: Any  # nested dict of what routing remembers; the optimizer never sees it
  opt_state: Any

  @property
  def variables(self) -> dict[str, Any]:
    """What the model is applied with."""
    return {'params': self.params, 'router_state': self.router_state}


@struct.dataclass
class StepMetrics:
  """What one step reports; left on the device until somebody logs it."""

  loss: Array  # [] float32, mean cross-entropy per real target, nats
  mtp_loss: Array | None  # [] float32, of multi-token prediction, mean over depths; None without
  aux_loss: Array  # [] float32, weighted sum of the balance losses
  lr: Array  # [] float32
  grad_norm: Array  # [] float32, before clipping
  stats: balance.RouterStats | None  # of the global batch, leaves [num_moe_layers, ...]


class Loss(NamedTuple):
  """Shares of a (micro-)batch; they add up to the values of the whole batch."""

  cross_entropy: Array  # [] float32
  mtp: Array | None  # [] float32, cross-entropy of multi-token prediction, mean over its depths
  aux: Array  # [] float32, weighted sum of the balance losses
  stats: balance.RouterStats | None  # leaves [MoE layers, ...], multi-token prediction's last


def _init(cfg: config.Config, rng: Array) -> TrainState:
  """A fresh state whose leaves are boxed with logical axis names."""
  with partitioning.without_mesh():  # the rows that shapes are made from are not to be split
    variables = transformer.init(cfg.model, rng)
  opt_state = optim.optimizer(cfg.optim, cfg.train.num_steps).init(variables['params'])
  # Not the number train.seed itself: a constant in the step's program would compile per seed.
  seed = jax.random.bits(rng, (), jnp.uint32)
  return TrainState(jnp.zeros((), jnp.int32), seed, opt_state=opt_state, **variables)


def abstract_state(cfg: config.Config, mesh: jax.sharding.Mesh) -> TrainState:
  """Shape, dtype and sharding of every leaf; allocates nothing."""
  boxed = jax.eval_shape(lambda: _init(cfg, jax.random.key(0)))
  shapes, shardings = partitioning.unbox(boxed), partitioning.shardings(boxed, mesh)
  if cfg.mesh.zero1:
    further = lambda s, x: partitioning.split_further(s, x.shape) if x.ndim else s
    opt_state = jax.tree.map(further, shardings.opt_state, shapes.opt_state)
    shardings = shardings.replace(opt_state=opt_state)
  struct_of = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
  return jax.tree.map(struct_of, shapes, shardings)


def init_state(cfg: config.Config, mesh: jax.sharding.Mesh) -> TrainState:
  """The state at step 0, made on the mesh from `train.seed`."""
  out = jax.tree.map(lambda x: x.sharding, abstract_state(cfg, mesh))
  create = jax.jit(lambda rng: partitioning.unbox(_init(cfg, rng)), out_shardings=out)
  return create(jax.random.key(cfg.train.seed))


def state_from(cfg: config.Config, mesh: jax.sharding.Mesh, params: Any) -> TrainState:
  """The state at step 0 with these weights, which lie on the mesh, in place of random ones."""
  out = jax.tree.map(lambda x: x.sharding, abstract_state(cfg, mesh))

  def create(rng: Array, params: Any) -> TrainState:
    # What the given weights replace is dead code to the compiler.
    state = partitioning.unbox(_init(cfg, rng))
    opt_state = optim.optimizer(cfg.optim, cfg.train.num_steps).init(params)
    return state.replace(params=params, opt_state=opt_state)

  create = jax.jit(create, out_shardings=out, donate_argnums=1)
  return create(jax.random.key(cfg.train.seed), params)


class Totals(NamedTuple):
  """Denominators of the whole batch."""

  targets: Array  # [] int32, real targets, of the cross-entropy
  tokens: Array  # [] int32, real tokens, of the balance losses


def batch_loss(
  cfg: config.Config,
  params: Any,
  router_state: Any,
  batch: Batch,
  seed: Array,
  totals: Totals,
  slopes: Mapping[str, Any] | None = None,
  mtp_weight: Array | None = None,
) -> tuple[Array, Loss]:
  """This (micro-)batch's share of the loss of the whole batch.

  Args:
    cfg: the run.
    params: weights.
    router_state: what routing remembers.
    batch: tokens, targets, positions, segment_ids, each [B, L] int32, and row [B] int32, the rows'
      numbers in the whole batch.
    seed: [] uint32, decides the random choices of routing in this step.
    totals: of the whole batch.
    slopes: `balance.global_slopes` of the whole batch, when this is only a part of it.
    mtp_weight: lambda of multi-token prediction; None is `train.mtp_loss_weight`.

  Returns:
    (the loss that is minimised, its parts).
  """
  out = transformer.Transformer(cfg.model, train=True).apply(
    {'params': params, 'router_state': router_state},
    batch['tokens'],
    batch['positions'],
    batch['segment_ids'],
    targets=batch['targets'],
    row=batch['row'],
    seed=seed,
    slopes=slopes,
  )
  head_loss = functools.partial(losses.head_loss, head=params['head'], chunk=cfg.train.loss_chunk)
  with jax.named_scope('head_loss'):
    found = head_loss(out.normed, targets=batch['targets'], z_weight=cfg.train.z_loss_weight)
  total, cross_entropy = found.total / totals.targets, found.cross_entropy / totals.targets
  mtp, stats = None, out.stats
  if out.mtp is not None:
    with jax.named_scope('mtp_loss'):
      # Over the targets of the main model too, though the last tokens have none (V3, Eq. 24-25).
      depths = [
        head_loss(normed, targets=targets, z_weight=0.0).total
        for normed, targets in zip(out.mtp.normed, out.mtp.targets)
      ]
    mtp = sum(depths) / (len(depths) * totals.targets)
    total += (cfg.train.mtp_loss_weight if mtp_weight is None else mtp_weight) * mtp
    if stats is not None:
      stats = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), stats, out.mtp.stats)
  if stats is None:
    return total, Loss(cross_entropy, mtp, jnp.float32(0), None)
  aux = aux_loss(cfg.model.moe, transformer.moe_state(router_state), stats) / totals.tokens
  return total + aux, Loss(cross_entropy, mtp, aux, stats)


def aux_loss(
  moe: config_moe.MoEConfig, state: Mapping[str, Array], stats: balance.RouterStats
) -> Array:
  """Weighted sum over losses and layers of the balance losses, times the number of tokens."""
  total = jnp.float32(0)
  for name, values in stats.losses.items():
    weight = moe.loss(name).weight
    if name == moe.balance.adaptive.loss:
      weight = state['loss_coefficient']
    elif not weight:
      continue
    total += (weight * values).sum()
  return total


def _split(batch: Batch, num_micro: int) -> Batch:
  """[B, ...] -> [num_micro, B / num_micro, ...].

  Micro-batch i takes rows i, i + n, i + 2n ...: every device keeps its own rows.
  """
  return jax.tree.map(lambda x: x.reshape(-1, num_micro, *x.shape[1:]).swapaxes(0, 1), batch)


def _accumulate(share: Callable[[Batch], Any], micros: Batch) -> Any:
  """The sum of share(micro) over the micro-batches; floats add up in float32.

  Sums of bfloat16 gradients would lose the small ones.
  """
  shapes = jax.eval_shape(share, jax.tree.map(lambda x: x[0], micros))
  wide = lambda dtype: jnp.float32 if jnp.issubdtype(dtype, jnp.floating) else dtype
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, wide(s.dtype)), shapes)
  add = lambda total, micro: (jax.tree.map(jnp.add, total, share(micro)), None)
  return jax.lax.scan(add, zeros, micros)[0]


def gradients(
  cfg: config.Config,
  params: Any,
  router_state: Any,
  batch: Batch,
  seed: Array,
  mtp_weight: Array | None = None,
) -> tuple[Loss, Any]:
  """(loss, gradients) of a global batch, accumulated over micro-batches if asked.

  `mtp_weight` is lambda of multi-token prediction; None is `train.mtp_loss_weight`.

  A balance loss over the whole batch is no sum over its parts. With accumulation a first, forward
  pass then counts, and the second adds up the exact gradient from it (`balance.global_slopes`).
  """
  batch = {**batch, 'row': jnp.arange(len(batch['tokens']), dtype=jnp.int32)}
  totals = Totals(
    jnp.maximum((batch['targets'] >= 0).sum(), 1), jnp.maximum((batch['segment_ids'] > 0).sum(), 1)
  )
  loss_fn = functools.partial(batch_loss, cfg)

  def share(micro: Batch, slopes: Any = None) -> tuple[Loss, Any]:
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (_, loss), grads = grad_fn(params, router_state, micro, seed, totals, slopes, mtp_weight)
    return loss, grads

  num_micro = len(batch['tokens']) // (cfg.train.micro_batch_size or len(batch['tokens']))
  if num_micro == 1:
    return share(batch)
  micros, slopes = _split(batch, num_micro), None
  if _counts_first(cfg.model):
    count = lambda micro: loss_fn(params, router_state, micro, seed, totals)[1].stats
    slopes = balance.global_slopes(cfg.model.moe, _accumulate(count, micros))
  loss, grads = _accumulate(functools.partial(share, slopes=slopes), micros)
  if loss.stats is not None:
    stats = balance.refreshed(cfg.model.moe, loss.stats)
    aux = aux_loss(cfg.model.moe, transformer.moe_state(router_state), stats) / totals.tokens
    loss = loss._replace(stats=stats, aux=aux)
  return loss, jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)


def _counts_first(model: config.ModelConfig) -> bool:
  """Whether a loss that is minimised averages over the whole batch."""
  minimised = lambda name: model.moe.loss(name).weight or name == model.moe.balance.adaptive.loss
  return model.is_moe and any(
    model.moe.loss(name).scope == 'global_batch' and minimised(name) for name in config_moe.LOSSES
  )


def next_router_state(
  cfg: config.Config, router_state: Any, stats: balance.RouterStats | None, step: Array
) -> Any:
  """What routing remembers after a step whose number was `step` and whose figures were `stats`."""
  state = transformer.moe_state(router_state)
  if not state or stats is None:
    return router_state
  share = step / cfg.train.num_steps
  new = router_state_lib.update(cfg.model.moe, state, stats, share)
  return transformer.with_moe_state(cfg.model, new)


def step_function(
  cfg: config.Config, as_moments: Callable[[Any], Any] = lambda tree: tree
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
  """One optimizer step, (state, batch) -> (state, StepMetrics), as a pure function to be compiled.

  Args:
    cfg: the run.
    as_moments: lays out parameters and gradients as the optimizer's moments lie.
  """
  schedule = optim.learning_rate(cfg.optim, cfg.train.num_steps)
  optimizer = optim.optimizer(cfg.optim, cfg.train.num_steps)

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
    seed = bits.combine(state.seed, state.step)
    mtp_weight = optim.mtp_weight(cfg.train, state.step)
    loss, grads = gradients(cfg, state.params, state.router_state, batch, seed, mtp_weight)
    with jax.named_scope('optimizer'):
      grads, params = as_moments(grads), as_moments(state.params)
      updates, opt_state = optimizer.update(grads, state.opt_state, params)
      params = as_moments(optax.apply_updates(params, updates))
      norm = optax.tree.norm(grads)
    with jax.named_scope('router_state'):
      router_state = next_router_state(cfg, state.router_state, loss.stats, state.step)
    metrics = StepMetrics(
      loss.cross_entropy, loss.mtp, loss.aux, schedule(state.step), norm, loss.stats
    )
    state = TrainState(state.step + 1, state.seed, params, router_state, opt_state)
    return state, metrics

  return train_step


def make_train_step(cfg: config.Config, mesh: jax.sharding.Mesh) -> Any:
  """The jitted step: (state, batch) -> (state, StepMetrics). The state is donated.

  Trace and call it under `partitioning.activate(mesh)`.
  """
  out = jax.tree.map(lambda x: x.sharding, abstract_state(cfg, mesh))

  def as_moments(tree: Any) -> Any:
    """ZeRO-1: the update is computed where the moments lie, then parameters are gathered."""
    if not cfg.mesh.zero1:
      return tree
    further = lambda x, s: partitioning.split_further(s, x.shape)
    return jax.lax.with_sharding_constraint(tree, jax.tree.map(further, tree, out.params))

  replicated = jax.NamedSharding(mesh, jax.P())
  return jax.jit(
    step_function(cfg, as_moments),
    donate_argnums=0,
    out_shardings=(out, replicated),
    compiler_options=compile_options.for_step(mesh),
  )


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


class Profile(Protocol):
  """Watches the steps from `first` to `last`; see `analysis.profile.Window`."""

  first: int
  last: int

  def start(self, hlo_text_of_program: str):
    """Called before the first one is launched."""

  def stop(self):
    """Called when the last one is done."""


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
  profile: Profile | None = None,
  *,
  train_step: Any = None,
  put: Callable[[Batch, jax.sharding.Mesh], Batch] = partitioning.put_batch,
) -> Iterator[StepReport]:
  """Runs one optimizer step per batch, a few steps ahead of the device, and yields after each.

  The yielded state is donated to the next step: use it before asking for the next report. Each
  batch size of a ramp is compiled when it first comes, and `timer` leaves that time out, as
  it does that of starting and reading a profile. `seeds` has a `train_step` and a `put` of its own:
  the jitted step, and what lays a batch of this process onto the mesh.
  """
  train_step = train_step or make_train_step(cfg, mesh)
  compiled = {}
  in_flight = collections.deque()
  step = int(np.ravel(state.step)[0])  # of several seeds all are the same
  while True:
    with timer.waiting():
      host_batch = next(batches, None)
    if host_batch is None:
      return
    batch = put({key: host_batch[key] for key in BATCH_KEYS}, mesh)
    shape = batch['tokens'].shape
    with partitioning.activate(mesh):
      if shape not in compiled:
        with timer.paused():
          compiled[shape] = train_step.lower(state, batch).compile()
      if profile is not None and step + 1 == profile.first:
        with timer.paused():
          profile.start(compiled[shape].as_text())
      state, metrics = compiled[shape](state, batch)
    step += 1
    if profile is not None and step == profile.last:
      jax.block_until_ready((state, metrics))  # these steps' time counts, that of reading does not
      with timer.paused():
        profile.stop()
    in_flight.append(metrics.loss)
    if len(in_flight) > MAX_IN_FLIGHT:
      in_flight.popleft().block_until_ready()
    timer.add_tokens(batch['tokens'].size)
    yield StepReport(step, state, metrics)


def host_metrics(metrics: StepMetrics) -> dict[str, float | None]:
  """Waits for a step and returns its scalars; those of routing are None for a dense model.

  Keys: loss, mtp_loss (None without multi-token prediction), lr, grad_norm, aux_loss, max_vio,
  drop_rate (means over the layers) and overflow_rate, the share of all chosen assignments that did
  not fit the buffers of the exchange.
  """
  stats = metrics.stats
  stats = None if stats is None else (stats.sums.load, stats.dropped, stats.overflow)
  scalars = (metrics.loss, metrics.mtp_loss, metrics.lr, metrics.grad_norm, metrics.aux_loss)
  (loss, mtp_loss, lr, grad_norm, aux), stats = jax.device_get((scalars, stats))
  max_vio = drop_rate = overflow = None
  if stats is not None:
    load, dropped, lost = (np.asarray(a, np.float64) for a in stats)
    overflow = float(lost.sum() / max(load.sum(), 1))
    max_vio = float(balance.max_vio(load).mean())
    drop_rate = float((dropped.sum(-1) / np.maximum(load.sum(-1), 1)).mean())
  return {
    'loss': float(loss),
    'mtp_loss': None if mtp_loss is None else float(mtp_loss),
    'lr': float(lr),
    'grad_norm': float(grad_norm),
    'aux_loss': None if stats is None else float(aux),
    'max_vio': max_vio,
    'drop_rate': drop_rate,
    'overflow_rate': overflow,
  }
