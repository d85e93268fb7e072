"""What is put back to the clean weights: by the indicator r = delta^2 / H, at random, or pruned.

After arXiv 2305.04547, reconstructed from its abstract (`moe_jax.analysis.purification`): drift of
harmless fine-tuning grows with curvature, so weights that moved far where the clean loss is flat
are suspicious. `reserve` is the share rho of weights that keep their tuned value.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_jax import errors, trees
from moe_jax.analysis.purification import fisher

RANKINGS = ('global', 'layer')
UNSEEN = ('keep', 'rank')
_EXPERTS = tuple(('moe_layers', 'moe', key) for key in fisher.ROUTED)
FLOOR = 1e-3  # of the mean curvature of a layer's leaf; below it weights count as equally flat


class Reset(NamedTuple):
  """Purified weights and what was done."""

  params: trees.Params
  kept: trees.Params  # bool, where the tuned value stayed
  unseen: np.ndarray  # [layers, E] bool, experts that no clean example has taught anything about
  ranked: int  # weights that took part in the ranking
  reset: int  # of them, those that were put back


def check_reserve(reserve: float):
  """Refuses a share outside of [0, 1].

  Raises:
    errors.InputError: names the flag.
  """
  errors.require(
    0 <= reserve <= 1,
    f'--reserve={reserve} must lie in [0, 1]: the share of weights that keep their tuned value; 1 '
    'keeps all, 0 none',
  )


def check_same(start: trees.Params, tuned: trees.Params):
  """Refuses two models of which one is not a tuning of the other.

  Raises:
    errors.InputError: names the first weight that differs in shape, or is missing.
  """
  old, new = by_path(start), by_path(tuned)
  for path in sorted(old.keys() | new.keys()):
    one, other = (tree[path].shape if path in tree else None for tree in (old, new))
    errors.require(
      one == other,
      f'params/{"/".join(path)} is {_shape(one)} in --base and {_shape(other)} in --workdir: a '
      'checkpoint of another architecture has no drift; name the run that was tuned from --base',
    )


def _shape(shape: tuple[int, ...] | None) -> str:
  return 'absent' if shape is None else str(list(shape))


def by_path(tree: trees.Params) -> dict[tuple[str, ...], np.ndarray]:
  """Leaves of nested dicts by the names that lead to them, on the host."""
  found, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {tuple(str(key.key) for key in path): np.asarray(leaf) for path, leaf in found}


def _like(tree: trees.Params, leaves: Mapping[tuple[str, ...], Any]) -> trees.Params:
  return jax.tree.unflatten(jax.tree.structure(tree), list(leaves.values()))


def indicator(
  start: trees.Params, tuned: trees.Params, diagonal: trees.Params, floor: float = FLOOR
) -> trees.Params:
  """r = delta^2 / max(H, floor x mean H of the layer's leaf), float64 in the shape of the weights.

  The floor is relative to the layer, so that a weight without curvature is suspicious by how far it
  moved. Where a whole leaf has no curvature and moved, r is infinite; where nothing moved, 0.

  Args:
    start: clean weights.
    tuned: the stranger's.
    diagonal: `fisher.Fisher.diagonal` at the tuned weights.
    floor: what curvature cannot fall below.

  Raises:
    errors.InputError: see `check_same`.
  """
  check_same(start, tuned)
  old, new, found = by_path(start), by_path(tuned), {}
  for path, curvature in by_path(diagonal).items():
    curvature = curvature.astype(np.float64)
    axes = tuple(range(1 if _is_stacked(path) else 0, curvature.ndim))
    least = floor * curvature.mean(axis=axes, keepdims=True)
    moved = np.square(new[path].astype(np.float64) - old[path])
    with np.errstate(divide='ignore', invalid='ignore'):
      ratio = moved / np.maximum(curvature, least)
    found[path] = np.where(moved > 0, ratio, 0.0)
  return _like(start, found)


def _is_stacked(path: tuple[str, ...]) -> bool:
  return path[0].endswith('_layers')


def keep_lowest(
  score: trees.Params,
  reserve: float,
  *,
  ranking: str = 'global',
  able: trees.Params | None = None,
) -> trees.Params:
  """Bool, True at the share `reserve` of weights with the smallest score; True where not `able`.

  Args:
    score: of every weight, higher is more suspicious; ties go by position.
    reserve: share rho.
    ranking: 'global' over the whole tree; 'layer' the same share of every layer, and of each leaf
      outside of the layers.
    able: bool, weights that take part; None for all.

  Raises:
    errors.InputError: the share or the ranking is not one.
  """
  check_reserve(reserve)
  errors.require(
    ranking in RANKINGS,
    f'--ranking={ranking} must be one of {", ".join(RANKINGS)}'
    f'{errors.did_you_mean(ranking, RANKINGS)}',
  )
  scores = by_path(score)
  ables = {path: np.ones(a.shape, bool) for path, a in scores.items()}
  if able is not None:
    ables = by_path(able)
  kept = {path: np.ones(a.shape, bool) for path, a in scores.items()}
  for group in _groups(scores, ranking):
    values = np.concatenate([scores[path][at][ables[path][at]] for path, at in group])
    mask = np.zeros(len(values), bool)
    mask[np.argsort(values, kind='stable')[: round(reserve * len(values))]] = True
    used = 0
    for path, at in group:
      here, view = ables[path][at], kept[path][at]
      count = int(here.sum())
      view[here] = mask[used : used + count]
      used += count
  return _like(score, kept)


def _groups(scores: Mapping[tuple[str, ...], np.ndarray], ranking: str):
  """Lists of (path, index) that are ranked together."""
  if ranking == 'global':
    return [[(path, (...,)) for path in scores]]
  groups: dict[Any, list[tuple[tuple[str, ...], Any]]] = {}
  for path, values in scores.items():
    if _is_stacked(path):
      for layer in range(len(values)):
        groups.setdefault((path[0], layer), []).append((path, (layer, ...)))
    else:
      groups[path] = [(path, (...,))]
  return list(groups.values())


def able_without(params: trees.Params, unseen: np.ndarray) -> trees.Params:
  """Bool, False at the weights of experts [layers, E] of which nothing is known."""
  able = {path: np.ones(a.shape, bool) for path, a in by_path(params).items()}
  for path in _EXPERTS:
    if path in able and unseen.size:
      able[path][unseen] = False
  return _like(params, able)


def purified(
  start: trees.Params,
  tuned: trees.Params,
  curvature: fisher.Fisher,
  reserve: float,
  *,
  ranking: str = 'global',
  unseen: str = 'keep',
) -> Reset:
  """Weights with the suspicious share put back to the clean ones.

  Args:
    start: clean weights.
    tuned: the stranger's.
    curvature: at the tuned weights, on clean examples.
    reserve: share rho of the ranked weights that stay tuned.
    ranking: see `keep_lowest`.
    unseen: experts that no clean example has reached: 'keep' leaves them out of the ranking and
      tuned, 'rank' lets their drift count over the floor of their layer's curvature.

  Raises:
    errors.InputError: bad shares or names; weights of another architecture.
  """
  errors.require(
    unseen in UNSEEN,
    f'--unseen={unseen} must be one of {", ".join(UNSEEN)}{errors.did_you_mean(unseen, UNSEEN)}',
  )
  check_reserve(reserve)
  score = indicator(start, tuned, curvature.diagonal)
  missing = ~curvature.seen
  left_out = missing if unseen == 'keep' else np.zeros_like(missing)
  return _reset(start, tuned, score, reserve, ranking, missing, left_out)


def mixed(start: trees.Params, tuned: trees.Params, reserve: float, seed: int) -> Reset:
  """Fine-mixing: a random share 1 - rho of all weights put back, whatever they did."""
  check_same(start, tuned)
  rng = np.random.default_rng(seed)
  score = jax.tree.map(lambda a: rng.random(a.shape), start)
  none = np.zeros((0, 0), bool)
  return _reset(start, tuned, score, reserve, 'global', none, none)


def _reset(
  start: trees.Params,
  tuned: trees.Params,
  score: trees.Params,
  reserve: float,
  ranking: str,
  unseen: np.ndarray,
  left_out: np.ndarray,
) -> Reset:
  able = able_without(start, left_out)
  kept = keep_lowest(score, reserve, ranking=ranking, able=able)
  ranked = sum(int(a.sum()) for a in jax.tree.leaves(able))
  back = sum(int((~a).sum()) for a in jax.tree.leaves(kept))
  return Reset(jax.tree.map(_chosen, kept, start, tuned), kept, unseen, ranked, back)


def experts_reset(start: trees.Params, tuned: trees.Params, which: np.ndarray) -> trees.Params:
  """The tuned weights with whole experts, [layers, E] bool, put back to the clean ones."""
  check_same(start, tuned)
  able = able_without(start, which)
  return jax.tree.map(_chosen, able, start, tuned)


def _chosen(keep: np.ndarray, old: Any, new: Any) -> np.ndarray:
  return np.where(keep, np.asarray(new), np.asarray(old))
