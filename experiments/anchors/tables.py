"""What the runs of the study say together: figures over seeds, and the tables of README.md.

A record is what was measured of one run, with the same of harder episodes under `harder`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.anchors import claims
from moe_jax.analysis import paired
from moe_jax.post_training import answers

Key = tuple[str, int]  # variant, seed
Record = Mapping[str, Any]
HARDER_PARTS = ('reweighting', 'confusion')  # what an accuracy of 1 leaves nothing of


def differences(record: Record) -> dict[str, list[float]]:
  """Every claim's difference per unit, those of `HARDER_PARTS` on harder episodes."""
  plain = {name: part for name, part in record.items() if name not in HARDER_PARTS}
  return claims.differences(plain) | claims.differences(record['harder'])


def by_seed(records: Sequence[Record]) -> dict[str, list[float]]:
  """Every claim's difference that all runs have, a mean per run."""
  found = [differences(record) for record in records]
  texts = [text for text in found[0] if all(text in one for one in found)]
  return {text: [float(np.mean(one[text])) for one in found] for text in texts}


def _over_units(values: Sequence[Any]) -> list[Any]:
  return [np.mean(value, axis=0).tolist() for value in values]


def merged(records: Sequence[Record]) -> dict[str, Any]:
  """One record of several seeds, whose units are the runs' means: what the figures show."""
  first = records[0]
  out: dict[str, Any] = {'accuracy': _over_units([r['accuracy'] for r in records])}
  shares = {k: [r['flow']['abs_of_sum'][k] for r in records] for k in ('wp', 'pq', 'ww')}
  out['flow'] = {'abs_of_sum': {k: _over_units(v) for k, v in shares.items()}}
  out['blocking'] = {
    arm: {'label_loyalty': _over_units([r['blocking'][arm]['label_loyalty'] for r in records])}
    for arm in first['blocking']
  }
  auc, cumulative = (  # NaN where a run has none
    np.asarray([r['correlation'][key] for r in records], float) for key in ('auc', 'cumulative')
  )
  out['correlation'] = {
    'auc': auc.mean(axis=0).tolist(),
    'by_run': auc.tolist(),
    'cumulative': cumulative.mean(axis=0).tolist(),
  }
  arms = {
    arm: {
      key: _over_units([r['compression']['arms'][arm][key] for r in records])
      for key in ('label_loyalty', 'word_loyalty', 'accuracy')
    }
    for arm in first['compression']['arms']
  }
  out['compression'] = {'arms': arms}
  if 'experts' in first:
    out['experts'] = {
      key: np.mean([r['experts'][key] for r in records], axis=0).tolist()
      for key in ('separation_text', 'separation_format')
    }
  return out


def merged_harder(records: Sequence[Record]) -> dict[str, Any]:
  """The same of harder episodes: accuracies without and with learned factors, and more shots."""
  found = [record['harder'] for record in records]
  first = found[0]['reweighting']
  return {
    'accuracy': _over_units([one['accuracy'] for one in found]),
    'reweighting': {
      key: {'accuracy': _over_units([one['reweighting'][key]['accuracy'] for one in found])}
      | ({'shots': first[key]['shots']} if key == 'more_shots' else {})
      for key in first
    },
  }


def compact(record: Record) -> dict[str, Any]:
  """Of one run what the tables and the figures are made of, without its units."""
  return merged([record]) | {
    'chance': record['chance'],
    'anchors': claims.are_anchors(record),
    'differences': by_seed([record]),
    'seconds': record['compression']['seconds'],
    'kept_share': record['compression']['kept_share'],
    'experts_silenced': {
      arm: float(np.mean(own['label_loyalty']))
      for arm, own in record.get('experts', {}).get('arms', {}).items()
    },
    'harder': merged_harder([record]) | {'task': record['harder']['task']},
  }


def by_variant(variants: Sequence[str], found: Mapping[Key, Record]) -> dict[str, list[Record]]:
  """The records of every variant, by seed."""
  return {v: [record for (name, _), record in found.items() if name == v] for v in variants}


