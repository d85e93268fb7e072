"""Tables, picture and results.json of the study."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.figure
from matplotlib.backends import backend_agg

from experiments import purify
from experiments.common import readme_tables
from experiments.purify import measures
from moe_jax import atomic_files
from moe_jax.analysis import paired

START, END = '<!-- tables: written by the command -->', '<!-- end of tables -->'
NAMES = {'fine': 'fine-grained', 'gshard': 'GShard'}
COLORS = {'purify': '#c44e52', 'mixing': '#4c72b0', 'pruning': '#55a868'}
Records = Mapping[str, Mapping[str, Any]]  # by 'variant/seed'


def write(out: pathlib.Path, found: Records, settings: Mapping[str, Any]):
  """Writes results.json, curves.png and the tables of README.md, and prints the tables.

  Args:
    out: their directory.
    found: what each run has measured.
    settings: of the study, for the record.

  Raises:
    errors.InputError: README.md has no place for the tables.
  """
  out.mkdir(parents=True, exist_ok=True)
  record = {'settings': settings, 'runs': found}
  atomic_files.write_text(out / 'results.json', json.dumps(record, indent=1) + '\n')
  _draw(found, out / 'curves.png')
  text = '\n\n'.join(tables(found))
  readme_tables.fill(out, START, END, text)
  print(text)


def of_variant(found: Records, variant: str) -> list[Mapping[str, Any]]:
  """The records of a variant, by seed."""
  return [one for key, one in found.items() if key.split('/')[0] == variant]


def variants(found: Records) -> list[str]:
  """Variants in the order in which they were run."""
  return list(dict.fromkeys(key.split('/')[0] for key in found))


def kinds(found: Records) -> list[str]:
  """Attacks that were measured; the control without poison is none."""
  first = next(iter(found.values()))['attacks']
  return [kind for kind in first if 'tuned' in first[kind]]


def over_seeds(shares: Sequence[float]) -> str:
  """The mean of shares, one per seed, in percent, with Student's interval inside of [0, 100].

  The texts of a seed have its model in common, so that they are not independent of each other.
  """
  found = paired.interval([100 * one for one in shares])
  low, high = max(0.0, found.low), min(100.0, found.high)
  return dataclasses.replace(found, low=low, high=high).text(1, sign=False)


def at(attack: Mapping[str, Any], method: str, rho: str, stage: str = 'tuned') -> Any:
  """The counts of a method at a reserve; 1 and 0 are the tuned and the clean weights."""
  return attack['tuned'][rho] if rho in ('0', '1') else attack[method][rho][stage]


def tables(found: Records) -> list[str]:
  """The study's tables in Markdown."""
  parts = []
  for kind in kinds(found):
    parts.append(_over_reserves(found, kind))
  return [*parts, _differences(found), _experts(found), _whole(found)]


def _over_reserves(found: Records, kind: str) -> str:
  label = measures.label(kind)
  rows = [f'Attack `{kind}`: clean accuracy and {label}, %, means over seeds.', '']
  own = variants(found)
  columns = [f'{what}, {NAMES[v]}' for v in own for what in ('clean', label)]
  rows += [
    f'| weights | reserve | {" | ".join(columns)} |',
    '| --- | --- |' + ' --- |' * len(columns),
  ]

  def add(name: str, rho: str, pick: Any):
    cells = []
    for variant in own:
      counts = [pick(one['attacks'][kind]) for one in of_variant(found, variant)]
      cells += [
        over_seeds([measures.share(one[key]) for one in counts]) for key in ('clean', 'attack')
      ]
    rows.append(f'| {name} | {rho} | {" | ".join(cells)} |')

  add('attacked', '1', lambda one: one['before'])
  add('attacked, tuned', '1', lambda one: at(one, '', '1'))
  add('clean start, tuned', '0', lambda one: at(one, '', '0'))
  reserves = list(next(iter(found.values()))['attacks'][kind]['purify'])
  for method in purify.METHODS:
    for rho in reversed(reserves):
      add(f'{method}, tuned', rho, lambda one, m=method, r=rho: at(one, m, r))
  return '\n'.join(rows)


