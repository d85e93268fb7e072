"""Learning-rate schedules, the batch-size ramp and the AdamW chain."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from moe_jax import trees
from moe_jax.config import batch_sizes, schema
from moe_jax.training import loss_spikes, skipped_steps, value_head


def learning_rate(cfg: schema.OptimConfig, num_steps: int) -> optax.Schedule:
  """Linear warm-up from peak / W to `peak_lr` in W steps, then the schedule up to `num_steps`.

  multi_step multiplies by `multi_step_factor` at each boundary, a share of the whole run (DeepSeek
  LLM, section 2.3); cosine and linear fall to `final_lr_fraction` of the peak at the last step;
  stages hold a rate, or lead to it from the one before, one after the other (DeepSeek-V3).
  """
  decay_steps = max(num_steps - cfg.warmup_steps - 1, 1)  # the last step's rate is the final one
  end = cfg.peak_lr * cfg.final_lr_fraction
  if cfg.schedule == 'multi_step':
    after = {}
    for share in cfg.multi_step_boundaries:
      step = round(share * num_steps) - cfg.warmup_steps
      after[step] = after.get(step, 1.0) * cfg.multi_step_factor  # short runs may share a step
    main = optax.piecewise_constant_schedule(cfg.peak_lr, after)
  elif cfg.schedule == 'cosine':
    main = optax.cosine_decay_schedule(cfg.peak_lr, decay_steps, alpha=cfg.final_lr_fraction)
  elif cfg.schedule == 'linear':
    main = optax.linear_schedule(cfg.peak_lr, end, decay_steps)
  elif cfg.schedule == 'stages':
    main = _stages(cfg, num_steps)
  else:
    main = optax.constant_schedule(cfg.peak_lr)
  if not cfg.warmup_steps:
    return main
  # Step 0 already trains: the first of W warm-up steps has rate peak / W, not 0.
  w = cfg.warmup_steps
  warmup = optax.linear_schedule(cfg.peak_lr / w, cfg.peak_lr, max(w - 1, 1))
  return optax.join_schedules([warmup, main], [w])


def _stages(cfg: schema.OptimConfig, num_steps: int) -> optax.Schedule:
  """The pieces of `cfg.stages`; their step 0 ends the warm-up."""
  parts, ends, start, level = [], [], cfg.warmup_steps, 1.0
  for share, fraction, shape in cfg.stages:
    end = round(share * num_steps)
    rate, target, steps = cfg.peak_lr * level, cfg.peak_lr * fraction, max(end - start, 1)
    if shape == 'cosine':
      parts.append(optax.cosine_decay_schedule(rate, steps, alpha=fraction / level))
    elif shape == 'linear':
      parts.append(optax.linear_schedule(rate, target, steps))
    else:
      parts.append(optax.constant_schedule(target))
    ends.append(end - cfg.warmup_steps)
    start, level = end, fraction
  return optax.join_schedules(parts, ends[:-1])


def tokens_at(cfg: schema.TrainConfig, max_seq_len: int, steps: Sequence[int]) -> list[int]:
  """Tokens that a run was trained on after each of `steps`, every row counted as full."""
  sizes = batch_sizes.of(cfg)
  return [sizes.before(step) * max_seq_len for step in steps]


def mtp_weight(cfg: schema.TrainConfig, step: jax.Array) -> jax.Array:
  """[] float32, lambda of multi-token prediction at `step`: the ramp's, or `mtp_loss_weight`."""
  weight = jnp.float32(cfg.mtp_loss_weight)
  for share, value in reversed(cfg.mtp_loss_ramp):
    weight = jnp.where(step < share * cfg.num_steps, value, weight)
  return weight


def decay_mask(params: trees.Tree) -> trees.Tree:
  """True for the matrices, False for norm scales and the value head's bias: only matrices decay.

  Told by name, because the scales of stacked layers are two-dimensional too.
  """

  def is_matrix(path, _):
    names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
    return names[-1] not in ('scale', 'bias')

  return jax.tree_util.tree_map_with_path(is_matrix, params)


class Rested(NamedTuple):
  """Updates that the value head has seen alone; beside Adam's state where a policy may rest."""

  count: jax.Array  # [] int32


