"""One optimizer step as a pure function, and compiled for a mesh."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from moe_jax import integer_hash, trees
from moe_jax.balance import router_stats
from moe_jax.config import schema
from moe_jax.devices import compile_options, partitioning
from moe_jax.models import model_variables
from moe_jax.models.routers import state as state_lib
from moe_jax.training import (
  loss_spikes,
  objective,
  optim,
  policy_loss,
  preference_loss,
  skipped_steps,
  train_state,
  trainable,
  value_head,
)

Array = jax.Array
Batch = dict[str, Array]


@struct.dataclass
class StepMetrics:
  """Metrics of one step, kept on the device until they are logged."""

  loss: (
    Array  # [] float32, cross-entropy per real target, loss per pair of preferences, or of a policy
  )
  mtp_loss: Array | None  # [] float32, of multi-token prediction, mean over depths; None without
  aux_loss: Array  # [] float32, weighted sum of the balance losses
  lr: jax.typing.ArrayLike  # [] float32
  grad_norm: Array  # [] float32, before clipping
  stats: router_stats.RouterStats | None  # of the global batch, leaves [num_moe_layers, ...]
  skipped: skipped_steps.Skipped  # this step included
  # Of the global batch, sums over pairs of preferences or over tokens of answers.
  figures: preference_loss.Figures | policy_loss.Figures | None = None


def host_metrics(metrics: StepMetrics) -> dict[str, float | None]:
  """Waits for a step and returns its scalars; those of routing are None for a dense model.

  Keys: loss, mtp_loss (None without multi-token prediction), lr, grad_norm, aux_loss, max_vio,
  drop_rate (means over the layers), overflow_rate, the share of all chosen assignments that did
  not fit the buffers of the exchange, and skipped_steps, of all steps so far; and the means of
  `preference_loss.Figures` or `policy_loss.Figures`.
  """
  stats = metrics.stats
  stats = None if stats is None else (stats.sums.load, stats.dropped, stats.overflow)
  scalars = (metrics.loss, metrics.mtp_loss, metrics.lr, metrics.grad_norm, metrics.aux_loss)
  (loss, mtp_loss, lr, grad_norm, aux), stats, skipped, figures = jax.device_get(
    (scalars, stats, metrics.skipped.total, metrics.figures)
  )
  max_vio = drop_rate = overflow = None
  if stats is not None:
    load, dropped, lost = (np.asarray(a, np.float64) for a in stats)
    overflow = float(lost.sum() / max(load.sum(), 1))
    max_vio = float(router_stats.max_vio(load).mean())
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
    'skipped_steps': int(skipped),
    **({} if figures is None else figures.means()),
  }


def next_router_state(
  cfg: schema.Config,
  router_state: trees.RouterState,
  stats: router_stats.RouterStats | None,
  step: Array,
) -> Any:
  """What routing remembers after a step whose number was `step` and whose figures were `stats`."""
  state = model_variables.moe_state(router_state)
  if not state or stats is None:
    return router_state
  share = step / cfg.train.num_steps
  new = state_lib.update(cfg.model.moe, state, stats, share)
  return model_variables.with_moe_state(cfg.model, new)


def step_function(
  cfg: schema.Config, as_moments: Callable[[Any], Any] = lambda tree: tree
) -> Callable[[train_state.TrainState, Batch], tuple[train_state.TrainState, StepMetrics]]:
  """One optimizer step, (state, batch) -> (state, StepMetrics), as a pure function to be compiled.

  A step whose loss or gradient is not finite changes nothing but `step`, see `skipped_steps`; so
  does one far above those before it, where `optim.spike_sigma` asks for that, see `loss_spikes`.

  Args:
    cfg: the run.
    as_moments: lays out trained weights and gradients as the optimizer's moments lie.
  """
  schedule = optim.learning_rate(cfg.optim, cfg.train.num_steps)
  rests = value_head.may_rest(cfg)
  optimizer = optim.optimizer(cfg.optim, cfg.train.num_steps, rests=rests)

  def train_step(
    state: train_state.TrainState, batch: Batch
  ) -> tuple[train_state.TrainState, StepMetrics]:
    seed = integer_hash.combine(state.seed, state.step)
    mtp_weight = optim.mtp_weight(cfg.train, state.step)
    loss, grads = objective.gradients(
      cfg, state.params, state.router_state, batch, seed, mtp_weight
    )
    before = skipped_steps.count(state.opt_state, state.step)
    with jax.named_scope('optimizer'):
      grads, trained = as_moments(grads), as_moments(trainable.select(cfg, state.params))
      resting = value_head.rests(cfg, state.step)
      grads = value_head.alone(resting, grads, jax.tree.map(jnp.zeros_like, grads))
      norm = optax.tree.norm(grads)
      losses = loss.main + loss.aux + (0 if loss.mtp is None else loss.mtp)
      applied = skipped_steps.is_applied(losses, norm, before, cfg.train.max_skipped_steps)
      if cfg.optim.spike_sigma:
        most = before.in_row < cfg.train.max_skipped_steps  # a spike alone ends no run
        figures = loss.main, norm
        applied &= ~(most & loss_spikes.is_spike(state.opt_state, *figures, cfg.optim.spike_sigma))
      opt_state = skipped_steps.at_step(state.opt_state, state.step)
      flags = {'applied': applied} | ({} if resting is None else {'resting': resting})
      updates, opt_state = optimizer.update(grads, opt_state, trained, **flags)
      new = optax.apply_updates(trained, value_head.scaled(cfg, updates))
      trained = skipped_steps.select(applied, value_head.alone(resting, new, trained), trained)
      in_row = jnp.where(applied, 0, before.in_row + 1)
      opt_state = skipped_steps.at_step(opt_state, state.step + 1 - in_row)
      if cfg.optim.spike_sigma:
        opt_state = loss_spikes.with_figures(opt_state, loss.main, norm)
      params = trainable.merge(cfg, state.params, as_moments(trained))
    with jax.named_scope('router_state'):
      router_state = next_router_state(cfg, state.router_state, loss.stats, state.step)
      routes = applied if resting is None else applied & ~resting
      router_state = skipped_steps.select(routes, router_state, state.router_state)
    skipped = skipped_steps.count(opt_state, state.step + 1)
    rate = schedule(state.step)
    metrics = StepMetrics(
      loss.main, loss.mtp, loss.aux, rate, norm, loss.stats, skipped, loss.figures
    )
    reference = state.reference
    if reference is not None and cfg.objective.policy.reference_every:
      every = cfg.objective.policy.reference_every * cfg.objective.policy.updates
      renewed = (state.step + 1) % every == 0
      reference = skipped_steps.select(renewed, params, reference)
    state = train_state.TrainState(
      state.step + 1, state.seed, params, router_state, opt_state, reference
    )
    return state, metrics

  return train_step


def make_train_step(cfg: schema.Config, mesh: jax.sharding.Mesh) -> Any:
  """The jitted step: (state, batch) -> (state, StepMetrics). The state is donated.

  Trace and call it under `partitioning.activate(mesh)`.
  """
  out = jax.tree.map(lambda x: x.sharding, train_state.abstract_state(cfg, mesh))

  layout = train_state.trained_shardings(cfg, mesh) if cfg.mesh.zero1 else None

  def as_moments(tree: trees.Tree) -> Any:
    """ZeRO-1: the update is computed where the moments lie, then parameters are gathered."""
    if layout is None:
      return tree

    def further(x, s):
      return partitioning.split_further(s, x.shape)

    return jax.lax.with_sharding_constraint(tree, jax.tree.map(further, tree, layout))

  replicated = jax.NamedSharding(mesh, jax.P())
  return jax.jit(
    step_function(cfg, as_moments),
    donate_argnums=0,
    out_shardings=(out, replicated),
    compiler_options=compile_options.for_step(mesh),
  )