def gain(records: Sequence[Mapping[str, Any]], kind: str, other: str, rho: str) -> paired.Interval:
  """By how many points purify's effect of the trigger is lower than another method's, by seed.

  The effect is attack success; of a bias, what biased accuracy lacks of clean accuracy. `other` is
  a method at the same reserve, or 'tuned' for clean fine-tuning alone.
  """

  def effect(counts: Mapping[str, Any]) -> float:
    clean, attack = (100 * measures.share(counts[key]) for key in ('clean', 'attack'))
    return clean - attack if kind == 'bias' else attack

  ours = [effect(at(one['attacks'][kind], 'purify', rho)) for one in records]
  if other == 'tuned':
    theirs = [effect(at(one['attacks'][kind], '', '1')) for one in records]
  else:
    theirs = [effect(at(one['attacks'][kind], other, rho)) for one in records]
  return paired.difference(ours, theirs)


def _differences(found: Records) -> str:
  rows = [
    'Effect of the trigger with purify minus that with another method at the same reserve, points, '
    'paired by seed; below 0 purify is better.',
    '',
    '| model | attack | reserve | - fine-tuning alone | - mixing | - pruning |',
    '| --- | --- | --- | --- | --- | --- |',
  ]
  for variant in variants(found):
    records = of_variant(found, variant)
    for kind in kinds(found):
      for rho in reversed(list(records[0]['attacks'][kind]['purify'])):
        cells = [
          gain(records, kind, other, rho).text(1) for other in ('tuned', 'mixing', 'pruning')
        ]
        rows.append(f'| {NAMES[variant]} | {kind} | {rho} | {" | ".join(cells)} |')
  return '\n'.join(rows)


def _experts(found: Records) -> str:
  rows = [
    'Where the drift lives: the fewest experts, % of all, that hold half of what the experts have '
    'of r, and of the tenth of all weights with the largest r; means over seeds.',
    '',
    '| model | tuned on | half of r | half of the tenth | experts seen by clean examples, % |',
    '| --- | --- | --- | --- | --- |',
  ]
  for variant in variants(found):
    records = of_variant(found, variant)
    for kind in records[0]['attacks']:
      own = [one['attacks'][kind]['experts'] for one in records]
      cells = [over_seeds([one[key] for one in own]) for key in ('half_of_mass', 'half_of_reset')]
      cells.append(over_seeds([one['seen'] / one['experts'] for one in own]))
      rows.append(f'| {NAMES[variant]} | {kind} | {" | ".join(cells)} |')
  return '\n'.join(rows)


def _whole(found: Records) -> str:
  """Whole experts put back, most r first or at random."""
  any_run = next(iter(found.values()))
  first = any_run['attacks'][kinds(found)[0]]['whole']['r']
  rows = [
    'Whole experts put back and nothing tuned, %: those with the most r first, or at random.',
    '',
    '| model | attack | experts | clean, by r | clean, random | attack, by r | attack, random |',
    '| --- | --- | --- | --- | --- | --- | --- |',
  ]
  for variant in variants(found):
    for kind in kinds(found):
      for share in first:
        cells = []
        for key in ('clean', 'attack'):
          for order in ('r', 'random'):
            own = [
              one['attacks'][kind]['whole'][order][share] for one in of_variant(found, variant)
            ]
            cells.append(over_seeds([measures.share(one[key]) for one in own]))
        part = f'{100 * float(share):.3g} %'
        rows.append(f'| {NAMES[variant]} | {kind} | {part} | {" | ".join(cells)} |')
  return '\n'.join(rows)


def _draw(found: Records, path: pathlib.Path):
  """Clean accuracy (dashed) and effect of the trigger over the reserve, a panel per attack."""
  own, panels = variants(found), kinds(found)
  size = (3.2 * len(panels), 2.6 * len(own))
  figure = matplotlib.figure.Figure(figsize=size, layout='constrained')
  backend_agg.FigureCanvasAgg(figure)
  axes = figure.subplots(len(own), len(panels), squeeze=False, sharex=True, sharey=True)
  for row, variant in zip(axes, own):
    for axis, kind in zip(row, panels):
      records = [one['attacks'][kind] for one in of_variant(found, variant)]
      for method in purify.METHODS:
        grid = ['0', *records[0][method], '1']
        for key, style in (('attack', '-'), ('clean', '--')):
          means = [
            100
            * math.fsum(measures.share(at(one, method, rho)[key]) for one in records)
            / len(records)
            for rho in grid
          ]
          name = method if key == 'attack' else None
          axis.plot([float(g) for g in grid], means, style, color=COLORS[method], label=name)
      axis.set_title(f'{NAMES[variant]}: {kind}', fontsize=9)
      axis.set_ylim(0, 102)
  for axis in axes[-1]:
    axis.set_xlabel('reserve')
  for axis in axes[:, 0]:
    axis.set_ylabel('%')
  axes[0, 0].legend(fontsize=7)
  figure.savefig(path, dpi=110)
