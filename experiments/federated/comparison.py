"""Trains every method in every setting, and compares them: means, paired differences, claims."""

import json
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import tqdm
from absl import flags

from experiments.common import cli, local_jobs, readme_tables
from experiments.federated import pictures, setting_flags
from moe_jax import atomic_files
from moe_jax.analysis import paired
from moe_jax.federated import accuracy, run

START, END = '<!-- tables: written by the command -->', '<!-- end of tables -->'


class Setting(NamedTuple):
  """One imbalance and one alpha."""

  imbalance: float
  alpha: float

  def __str__(self) -> str:
    return f'{self.imbalance:g} / {self.alpha:g}'


# Accuracies in percent by group of classes and by round, one per seed.
Result = Mapping[str, Mapping[str, Sequence[float]]]
Results = Mapping[tuple[str, Setting], Result]


class Claim(NamedTuple):
  """That one method has the higher accuracy, on the mean over all settings."""

  text: str
  better: str
  worse: str
  group: str = 'balanced'


CLAIMS = (
  Claim('RedGrape beats FedAvg', 'redgrape', 'fedavg'),
  Claim('RedGrape beats FedAvg on tail classes', 'redgrape', 'fedavg', 'tail'),
  Claim('RedGrape beats the focal loss', 'redgrape', 'focal'),
  Claim('RedGrape beats the ratio loss', 'redgrape', 'ratio'),
  Claim('RedGrape beats CLIMB', 'redgrape', 'climb'),
  Claim('RedGrape beats CReFF', 'redgrape', 'creff'),
  Claim('prototypes help', 'redgrape', 'no_prototypes'),
  Claim('real samples help', 'redgrape', 'no_real'),
  Claim('the second head helps', 'redgrape', 'no_extra_head'),
  Claim('the correction helps', 'redgrape', 'head_only'),
)


def _name(setting: Setting) -> str:
  return f'{setting.imbalance:g}_{setting.alpha:g}'


def run_all(workdir: pathlib.Path, names: Sequence[str], settings: Sequence[Setting]) -> Results:
  """Trains what is not there yet; the results of all runs."""
  values, found = flags.FLAGS, {}
  seeds = local_jobs.seeds(values.seeds)
  pairs = [(name, setting) for setting in settings for name in names]
  for name, setting in tqdm.tqdm(pairs, unit='run'):
    path = workdir / name / _name(setting)
    cfg = setting_flags.read(setting_flags.OF_STUDY, method=name, **setting._asdict())
    curve = run.run(
      cfg,
      seeds,
      path,
      data_dir=values.data_dir,
      every=values.every,
      devices=values.devices,
      quiet=True,
    )
    jax.clear_caches()  # dozens of compiled programs would fill the memory
    groups = accuracy.grouped(100 * curve.right, curve.totals)
    found[name, setting] = {
      group: dict(zip(map(str, curve.rounds.tolist()), each.round(3).tolist()))
      for group, each in groups.items()
    }
  return found


def run_study():
  """Trains, and writes results.json, the pictures and the tables to --out."""
  values = flags.FLAGS
  workdir, out = pathlib.Path(cli.required('workdir')), pathlib.Path(values.out)
  readme_tables.check(out, START, END)
  settings = [
    Setting(imbalance, alpha)
    for imbalance in setting_flags.numbers('imbalances', values.imbalances)
    for alpha in setting_flags.numbers('alphas', values.alphas)
  ]
  results = run_all(workdir, values.methods, settings)
  out.mkdir(parents=True, exist_ok=True)
  record = {
    'seeds': local_jobs.seeds(values.seeds),
    'settings': json.loads(
      (workdir / values.methods[0] / _name(settings[0]) / run.RECORD).read_text()
    ),
    'runs': {f'{name} {_name(setting)}': one for (name, setting), one in results.items()},
  }
  atomic_files.write_text(out / 'results.json', json.dumps(record) + '\n')
  pictures.draw(out, results)
  text = tables(results)
  readme_tables.fill(out, START, END, text)
  print(text)


def last(result: Result, group: str) -> list[float]:
  """Accuracies after the last round, one per seed."""
  return list(list(result[group].values())[-1])


def over_settings(results: Results, name: str, group: str) -> list[float]:
  """Means over all settings, one per seed."""
  each = [last(result, group) for (method, _), result in results.items() if method == name]
  return [statistics.fmean(one) for one in zip(*each, strict=True)]


def tables(results: Results) -> str:
  """Markdown: accuracies, differences to RedGrape, and what became of the claims."""
  names = list(dict.fromkeys(name for name, _ in results))
  settings = list(dict.fromkeys(setting for _, setting in results))
  parts = [_means(results, names, settings), _groups(results, names)]
  if 'redgrape' in names:
    parts.append(_differences(results, names, settings))
  graded = _graded(results, names)
  return '\n\n'.join(parts + ([graded] if graded else []))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  return '\n'.join(f'| {" | ".join(row)} |' for row in (head, ['---'] * len(head), *rows))


def _means(results: Results, names: Sequence[str], settings: Sequence[Setting]) -> str:
  rows = [
    [name]
    + [
      ' / '.join(f'{statistics.fmean(last(results[name, s], g)):.1f}' for g in ('balanced', 'tail'))
      for s in settings
    ]
    for name in names
  ]
  head = ['balanced / tail accuracy, %', *(f'IR, alpha {setting}' for setting in settings)]
  return _table(head, rows)


def _groups(results: Results, names: Sequence[str]) -> str:
  rows = [
    [name]
    + [
      paired.interval(over_settings(results, name, group)).text(1, sign=False)
      for group in accuracy.GROUPS
    ]
    for name in names
  ]
  return _table(['mean over settings, %', *accuracy.GROUPS], rows)


def _differences(results: Results, names: Sequence[str], settings: Sequence[Setting]) -> str:
  rows = [
    [name]
    + [
      paired.difference(
        last(results['redgrape', s], 'balanced'), last(results[name, s], 'balanced')
      ).text(1)
      for s in settings
    ]
    for name in names
    if name != 'redgrape'
  ]
  head = ['RedGrape minus, points of balanced accuracy', *map(str, settings)]
  return _table(head, rows)


def _graded(results: Results, names: Sequence[str]) -> str:
  claims = [claim for claim in CLAIMS if {claim.better, claim.worse} <= set(names)]
  each = [
    [a - b for a, b in zip(*(over_settings(results, name, claim.group) for name in claim[1:3]))]
    for claim in claims
  ]
  if not claims or len(each[0]) == 1:
    return ''
  found = [paired.interval(values) for values in each]
  verdicts = [paired.verdict(one, 'higher') for one in found]
  final = paired.corrected(verdicts, [paired.p_value(one, 'higher') for one in each])
  rows = [
    [claim.text, claim.group, one.text(1), verdict]
    for claim, one, verdict in zip(claims, found, final)
  ]
  return _table(['claim', 'classes', 'difference, points', 'verdict (Holm)'], rows)
