"""A learning rate for each family of arms, from a sweep at the full length of the runs.

One rate that was tuned on one arm biases every comparison with another. A sweep for each arm would
cost several times the study; so arms that route alike share a rate (`arms.Arm.family`), which is
the best of those tried on the family's first arm by held-out bits per byte, mean over a few seeds.
"""

import csv
import dataclasses
import io
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from experiments.common import html_report, spread
from experiments.routing_ablation import arms, measure
from moe_jax import errors
from moe_jax.config import schema

FILE = 'rates.csv'  # in the directory of a report
_UNKNOWN = 0  # steps, of the oldest reports


class Tried(NamedTuple):
  """What the learning rates of one family came to.

  A rate that is best at one size and length need not be at another.
  """

  scale: str  # of its runs; '' = not known, of the oldest reports
  steps: int  # of its runs
  bits: Mapping[float, Mapping[int, float]]  # rate -> seed -> bits per byte


Sweep = Mapping[str, Tried]  # by family


def rates(words: Sequence[str]) -> list[float]:
  """The rates of `--learning_rates=0.001,0.002,0.004`, rising.

  Raises:
    errors.InputError: a word is no positive number, or there are fewer than three.
  """
  said = f'--learning_rates={",".join(words)}'
  try:
    found = sorted({float(word) for word in words})
  except ValueError as error:
    raise errors.InputError(f'{said} must be numbers, as in 0.003,0.006,0.012') from error
  errors.require(
    len(found) >= 3 and found[0] > 0 and found[-1] < float('inf'),
    f'{said} must be three different positive rates or more: the best of fewer is at an edge',
  )
  return found


def with_rate(cfg: schema.Config, rate: float) -> schema.Config:
  """The same run with another peak learning rate."""
  return dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, peak_lr=rate))


def workdir(root: pathlib.Path, rate: float) -> pathlib.Path:
  """Where the runs at a rate lie, those of the sweep and those of the study."""
  return root / 'rates' / f'{rate:g}'


def read(
  root: pathlib.Path,
  scale: str,
  families: Mapping[str, int],
  tried: Sequence[float],
  seeds: Sequence[int],
  known: measure.Results,
  swept: Sweep,
) -> dict[str, Tried]:
  """What the finished runs of a sweep came to.

  Args:
    root: of the study.
    scale: of the study.
    families: names of their first arms, and the steps of these.
    tried: rates.
    seeds: of each.
    known: runs of an earlier report of these steps, which were not trained again.
    swept: its sweep; what is of another scale or of other steps is not taken.
  """
  found: dict[str, Tried] = {}
  for family, steps in families.items():
    bits: dict[float, dict[int, float]] = {}
    before = of_runs_like(swept, family, scale, steps)
    for rate in sorted({*tried, *before}):  # no rate of an earlier sweep is lost
      runs = measure.read({family: workdir(root, rate)}, seeds)[family]
      runs |= {
        seed: run
        for seed, run in known.get(family, {}).items()
        if seed in seeds and math.isclose(run['peak_lr'], rate, rel_tol=1e-6)
      }
      by_seed = {seed: value for seed, value in before.get(rate, {}).items() if seed in seeds}
      by_seed |= {seed: run[arms.BITS] for seed, run in runs.items()}
      if by_seed:
        bits[rate] = dict(sorted(by_seed.items()))
    if bits:
      found[family] = Tried(scale, steps, bits)
  return found


def of_runs_like(
  swept: Sweep, family: str, scale: str, steps: int
) -> Mapping[float, Mapping[int, float]]:
  """What a sweep says of a family's rates by runs of this size and length: rate -> seed -> bits."""
  one = swept.get(family)
  return one.bits if one and (one.scale, one.steps) == (scale, steps) else {}


def best(sweep: Sweep) -> dict[str, float]:
  """The rate of the lowest mean, by family; a rate at which a seed diverged is worst."""

  def mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if all(map(math.isfinite, values)) else math.inf

  return {
    family: min(bits, key=lambda rate: mean(list(bits[rate].values())))
    for family, (_, _, bits) in sweep.items()
  }


def applied(configs: Mapping[str, schema.Config], chosen: Mapping[str, float]):
  """The arms with the rate of their family, where it was swept."""
  return {
    name: with_rate(cfg, chosen[arms.ARMS[name].family])
    if arms.ARMS[name].family in chosen
    else cfg
    for name, cfg in configs.items()
  }


