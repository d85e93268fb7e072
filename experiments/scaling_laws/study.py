"""What is trained: the points of a scale, phase after phase.

  hyper    a grid over batch and rate at several budgets, one model each, by the mean of its seeds
  noise    one point of the grid with other seeds: how much of a loss is luck
  isoflop  at each budget several models, at the rate and batch that `hyper` found
  heldout  the same at a larger budget, which no fit sees

MoE models are counted by what a token activates (`flops.ModelScale`): the same dial has the same M,
N1 and N2 as its dense twin, and C = M D is what is spent. They take rate and batch from the dense
grid: at equal C and equal activated size these are the closest thing to a known optimum, and a grid
of their own would double the study. Where that matters, the report says so.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from configs import scaling
from experiments.common import cli
from experiments.scaling_laws import trainer
from moe_jax.analysis import scaling_laws
from moe_jax.config import schema
from moe_jax.planning import flops

PHASES = ('hyper', 'noise', 'isoflop', 'heldout')
KINDS = ('dense', 'moe')
LOSSES = ('loss', 'bits_per_byte')
WARMUP_SHARE = 0.05  # of the steps; the paper's 2000 steps are longer than most runs here


@dataclasses.dataclass(frozen=True)
class Laws:
  """Rate and batch by budget, as the later phases use them."""

  rate: scaling_laws.PowerLaw  # eta_opt(C)
  batch: scaling_laws.PowerLaw  # B_opt(C), tokens


# Eq. 1 of the paper, the centre of the grids and what a dry run takes before anything is fitted.
PAPER = Laws(scaling_laws.PowerLaw(0.3118, -0.1250), scaling_laws.PowerLaw(0.2920, 0.3271))
PAPER_ALLOCATION = scaling_laws.PowerLaw(0.1715, 0.5243)  # M_opt(C), Eq. 4


@dataclasses.dataclass(frozen=True)
class Scale:
  """The sizes of one study."""

  name: str
  hyper_dials: Mapping[float, int]  # the model of the grid at each budget
  rates: tuple[float, ...]
  rows: tuple[int, ...]
  seeds: int  # of every point of the grid; the laws are of the mean loss
  noise: tuple[float, float, int, int]  # budget, rate, rows, number of further seeds
  band: float  # above the best loss: points of the grid that the laws go through
  isoflop: Mapping[str, Mapping[float, tuple[int, ...]]]  # dials by kind and budget
  heldout: Mapping[str, Mapping[float, tuple[int, ...]]]
  max_epochs: float  # a point that needs more of the text is refused
  flops_per_second: float  # assumed by --dry_run


TINY = Scale(
  name='tiny',
  hyper_dials={2e10: 2, 4e10: 3, 8e10: 4, 1.6e11: 4, 6.4e11: 6},
  rates=(1.25e-3, 2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2),
  rows=(4, 8, 16, 32),
  seeds=2,
  noise=(4e10, 1e-2, 8, 4),
  band=0.01,
  isoflop={
    kind: {
      2e10: (1, 2, 3, 4, 5, 6),
      4e10: (1, 2, 3, 4, 5, 6),
      8e10: (2, 3, 4, 5, 6),
      1.6e11: (2, 3, 4, 5, 6, 8),
      3.2e11: (3, 4, 5, 6, 7, 8),
      6.4e11: (4, 5, 6, 7, 8),
    }
    for kind in KINDS
  },
  heldout={kind: {1.28e12: (5, 6, 7, 8, 10)} for kind in KINDS},
  max_epochs=1.0,
  flops_per_second=1.2e10,
)

# Not run yet. A held-out budget of four times the largest fitted one, as one GPU allows.
SMALL = Scale(
  name='small',
  hyper_dials={1e15: 3, 4e15: 4, 1.6e16: 5},
  rates=(1e-3, 2e-3, 4e-3, 8e-3),
  rows=(16, 32, 64, 128, 256),
  seeds=1,
  noise=(4e15, 4e-3, 64, 4),
  band=0.01,
  isoflop={
    kind: {
      1e15: (1, 2, 3, 4, 5, 6),
      2e15: (1, 2, 3, 4, 5, 6),
      4e15: (2, 3, 4, 5, 6, 8),
      8e15: (2, 3, 4, 5, 6, 8),
      1.6e16: (3, 4, 5, 6, 8, 10),
    }
    for kind in KINDS
  },
  heldout={kind: {6.4e16: (4, 5, 6, 8, 10, 12)} for kind in KINDS},
  max_epochs=4.0,  # about where repeated text stops counting like new text (arXiv 2305.16264)
  flops_per_second=1e14,
)
SCALES = {'tiny': TINY, 'small': SMALL}


@dataclasses.dataclass(frozen=True)
class Point:
  """One training run."""

  phase: str
  kind: str
  dial: int
  budget: float  # C = M D, as asked for; whole steps change it a little
  rate: float
  rows: int  # per step
  seed: int

  @property
  def key(self) -> str:
    """A file name; equal points of two phases are one run."""
    return f'{self.kind}_{self.dial}_c{self.budget:.3g}_lr{self.rate:.4g}_b{self.rows}_s{self.seed}'


def page(scale: Scale, kind: str, dial: int, overrides: Mapping[str, Any]) -> schema.Config:
  """The config of one model of the family."""
  values = scaling.get_config(f'{scale.name}_{kind}_{dial}')
  values.data.update(overrides)
  return cli.resolve(values)


def size(cfg: schema.Config) -> flops.ModelScale:
  """M, N1 and N2."""
  return flops.model_scale(cfg.model, cfg.paper)


def recipe(point: Point, cfg: schema.Config) -> trainer.Recipe:
  """Whole steps that come closest to the budget."""
  tokens = point.budget / size(cfg).flops_per_token
  steps = max(round(tokens / (point.rows * cfg.model.max_seq_len)), 2)
  warmup = min(max(round(WARMUP_SHARE * steps), 1), steps - 1)
  return trainer.Recipe(steps, point.rows, point.rate, warmup, point.seed)


def tokens(point: Point, cfg: schema.Config) -> int:
  """D, as whole steps make it."""
  return recipe(point, cfg).num_steps * point.rows * cfg.model.max_seq_len


def row(point: Point, cfg: schema.Config) -> dict[str, Any]:
  """A line of the CSV, but for what came of it."""
  scale, seen = size(cfg), tokens(point, cfg)
  return {
    **dataclasses.asdict(point),
    'key': point.key,
    'embed_dim': cfg.model.embed_dim,
    'num_layers': cfg.model.num_layers,
    'M': scale.flops_per_token,
    'N1': scale.non_embedding,
    'N2': scale.complete,
    'parameters': flops.count_parameters(cfg.model).total,
    'steps': recipe(point, cfg).num_steps,
    'batch_tokens': point.rows * cfg.model.max_seq_len,
    'tokens': seen,
    'compute': scale.flops_per_token * seen,
  }


def points(scale: Scale, phase: str, kind: str, laws: Laws, length: int) -> list[Point]:
  """The points of one phase and family; grid and noise are of the dense one only.

  Args:
    scale: the study.
    phase: one of `PHASES`.
    kind: one of `KINDS`.
    laws: rate and batch of the profiles.
    length: tokens per row.
  """
  if phase in ('isoflop', 'heldout'):
    return _profile_points(scale, phase, kind, laws, length)
  if kind != 'dense':
    return []
  return _hyper_points(scale) if phase == 'hyper' else _noise_points(scale)


def _hyper_points(scale: Scale) -> list[Point]:
  return [
    Point('hyper', 'dense', dial, budget, rate, rows, seed)
    for budget, dial in scale.hyper_dials.items()
    for seed in range(scale.seeds)
    for rows in scale.rows
    for rate in scale.rates
  ]


def _noise_points(scale: Scale) -> list[Point]:
  """One point of the grid, seed 0 included."""
  budget, rate, rows, more = scale.noise
  dial = scale.hyper_dials[budget]
  return [Point('noise', 'dense', dial, budget, rate, rows, s) for s in range(more + 1)]


def _profile_points(scale: Scale, phase: str, kind: str, laws: Laws, length: int) -> list[Point]:
  """The models of `isoflop` or `heldout`, at the hyper-parameters of their budget."""
  dials = {'isoflop': scale.isoflop, 'heldout': scale.heldout}[phase][kind]
  return [
    Point(phase, kind, dial, budget, rate_of(laws, budget), rows_of(scale, laws, budget, length), 0)
    for budget in dials
    for dial in dials[budget]
  ]


def rate_of(laws: Laws, budget: float) -> float:
  """eta_opt(C), to three digits."""
  return float(f'{float(laws.rate(budget)):.3g}')


def rows_of(scale: Scale, laws: Laws, budget: float, length: int) -> int:
  """B_opt(C) in rows: a power of two times the smallest batch, at most twice the largest."""
  smallest, largest = scale.rows[0], 2 * scale.rows[-1]
  wanted = float(laws.batch(budget)) / length / smallest
  return min(max(smallest * 2 ** max(round(math.log2(wanted)), 0), smallest), largest)


def fit_laws(rows: Sequence[Mapping[str, Any]], band: float) -> Laws:
  """Eq. 1 from the near-optimal points of the grid (`seed_means` of phase hyper)."""
  near = near_optimal_rows(rows, band)
  budgets = [row['budget'] for row in near]
  return Laws(
    scaling_laws.fit_power_law(budgets, [row['rate'] for row in near]),
    scaling_laws.fit_power_law(budgets, [row['batch_tokens'] for row in near]),
  )


def seed_means(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Each point of the grid once, with the mean loss of its seeds; a seed that diverged shows."""
  points = {}
  for row in rows:
    points.setdefault((row['budget'], row['rate'], row['batch_tokens']), []).append(row)
  return [
    {**group[0], **{key: statistics.fmean(row[key] for row in group) for key in LOSSES}}
    for group in points.values()
  ]


def near_optimal_rows(rows: Iterable[Mapping[str, Any]], band: float) -> list[Mapping[str, Any]]:
  """Those within the band of the best held-out loss of their budget."""
  found = []
  for group in by_budget(rows).values():
    mask = scaling_laws.near_optimal([row['bits_per_byte'] for row in group], band)
    found += [row for row, near in zip(group, mask) if near]
  return found


def by_budget(rows: Iterable[Mapping[str, Any]]) -> dict[float, list[Mapping[str, Any]]]:
  """Rows by their budget, in rising order."""
  groups = {}
  for row in sorted(rows, key=lambda row: row['budget']):
    groups.setdefault(row['budget'], []).append(row)
  return groups
