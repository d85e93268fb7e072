"""What was logged over training, group by group: losses, balance, loads, and what was spent.

A run that is not as far as the others would end their curves where it is: see `seeds`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_jax.analysis import difference_curves
from moe_jax.analysis.comparison import groups as groups_lib
from moe_jax.analysis.comparison import workdirs
from moe_jax.planning import flops
from moe_jax.training import optim

KEYS = ('loss', 'max_vio', 'drop_rate')  # of metrics.jsonl
MAX_POINTS = 200  # of a curve that is shown; more are averaged
MAX_STEPS = 24  # of the loads that are shown


class Series(NamedTuple):
  """Figures of a group's `seeds` at the steps that all of these have logged."""

  seeds: list[int]
  steps: np.ndarray  # [points]
  tokens: np.ndarray  # [points] trained on by one run
  flops: np.ndarray  # [points] of training, by one run
  seconds: np.ndarray  # [points] of training steps, mean over seeds
  values: dict[str, np.ndarray]  # of `KEYS`, [seeds, points]; NaN where there is none


class Balance(NamedTuple):
  """Balance of a group per MoE layer."""

  steps: list[int]
  first_layer: int
  max_vio: np.ndarray  # [layers, steps] mean over seeds


class Load(NamedTuple):
  """Load of each expert in one run of a group, relative to its layer's mean."""

  seed: int
  steps: list[int]
  first_layer: int
  relative: list[np.ndarray]  # [layers, E] of each step; 1 = balanced


def seeds(*groups: groups_lib.Group) -> list[int]:
  """The seeds whose runs are finished in all groups; without any, those that have logged a step."""
  common = [seed for seed in groups[0].runs if all(seed in one.runs for one in groups)]
  logged = [seed for seed in common if all(one.runs[seed].metrics for one in groups)]
  return [seed for seed in logged if all(one.runs[seed].is_finished for one in groups)] or logged


def left_out(group: groups_lib.Group) -> str:
  """`seed 3 at step 50, seed 4 without a logged step`, of what is not in `seeds`; '' if all are."""
  drawn = seeds(group)
  return ', '.join(
    f'seed {seed} at step {run.step}' if run.metrics else f'seed {seed} without a logged step'
    for seed, run in group.runs.items()
    if seed not in drawn
  )


def series(group: groups_lib.Group) -> Series | None:
  """The logged figures of a group; None if its `seeds` have no step in common."""
  runs = {seed: group.runs[seed] for seed in seeds(group)}
  if not runs:
    return None
  common = set.intersection(*({line['step'] for line in run.metrics} for run in runs.values()))
  if not common:
    return None
  steps = np.asarray(sorted(common))
  found = [{line['step']: line for line in run.metrics} for run in runs.values()]
  cfg = group.cfg
  tokens = np.asarray(optim.tokens_at(cfg.train, cfg.model.max_seq_len, steps.tolist()), float)
  values = {key: np.asarray([_column(lines, steps, key) for lines in found]) for key in KEYS}
  return Series(
    list(runs),
    steps,
    tokens,
    tokens * flops.train_flops_per_token(cfg.model),
    np.mean([_seconds(run, steps) for run in runs.values()], axis=0),
    values,
  )


def _column(lines: dict[int, dict[str, Any]], steps: np.ndarray, key: str) -> list[float]:
  values = [lines[step].get(key) for step in steps.tolist()]
  return [float('nan') if value is None else float(value) for value in values]


def _seconds(run: workdirs.RunFiles, steps: np.ndarray) -> np.ndarray:
  """Seconds of training steps up to each of `steps`, from the logged tokens per second."""
  at = [line['step'] for line in run.metrics]
  tokens = np.asarray(optim.tokens_at(run.cfg.train, run.cfg.model.max_seq_len, at), float)
  rate = np.asarray([line.get('tokens_per_second') or np.nan for line in run.metrics], float)
  rate = np.where(np.isfinite(rate), rate, np.nanmedian(rate) if np.isfinite(rate).any() else 1.0)
  spent = np.cumsum(np.diff(tokens, prepend=0.0) / rate)
  return spent[np.searchsorted(at, steps)]


def not_finite(series: Series) -> str:
  """`3 of 12 in seed 1`, of the logged losses that are no finite number; '' if all are."""
  missing = (~np.isfinite(series.values['loss'])).sum(axis=1).tolist()
  num = len(series.steps)
  return ', '.join(f'{n} of {num} in seed {s}' for s, n in zip(series.seeds, missing) if n)


def thinned(series: Series, num: int = MAX_POINTS) -> Series:
  """A series of at most `num` points, each the mean of neighbours."""
  if len(series.steps) <= num:
    return series
  edges = np.round(np.linspace(0, len(series.steps), num + 1)).astype(int)
  parts = [slice(a, b) for a, b in zip(edges, edges[1:])]

  def mean(a: np.ndarray) -> np.ndarray:
    return np.stack([a[..., part].mean(axis=-1) for part in parts], axis=-1)

  values = {key: mean(value) for key, value in series.values.items()}
  return Series(
    series.seeds,
    mean(series.steps),
    mean(series.tokens),
    mean(series.flops),
    mean(series.seconds),
    values,
  )


def difference(
  first: groups_lib.Group, second: groups_lib.Group, seeds: Sequence[int]
) -> difference_curves.Curve | None:
  """The training loss of `first` minus that of `second`; None without a step that has all of it.

  Args:
    first: an arm.
    second: its baseline.
    seeds: that are paired; both groups have them.
  """
  pairs = [[one.runs[seed].losses for seed in seeds] for one in (first, second)]
  logged = [set(losses) for some in pairs for losses in some]
  steps = sorted(set.intersection(*logged)) if logged else []
  values, baseline = (
    np.asarray([[losses[step] for step in steps] for losses in some]) for some in pairs
  )
  if not steps or not np.isfinite(values - baseline).all(axis=0).any():
    return None
  tokens = optim.tokens_at(first.cfg.train, first.cfg.model.max_seq_len, steps)
  return difference_curves.curve(tokens, values, baseline)


def routing(group: groups_lib.Group) -> tuple[Balance, Load] | None:
  """Balance per layer over training and the loads of its first seed; None without any."""
  if not group.cfg.model.is_moe:
    return None
  kept = {seed: dict(group.runs[seed].routing()) for seed in seeds(group)}
  histories = {seed: history for seed, history in kept.items() if history}
  steps = sorted(set.intersection(*map(set, histories.values()))) if histories else []
  if not steps:
    return None
  shown = [steps[i] for i in _spread(len(steps), MAX_POINTS)]
  max_vio = [[history[step]['max_vio'] for step in shown] for history in histories.values()]
  layer = group.cfg.model.num_dense_layers
  first, own = next(iter(histories.items()))
  few = [sorted(own)[i] for i in _spread(len(own), MAX_STEPS)]
  relative = [_relative(own[step]['load']) for step in few]
  return Balance(shown, layer, np.mean(max_vio, axis=0).T), Load(first, few, layer, relative)


def _spread(num: int, most: int) -> list[int]:
  """Indices of at most `most` of `num` things, the first and the last among them."""
  return np.unique(np.round(np.linspace(0, num - 1, min(num, most))).astype(int)).tolist()


def _relative(load: np.ndarray) -> np.ndarray:
  load = np.asarray(load, float)
  mean = load.mean(axis=1, keepdims=True)
  return load / np.where(mean > 0, mean, 1.0)