def csv_text(sweep: Sweep) -> str:
  """A line per family, rate and seed."""
  text = io.StringIO()
  writer = csv.writer(text, lineterminator='\n')
  writer.writerow(['family', 'scale', 'steps', 'peak_lr', 'seed', arms.BITS])
  for family, (scale, steps, bits) in sweep.items():
    for rate, by_seed in bits.items():
      run = (family, scale, steps, f'{rate:g}')
      writer.writerows([*run, seed, value] for seed, value in by_seed.items())
  return text.getvalue()


def from_csv(path: pathlib.Path) -> dict[str, Tried]:
  """What `csv_text` wrote to a file; {} without the file."""
  found: dict[str, dict[float, dict[int, float]]] = {}
  of: dict[str, tuple[str, int]] = {}
  if path.exists():
    with path.open(newline='') as file:
      for row in csv.DictReader(file):
        of[row['family']] = (row.get('scale') or '', int(row.get('steps') or _UNKNOWN))
        by_rate = found.setdefault(row['family'], {})
        by_rate.setdefault(float(row['peak_lr']), {})[int(row['seed'])] = float(row[arms.BITS])
  return {family: Tried(*of[family], bits) for family, bits in found.items()}


def of_report(directory: pathlib.Path) -> dict[str, Tried]:
  """The sweep of a report, whose best rates are to be used.

  Raises:
    errors.InputError: there is none.
  """
  found = from_csv(directory / FILE)
  errors.require(
    bool(found),
    f'--rates_from={directory} must be the directory of a report with a sweep, and has no {FILE}; '
    'name another one, or sweep with --learning_rates',
  )
  return found


def blocks(sweep: Sweep) -> list[html_report.Block]:
  """The table of the sweep for the report; nothing without a sweep."""
  if not sweep:
    return []
  tried, chosen = sorted({rate for one in sweep.values() for rate in one.bits}), best(sweep)
  rows, edges = [], []
  for family, (_, _, bits) in sweep.items():
    cells = [_cell(bits.get(rate, {}), rate == chosen[family]) for rate in tried]
    rows.append([f'`{family}`', *cells])
    if chosen[family] in (min(bits), max(bits)):
      edges.append(f'`{family}`')
  seeds = sorted({s for one in sweep.values() for runs in one.bits.values() for s in runs})
  of_seeds = f'mean ± sample standard deviation over seeds {", ".join(map(str, seeds))}'
  words = (
    f'Held-out bits per byte by peak learning rate, {_lengths(sweep)}, '
    f'{of_seeds if len(seeds) > 1 else f"of seed {seeds[0]}"}; the rate in bold is that of '
    'every arm of the family. Choosing by seeds that are also compared favours each arm by about '
    'as much.'
  )
  if edges:
    words += f' The best of {", ".join(edges)} is at an edge: its optimum may lie outside.'
  return [
    html_report.Heading('Learning rates'),
    html_report.Table(['family', *(f'{rate:g}' for rate in tried)], rows),
    html_report.Text(words),
  ]


def from_elsewhere(sweep: Sweep, configs: Mapping[str, schema.Config], scale: str) -> str:
  """Says that rates were tried on runs of another size or length than these arms; '' if not.

  Of three seeds each, at the best rates of the scale tiny the scale mini said that fine-grained
  experts are ahead, at its own that they are behind, and both intervals were far from zero.
  """
  others: dict[str, Tried] = {}
  for name, cfg in configs.items():
    family = arms.ARMS[name].family
    one = sweep.get(family)
    if one and (one.scale, one.steps) != (scale, cfg.train.num_steps):
      others[family] = one
  if not others:
    return ''
  steps = ' or '.join(f'{n:,}' for n in sorted({c.train.num_steps for c in configs.values()}))
  return (
    f'The peak rates are the best {_lengths(others)}, where these runs are of {steps} steps at '
    f'`--scale={scale}`. A best rate moves with size and length, for one arm more than for '
    'another, and may turn a verdict round: `--learning_rates` tries them on these runs.'
  )


def _lengths(sweep: Sweep) -> str:
  """What the runs of the sweep are: `after 3,000 steps at --scale=tiny`, or by family."""
  families: dict[str, list[str]] = {}
  for family, one in sweep.items():
    length = f'after {one.steps:,} steps' if one.steps != _UNKNOWN else 'at an unknown length'
    size = f'`--scale={one.scale}`' if one.scale else 'an unknown scale'
    families.setdefault(f'{length} at {size}', []).append(f'`{family}`')
  if len(families) == 1:
    return next(iter(families))
  return ', '.join(f'{words} of {" and ".join(names)}' for words, names in families.items())


def _cell(by_seed: Mapping[int, float], chosen: bool) -> str:
  text = spread.spread(list(by_seed.values()), 4)
  return f'**{text}**' if chosen else text