def optimizer(
  cfg: schema.OptimConfig, num_steps: int, *, rests: bool = False
) -> optax.GradientTransformationExtraArgs:
  """Global-norm clipping, then AdamW with decoupled decay scaled by the learning rate.

  `update(..., applied=flag)` leaves the moments alone where the [] bool `flag` is False; what the
  learning-rate schedule counts goes on. With `rests`, `update(..., resting=flag)` says whether all
  gradients but those of the value head are 0 because the policy rests.

  Args:
    cfg: rate, decays and clipping.
    num_steps: of the run.
    rests: whether the policy rests in some steps, see `value_head.may_rest`.
  """
  clip = [optax.clip_by_global_norm(cfg.clip_norm)] if cfg.clip_norm else []
  adamw = optax.chain(
    _adam_that_rests(cfg) if rests else _adam(cfg),
    optax.add_decayed_weights(cfg.weight_decay, decay_mask),
    optax.scale_by_learning_rate(learning_rate(cfg, num_steps)),
  )
  spikes = [loss_spikes.recent(cfg.spike_window)] if cfg.spike_sigma else []
  return optax.chain(*spikes, *clip, _kept_in(jnp.dtype(cfg.moment_dtype), adamw))


def _adam(cfg: schema.OptimConfig) -> optax.GradientTransformationExtraArgs:
  """`optax.scale_by_adam` that can leave its moments alone.

  Its update is computed from the moments that are kept: computed from those of a step that may not
  be applied, it would need both in memory until the weights are updated.
  """
  adam = optax.scale_by_adam(cfg.beta1, cfg.beta2, cfg.eps)

  def update(
    updates: trees.Tree, state: Any, params: trees.Tree = None, **extra: Any
  ) -> tuple[Any, Any]:
    applied, new = extra.get('applied'), adam.update(updates, state, params)
    if applied is None:
      return new
    kept = skipped_steps.select(applied, new[1], state)
    return _direction(cfg, kept.mu, kept.nu, state.count + 1), kept

  return optax.GradientTransformationExtraArgs(adam.init, update)


def _direction(cfg: schema.OptimConfig, mu: trees.Tree, nu: trees.Tree, count: jax.Array) -> Any:
  """Adam's update from moments that have seen `count` gradients."""
  mu = optax.tree.bias_correction(mu, cfg.beta1, count)
  nu = optax.tree.bias_correction(nu, cfg.beta2, count)
  return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + cfg.eps), mu, nu)


def _adam_that_rests(cfg: schema.OptimConfig) -> optax.GradientTransformationExtraArgs:
  """`_adam` whose moments, but those of the value head, have seen no gradient while they rested.

  They are 0 until then; divided as if they had seen every step, the first updates would be of
  another size than the learning rate.
  """
  adam = _adam(cfg)

  def init(params: trees.Tree) -> Any:
    return adam.init(params), Rested(jnp.zeros((), jnp.int32))

  def update(
    updates: trees.Tree, state: Any, params: trees.Tree = None, **extra: Any
  ) -> tuple[Any, Any]:
    (before, rested), applied = state, extra['applied']
    both: Any = adam.update(updates, before, params, applied=applied)
    found, kept = both
    mu, nu = value_head.without(kept.mu), value_head.without(kept.nu)
    own = _direction(cfg, mu, nu, before.count + 1 - rested.count)
    total = rested.count + (applied & extra['resting'])
    return {**own, value_head.KEY: found[value_head.KEY]}, (kept, Rested(total))

  return optax.GradientTransformationExtraArgs(init, update)


def _kept_in(
  dtype: jnp.dtype, adamw: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
  """AdamW that keeps both moments in `dtype` between steps and computes with them in float32."""

  def is_adam(node):
    return isinstance(node, optax.ScaleByAdamState)

  def cast(state: trees.Tree, dtype: jnp.dtype) -> trees.Tree:
    def both(s):
      return s._replace(mu=optax.tree.cast(s.mu, dtype), nu=optax.tree.cast(s.nu, dtype))

    return jax.tree.map(lambda s: both(s) if is_adam(s) else s, state, is_leaf=is_adam)

  def update(
    updates: trees.Tree, state: Any, params: trees.Tree = None, **extra: Any
  ) -> tuple[Any, Any]:
    updates, state = adamw.update(updates, cast(state, jnp.float32), params, **extra)
    return updates, cast(state, dtype)

  if dtype == jnp.float32:
    return adamw
  return optax.GradientTransformationExtraArgs(
    lambda params: cast(adamw.init(params), dtype), update
  )
