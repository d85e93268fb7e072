"""Steps that are skipped because their loss or gradient norm rises far above those before (OLMo).

The rule of OLMo-core's `SkipStepOptimizer`: a step is not applied if its loss, or its gradient
norm, lies more than `optim.spike_sigma` standard deviations above the mean of the last
`optim.spike_window` steps. The figures of a skipped step join the window, so a lasting rise is
accepted after a while; those that are not finite do not.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from moe_jax import trees

Array = jax.Array


class RecentFigures(NamedTuple):
  """The last losses and gradient norms, in the optimizer's state and so in its checkpoints."""

  losses: Array  # [spike_window] float32, a ring: place n modulo its size
  norms: Array  # [spike_window] float32
  seen: Array  # [] int32, how many there were


def recent(window: int) -> optax.GradientTransformation:
  """Passes updates on; its state is the window, which `with_figures` fills."""

  def init(params: optax.Params) -> RecentFigures:
    del params
    # Two arrays: a step donates each buffer once.
    return RecentFigures(jnp.zeros(window), jnp.zeros(window), jnp.zeros((), jnp.int32))

  return optax.GradientTransformation(init, lambda updates, state, params=None: (updates, state))


def is_spike(opt_state: trees.Tree, loss: Array, norm: Array, sigma: float) -> Array:
  """Whether a step is far above the window before it, [] bool; never before it is half full.

  Args:
    opt_state: before the step, of an optimizer with `recent`.
    loss: [] float32, mean cross-entropy of the step.
    norm: [] float32, global gradient norm.
    sigma: `optim.spike_sigma`.
  """
  (found,) = [node for node in _nodes(opt_state) if _is_recent(node)]
  size = found.losses.size
  filled = jnp.arange(size) < found.seen

  def far(value: Array, before: Array) -> Array:
    mean = jnp.mean(before, where=filled)
    return value - mean > sigma * jnp.std(before, where=filled, ddof=1)

  enough = found.seen >= max(2, size // 2)
  return enough & (far(loss, found.losses) | far(norm, found.norms))


def with_figures(opt_state: trees.Tree, loss: Array, norm: Array) -> Any:
  """The optimizer's state with the figures of a step in its window, if they are finite."""

  def after(node: Any) -> Any:
    if not _is_recent(node):
      return node
    finite, place = jnp.isfinite(loss) & jnp.isfinite(norm), node.seen % node.losses.size
    losses = node.losses.at[place].set(jnp.where(finite, loss, node.losses[place]))
    norms = node.norms.at[place].set(jnp.where(finite, norm, node.norms[place]))
    return RecentFigures(losses, norms, node.seen + finite)

  return jax.tree.map(after, opt_state, is_leaf=_is_recent)


def _nodes(opt_state: trees.Tree) -> list[Any]:
  return jax.tree.leaves(opt_state, is_leaf=_is_recent)


def _is_recent(node: Any) -> bool:
  return isinstance(node, RecentFigures)