def who_learned(records: Sequence[Record]) -> list[Record]:
  """Those of models that use their demonstrations: the others have nothing to show."""
  return [record for record in records if claims.learned(record)]


def write(variants: Sequence[str], found: Mapping[Key, Record]) -> str:
  """Markdown: a table of the claims, and one of those on harder episodes; a variant per column.

  Both are of the runs that learned, and say how many these are.
  """
  everything = by_variant(variants, found)
  records = {v: own for v, runs in everything.items() if (own := who_learned(runs))}
  harder = {v: [r['harder'] for r in own] for v, own in records.items()}
  values = {v: by_seed(own) for v, own in records.items()}
  texts = dict.fromkeys(text for own in values.values() for text in own)
  asked = {text for own in harder.values() for one in own for text in claims.differences(one)}
  plain = {
    '*runs that learn from their context*': {v: _learned(own) for v, own in everything.items()}
  }
  plain['*accuracy, one shot per class*'] = {v: _accuracy(own) for v, own in records.items()}
  plain['*runs whose label words are anchors*'] = {v: _anchors(own) for v, own in records.items()}
  for text in (text for text in texts if text not in asked):
    plain[text] = _cells(text, values, records)
  first = _markdown('above 0 as the paper has it', variants, plain)
  if not records:
    return first
  rows = _harder_accuracies(harder)
  for text in (text for text in texts if text in asked):
    rows[text] = _cells(text, values, harder)
  task = next(iter(harder.values()))[0]['task']
  return f'{first}\n\n{_markdown(f"harder episodes, `--task={task}`", variants, rows)}'


def _markdown(title: str, columns: Sequence[str], rows: Mapping[str, Mapping[str, str]]) -> str:
  lines = [[title, *columns], ['---'] * (1 + len(columns))]
  lines += [[text, *(cells.get(column, '-') for column in columns)] for text, cells in rows.items()]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def _accuracy(records: Sequence[Record]) -> str:
  means = [float(np.mean(record['accuracy'])) for record in records]
  return paired.interval(means).text(3, sign=False)


def _learned(records: Sequence[Record]) -> str:
  return _share(len(who_learned(records)), len(records))


def _anchors(records: Sequence[Record]) -> str:
  return _share(sum(map(claims.are_anchors, records)), len(records))


def _share(count: int, total: int) -> str:
  """A share with Wilson's interval."""
  low, high = answers.wilson(count, total)
  return f'{count} of {total} [{low:.2f}, {high:.2f}]'


def _harder_accuracies(harder: Mapping[str, Sequence[Record]]) -> dict[str, dict[str, str]]:
  """Rows with the accuracy of every arm of re-weighting."""
  rows = {'*accuracy, one shot per class*': {v: _accuracy(own) for v, own in harder.items()}}
  for arm, part in next(iter(harder.values()))[0]['reweighting'].items():
    shots = f'{part.get("shots")} shots per class'
    name = shots if 'shots' in part else f're-weighting at rate {arm.removeprefix("rate_")}'
    rows[f'*accuracy, {name}*'] = {
      v: _accuracy([one['reweighting'][arm] for one in own]) for v, own in harder.items()
    }
  return rows


def _cells(
  text: str,
  values: Mapping[str, Mapping[str, Sequence[float]]],
  records: Mapping[str, Sequence[Record]],
) -> dict[str, str]:
  """A claim's row, its verdicts only where every run of a variant learned."""
  cells = {}
  for variant, own in values.items():
    learned = all(claims.learned(record) for record in records[variant])
    cells[variant] = cell(own[text], learned) if text in own else '-'
  return cells


def cell(values: Sequence[float], learned: bool) -> str:
  """Differences of runs as an interval with a verdict, or with the seeds that would decide."""
  interval = paired.interval(values)
  verdict = claims.verdict(interval, learned)
  if verdict == paired.UNDECIDED:
    needed = paired.seeds_that_decide(values)
    verdict = f'not yet decided{f", some {needed:,} seeds would" if needed else ""}'
    verdict = verdict if any(values) else 'no difference in any run'
  return f'{interval.text(3)} {verdict}'
