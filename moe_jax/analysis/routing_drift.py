"""How far the routing of a tuned model is from that of its start, on the same tokens.

Fine-tuning of a mixture of experts moves two things: which experts a token goes to, and the weights
of the experts themselves. Both are measured per MoE layer. `kept_share` is OLMoE's router
saturation (arXiv 2409.02060, section 5.1) between the start and the tuned model.

Axis letters are those of `moe_jax.models`; `layers` are the MoE layers, T the real tokens.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import errors, trees
from moe_jax.analysis import observations
from moe_jax.analysis.probes import saturation
from moe_jax.balance import router_stats
from moe_jax.config import schema
from moe_jax.models import model_variables

_ROUTED = ('gate_up', 'down')


class Drift(NamedTuple):
  """What changed from the start to a tuned model; arrays of float64, one row per MoE layer."""

  kept_share: np.ndarray  # [layers] of the start's choices, those that the token still makes
  same_experts: np.ndarray  # [layers] share of tokens with the same set of experts
  load_shift: np.ndarray  # [layers] share of assignments that lie on other experts; 0..1
  divergence: np.ndarray  # [layers] KL(start, tuned) of the normalised scores, nats per token
  load_before: np.ndarray  # [layers, E] share of assignments, of the start
  load_after: np.ndarray  # [layers, E] the same, of the tuned model
  max_vio_before: np.ndarray  # [layers] max load / mean load - 1
  max_vio_after: np.ndarray  # [layers]
  experts_moved: np.ndarray  # [layers, E] |W' - W| / |W| of an expert's matrices together
  router_moved: np.ndarray  # [layers] the same of the router; NaN where it has no weights


def check(start: schema.ModelConfig, tuned: schema.ModelConfig):
  """Refuses two models whose experts are not each other's.

  Raises:
    errors.InputError: names the first field that differs.
  """
  for field in ('num_experts', 'num_experts_per_tok', 'moe_mlp_dim', 'router'):
    one, other = getattr(start.moe, field), getattr(tuned.moe, field)
    errors.require(
      one == other,
      f'config.model.moe.{field} is {one!r} at the start and {other!r} in the tuned run: their '
      'experts are not the same; name the run whose weights the tuned one started from (--start)',
    )
  for field in ('num_moe_layers', 'num_dense_layers', 'embed_dim', 'vocab_size'):
    one, other = getattr(start, field), getattr(tuned, field)
    errors.require(
      one == other,
      f'config.model: {field} is {one!r} at the start and {other!r} in the tuned run; name the run '
      'whose weights the tuned one started from (--start)',
    )


def between(
  before: observations.Observations,
  after: observations.Observations,
  start: trees.Params,
  tuned: trees.Params,
) -> Drift:
  """The drift, from what two models did with the same rows, and from their weights.

  Args:
    before: of the start.
    after: of the tuned model.
    start: the start's parameters.
    tuned: the tuned model's.

  Raises:
    ValueError: the rows are not the same.
  """
  if not np.array_equal(before.tokens, after.tokens):
    raise ValueError('before and after must be observations of the same rows')
  num_experts = before.num_experts
  old, new = (one.of_tokens(one.expert_idx) for one in (before, after))  # [layers, T, K]
  counts = [np.stack([_load(layer, num_experts) for layer in one]) for one in (old, new)]
  shares = [count / np.maximum(count.sum(axis=1, keepdims=True), 1) for count in counts]
  experts, router = weights_moved(start, tuned, before.num_layers)
  return Drift(
    kept_share=np.array([saturation.kept_share(a, b, num_experts) for a, b in zip(old, new)]),
    same_experts=(np.sort(old) == np.sort(new)).all(axis=2).mean(axis=1),
    load_shift=np.abs(shares[0] - shares[1]).sum(axis=1) / 2,
    divergence=_divergence(before.of_tokens(before.scores), after.of_tokens(after.scores)),
    load_before=shares[0],
    load_after=shares[1],
    max_vio_before=router_stats.max_vio(counts[0]),
    max_vio_after=router_stats.max_vio(counts[1]),
    experts_moved=experts,
    router_moved=router,
  )


def _load(expert_idx: np.ndarray, num_experts: int) -> np.ndarray:
  """[T, K] -> [E] assignments; E = no expert is not counted."""
  return np.bincount(expert_idx.ravel(), minlength=num_experts + 1)[:num_experts]


def _divergence(before: np.ndarray, after: np.ndarray) -> np.ndarray:
  """[layers, T, E] twice -> [layers], mean over tokens of KL of the scores over their sum."""
  p, q = (one.astype(np.float64) for one in (before, after))
  p, q = (one / np.maximum(one.sum(axis=-1, keepdims=True), 1e-30) for one in (p, q))
  terms = np.where(p > 0, p * (np.log(np.maximum(p, 1e-30)) - np.log(np.maximum(q, 1e-30))), 0.0)
  return terms.sum(axis=-1).mean(axis=-1)


def weights_moved(
  start: trees.Params, tuned: trees.Params, num_layers: int
) -> tuple[np.ndarray, np.ndarray]:
  """Relative change of weights: ([layers, E] of each expert, [layers] of the router).

  The Euclidean norm of the change over that of the start, all matrices of an expert together. A
  router without parameters has NaN.
  """
  old, new = (model_variables.moe_params(one) for one in (start, tuned))
  experts = _relative(
    {key: old[key][:num_layers] for key in _ROUTED},
    {key: new[key][:num_layers] for key in _ROUTED},
    axes=2,
  )
  if 'router' not in old:
    return np.asarray(experts, np.float64), np.full(num_layers, np.nan)
  routers = [jax.tree.map(lambda a: a[:num_layers], one['router']) for one in (old, new)]
  return (
    np.asarray(experts, np.float64),
    np.asarray(_relative(routers[0], routers[1], axes=1), np.float64),
  )


def _relative(old: Any, new: Any, axes: int) -> jax.Array:
  """|new - old| / |old| over all but the first `axes` axes of all arrays of a tree."""

  def squares(tree: Any) -> jax.Array:
    parts = [
      jnp.square(a.astype(jnp.float32)).reshape(*a.shape[:axes], -1).sum(axis=-1)
      for a in jax.tree.leaves(tree)
    ]
    return jnp.sum(jnp.stack(parts), axis=0)

  change = jax.tree.map(lambda a, b: a.astype(jnp.float32) - b.astype(jnp.float32), new, old)
  return jnp.sqrt(squares(change) / jnp.maximum(squares(old), 1e-30))
