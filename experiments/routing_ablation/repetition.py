"""How much of the scatter between seeds goes with copying: see `moe_jax.analysis.copying`."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib import figure
from scipy import stats

from experiments.common import html_report
from experiments.routing_ablation import arms, measure
from moe_jax.analysis import paired
from moe_jax.runs import plots

LEAST_SEEDS = 3  # of an arm whose scatter counts
LEAST_RUNS = 4  # beyond one per arm, for an interval
LEAST_PAIRS = 5  # of a line through the differences of a claim

Figures = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # arm -> saved nats, bits per byte


class Together(NamedTuple):
  """How two figures go together within arms: means of the arms are taken out."""

  num_runs: int
  num_arms: int
  slope: float  # bits per byte per nat
  correlation: float
  low: float  # of the correlation, 95 %, by Fisher's transformation
  high: float

  @property
  def share(self) -> float:
    """Of the variance of bits per byte between seeds."""
    return self.correlation**2


def figures(results: measure.Results) -> dict[str, tuple[list[float], list[float]]]:
  """What repetition saves and bits per byte of the runs that say both; arms of enough seeds."""
  found = {}
  for name, runs in results.items():
    both = [
      (run[measure.SAVED], run[arms.BITS])
      for run in runs.values()
      if run.get(measure.SAVED) is not None and math.isfinite(run[arms.BITS])
    ]
    if len(both) >= LEAST_SEEDS:
      found[name] = ([x for x, _ in both], [y for _, y in both])
  return found


def together(found: Figures) -> Together | None:
  """Over the runs of all arms; None if they are too few, or do not differ."""
  pairs = [np.asarray(both, np.float64) for both in found.values()]  # [2, S] each
  num_runs, num_arms = sum(both.shape[1] for both in pairs), len(pairs)
  if num_runs - num_arms < LEAST_RUNS:
    return None
  x, y = np.concatenate([both - both.mean(axis=1, keepdims=True) for both in pairs], axis=1)
  if not (x.any() and y.any()):
    return None
  r = float(x @ y / np.sqrt((x @ x) * (y @ y)))
  # A mean is taken out of each arm, so there are so many fewer: n - 3 of the textbook, for one arm.
  half = stats.norm.ppf(0.975) / math.sqrt(num_runs - num_arms - 2)
  middle = math.atanh(np.clip(r, -1 + 1e-12, 1 - 1e-12))
  low, high = math.tanh(middle - half), math.tanh(middle + half)
  return Together(num_runs, num_arms, float(x @ y / (x @ x)), r, low, high)


def at_equal_copying(results: measure.Results, claim: arms.Claim) -> paired.Interval | None:
  """The difference of a claim in bits per byte where both arms would save as much by repetition.

  The constant of a line through the differences by seed, over what the arm saves more than its
  baseline; 95 % interval by Student's t with two degrees of freedom fewer than pairs. None for
  other figures, with fewer than `LEAST_PAIRS` pairs that know both, or no spread in what is saved.
  """
  if claim.figure != arms.BITS:
    return None
  seeds = measure.common(results, claim.arm, claim.baseline)
  saved, bits = (
    [measure.column(results, name, key, seeds) for name in (claim.arm, claim.baseline)]
    for key in (measure.SAVED, arms.BITS)
  )
  if len(seeds) < LEAST_PAIRS or None in saved:
    return None
  x, y = (np.subtract(*both) for both in (saved, bits))
  if not np.isfinite(y).all() or np.ptp(x) == 0:
    return None
  line = stats.linregress(x, y)
  half = float(stats.t.ppf(0.975, len(seeds) - 2) * line.intercept_stderr)
  return paired.Interval(line.intercept, line.intercept - half, line.intercept + half, len(seeds))


def blocks(
  path: pathlib.Path, results: measure.Results, claims: Sequence[arms.Claim]
) -> list[html_report.Block]:
  """A picture and what it says, for the report; nothing where too few runs say it.

  Args:
    path: of the picture.
    results: of all runs.
    claims: those whose two arms were trained.
  """
  found = figures(results)
  if (both := together(found)) is None:
    return []
  equal = {claim: at_equal_copying(results, claim) for claim in claims}
  return [
    html_report.Heading('What the seeds differ in'),
    _draw(path, found),
    html_report.Text(
      f'Within arms, over {both.num_runs} runs of {both.num_arms}: a nat per token that is saved '
      'when held-out text is said a second time goes with '
      f'{both.slope:+.3f} held-out bits per byte; correlation {both.correlation:.2f} '
      f'[{both.low:.2f}, {both.high:.2f}], {both.share:.0%} of the scatter between seeds. Both '
      'are outcomes of training: what one arm gains by copying sooner is part of its difference, '
      'and what it would be between runs that copy as well answers another question:'
    ),
    html_report.Bullets(
      [
        f'`{claim.arm}` against `{claim.baseline}` where both save as much (constant of a line '
        f'through the differences by seed): {found.text(4)}, {found.num_seeds} seeds.'
        for claim, found in equal.items()
        if found is not None
      ]
      or ['No claim has pairs enough.']
    ),
  ]


def _draw(path: pathlib.Path, found: Figures) -> html_report.Picture:
  with matplotlib.rc_context(plots.STYLE):
    fig = figure.Figure(figsize=(7, 4.5), layout='constrained')
    axes = fig.subplots()
    colours = matplotlib.colormaps['viridis'](np.linspace(0, 0.9, len(found)))
    for colour, (name, (saved, bits)) in zip(colours, found.items()):
      axes.plot(saved, bits, 'o', color=colour, label=name, ms=5)
    axes.set_xlabel('saved when held-out text is repeated, nats per token')
    axes.set_ylabel('held-out bits per byte')
    axes.grid(True, axis='both')
    axes.legend()
    plots.save(fig, path)
  return html_report.Picture(
    path, 'Every run: what repetition saves and held-out bits per byte, a dot per seed'
  )
