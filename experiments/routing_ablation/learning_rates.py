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

from experiments.common import html_report, spread
from experiments.routing_ablation import arms, measure
from moe_jax import errors
from moe_jax.config import schema

Bits = Mapping[str, Mapping[float, Mapping[int, float]]]  # family -> rate -> seed -> bits per byte
FILE = 'rates.csv'  # in the directory of a report


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
  families: Sequence[str],
  tried: Sequence[float],
  seeds: Sequence[int],
  known: measure.Results,
  swept: Bits,
) -> Bits:
  """What the finished runs of a sweep came to.

  Args:
    root: of the study.
    families: names of their first arms.
    tried: rates.
    seeds: of each.
    known: runs of an earlier report, which were not trained again.
    swept: its sweep, likewise.
  """
  found: dict[str, dict[float, dict[int, float]]] = {}
  for family in families:
    for rate in sorted({*tried, *swept.get(family, {})}):  # no rate of an earlier sweep is lost
      runs = measure.read({family: workdir(root, rate)}, seeds)[family]
      runs |= {
        seed: run
        for seed, run in known.get(family, {}).items()
        if seed in seeds and math.isclose(run['peak_lr'], rate, rel_tol=1e-6)
      }
      by_seed = {seed: run[arms.BITS] for seed, run in runs.items()}
      before = swept.get(family, {}).get(rate, {})
      by_seed |= {seed: bits for seed, bits in before.items() if seed in seeds}
      if by_seed:
        found.setdefault(family, {})[rate] = dict(sorted(by_seed.items()))
  return found


def best(bits: Bits) -> dict[str, float]:
  """The rate of the lowest mean, by family; a rate at which a seed diverged is worst."""

  def mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if all(map(math.isfinite, values)) else math.inf

  return {
    family: min(by_rate, key=lambda rate: mean(list(by_rate[rate].values())))
    for family, by_rate in bits.items()
  }


def applied(configs: Mapping[str, schema.Config], chosen: Mapping[str, float]):
  """The arms with the rate of their family, where it was swept."""
  return {
    name: with_rate(cfg, chosen[arms.ARMS[name].family])
    if arms.ARMS[name].family in chosen
    else cfg
    for name, cfg in configs.items()
  }


def csv_text(bits: Bits) -> str:
  """A line per family, rate and seed."""
  text = io.StringIO()
  writer = csv.writer(text, lineterminator='\n')
  writer.writerow(['family', 'peak_lr', 'seed', arms.BITS])
  for family, by_rate in bits.items():
    for rate, by_seed in by_rate.items():
      writer.writerows([family, f'{rate:g}', seed, value] for seed, value in by_seed.items())
  return text.getvalue()


def from_csv(path: pathlib.Path) -> dict[str, dict[float, dict[int, float]]]:
  """What `csv_text` wrote to a file; {} without the file."""
  found: dict[str, dict[float, dict[int, float]]] = {}
  if path.exists():
    with path.open(newline='') as file:
      for row in csv.DictReader(file):
        by_rate = found.setdefault(row['family'], {})
        by_rate.setdefault(float(row['peak_lr']), {})[int(row['seed'])] = float(row[arms.BITS])
  return found


def of_report(directory: pathlib.Path) -> dict[str, dict[float, dict[int, float]]]:
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


def blocks(bits: Bits) -> list[html_report.Block]:
  """The table of the sweep for the report; nothing without a sweep."""
  if not bits:
    return []
  tried, chosen = sorted({rate for by_rate in bits.values() for rate in by_rate}), best(bits)
  rows, edges = [], []
  for family, by_rate in bits.items():
    cells = [_cell(by_rate.get(rate, {}), rate == chosen[family]) for rate in tried]
    rows.append([f'`{family}`', *cells])
    if chosen[family] in (min(by_rate), max(by_rate)):
      edges.append(f'`{family}`')
  seeds = sorted({s for by_rate in bits.values() for runs in by_rate.values() for s in runs})
  words = (
    'Held-out bits per byte by peak learning rate, at the length of the sweep, mean ± sample '
    f'standard deviation over seeds {", ".join(map(str, seeds))}; the rate in bold is that of '
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


def _cell(by_seed: Mapping[int, float], chosen: bool) -> str:
  text = spread.spread(list(by_seed.values()), 4)
  return f'**{text}**' if chosen else text
