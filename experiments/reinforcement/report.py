"""Tables, picture and results.json of the study."""

import json
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib.figure
from matplotlib.backends import backend_agg

from experiments.common import readme_tables
from experiments.reinforcement import arms as arms_lib
from moe_jax import atomic_files
from moe_jax.analysis import paired

START, END = '<!-- tables: written by the command -->', '<!-- end of tables -->'
MEASURE = 'drawn'  # what claims are about: a drawn answer is right
AGGREGATION = 'min'  # of the scores of steps, as the paper has it
MARGIN = 2.0  # points that count as equal
WORDS = {paired.UNDECIDED: 'not yet decided'}
Records = Mapping[int, Mapping[str, Any]]  # by seed, then by what was measured


class Claim(NamedTuple):
  """A difference, fixed before the run: `first` minus `second`."""

  says: str
  first: str
  second: str
  direction: str = 'higher'


# Of gains over the own start, in points, so that a dense model can be set beside a mixture.
LEARNING = (
  Claim('GRPO by outcome gains more than online RFT', 'outcome', 'rft'),
  Claim('GRPO by process gains more than by outcome', 'process', 'outcome'),
  Claim('PPO by outcome gains more than online RFT', 'ppo', 'rft'),
  Claim('step-by-step PPO gains more than PPO by outcome', 'step_ppo', 'ppo'),
  Claim('a trained PRM gains less than the checker', 'process_prm', 'process', 'lower'),
  Claim('replay makes no difference', 'step_ppo', 'step_ppo_unreplayed', 'equal'),
  Claim('a mixture gains more than a dense model', 'process', 'dense_process'),
)
# Of held-out questions answered rightly, points, at the most candidates.
VERIFICATION = (
  Claim('votes beat the greedy answer', 'self_consistency', 'greedy'),
  Claim('the ORM beats votes', 'orm', 'self_consistency'),
  Claim('the PRM beats the ORM', 'prm', 'orm'),
  Claim('the PRM beats votes', 'prm', 'self_consistency'),
  Claim('votes weighted by the PRM beat votes', 'self_consistency+prm', 'self_consistency'),
  Claim('votes weighted by the PRM beat the PRM', 'self_consistency+prm', 'prm'),
)
NAMES = {
  'self_consistency': 'self-consistency (votes)',
  'orm': 'best by ORM',
  'prm': 'best by PRM (least step)',
  'self_consistency+orm': 'votes weighted by ORM',
  'self_consistency+prm': 'votes weighted by PRM',
}


def write(
  out: pathlib.Path,
  arms: Mapping[str, arms_lib.Arm],
  records: Records,
  settings: Mapping[str, Any],
):
  """Writes results.json, curves.png and the tables of README.md, and prints the tables.

  Args:
    out: their directory.
    arms: those that were run.
    records: what was measured of each seed.
    settings: of the study, for the record.

  Raises:
    errors.InputError: README.md has no place for the tables.
  """
  out.mkdir(parents=True, exist_ok=True)
  record = {'settings': settings, 'seeds': records}
  atomic_files.write_text(out / 'results.json', json.dumps(record, indent=1) + '\n')
  draw(arms, records, out / 'curves.png')
  text = '\n\n'.join(tables(arms, records))
  readme_tables.fill(out, START, END, text)
  print(text)


def tables(arms: Mapping[str, arms_lib.Arm], records: Records) -> list[str]:
  """The study's tables in Markdown."""
  found = []
  if arms:
    found += [arms_table(arms, records), seeds_table(arms, records)]
    found.append(
      _claims('Gains over the start, drawn answers, points.', LEARNING, gains(arms, records))
    )
  if all('verification' in one for one in records.values()):
    found += [verification_table(records)]
    found.append(
      _claims(
        f'Held-out questions right, points, N = {_most(records)}.', VERIFICATION, shares(records)
      )
    )
    found.append(labels_table(records))
  return found


def gains(
  arms: Mapping[str, arms_lib.Arm], records: Records, measure: str = MEASURE
) -> dict[str, list[float]]:
  """Arm -> points that each seed has gained over its own start."""
  return {
    name: [100 * (one[name][measure] - one[arm.base][measure]) for one in records.values()]
    for name, arm in arms.items()
  }


def shares(records: Records) -> dict[str, list[float]]:
  """Way of choosing -> percent of questions that each seed answers rightly, at the most answers."""
  most = str(_most(records))
  found = {'greedy': [100 * _of(one)['greedy'] / _of(one)['questions'] for one in records.values()]}
  for method in NAMES:
    found[method] = [_chosen(one, method, most) for one in records.values()]
  return found


def _of(record: Mapping[str, Any]) -> Mapping[str, Any]:
  return record['verification']


def _chosen(record: Mapping[str, Any], method: str, count: str, how: str = AGGREGATION) -> float:
  found = _of(record)
  return 100 * found['right_and_steps'][how][method][count][0] / found['questions']


def _counts(records: Records) -> list[int]:
  any_one = next(iter(records.values()))
  return [int(n) for n in _of(any_one)['right_and_steps'][AGGREGATION]['orm']]


def _most(records: Records) -> int:
  return max(_counts(records))


def _interval(values: Sequence[float], digits: int = 1, *, sign: bool = False) -> str:
  return paired.interval(values).text(digits, sign=sign)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  return '\n'.join('| ' + ' | '.join(row) + ' |' for row in [head, ['---'] * len(head), *rows])


def arms_table(arms: Mapping[str, arms_lib.Arm], records: Records) -> str:
  """Means over seeds of every start and arm, and what the arms gain."""
  seeds = list(records.values())

  def mean(name: str, key: str) -> float:
    return statistics.fmean(one[name][key] for one in seeds)

  def row(name: str, says: str, gained: Sequence[str]) -> list[str]:
    percents = [f'{100 * mean(name, key):.1f}' for key in ('greedy', 'drawn', 'right_steps')]
    return [says, *percents, *gained, f'{mean(name, "steps"):.2f}', f'{mean(name, "seconds"):.0f}']

  head = ['', 'greedy right, %', 'drawn right, %', 'steps right, %', 'gain, greedy, points',
          'gain, drawn, points', 'steps of an answer', 'seconds']  # fmt: skip
  bases = dict.fromkeys(['base', *(arm.base for arm in arms.values())])
  says = {'base': 'start', 'dense_base': 'start, dense'}
  rows = [row(name, says[name], ['', '']) for name in bases]
  for name, arm in arms.items():
    gained = [_interval(gains(arms, records, key)[name], sign=True) for key in ('greedy', 'drawn')]
    rows.append(row(name, arm.says, gained))
  which = ', '.join(map(str, records))
  return f'Arms, means over the seeds {which}.\n\n' + _table(head, rows)


def seeds_table(arms: Mapping[str, arms_lib.Arm], records: Records) -> str:
  """What every seed starts from and gains, drawn answers."""
  found = gains(arms, records)
  rows = [
    [str(seed), f'{100 * record["base"][MEASURE]:.1f}', *(f'{found[a][i]:+.1f}' for a in arms)]
    for i, (seed, record) in enumerate(records.items())
  ]
  head = ['seed', 'start, %', *(arm.says for arm in arms.values())]
  return 'Gains of every seed, drawn answers, points.\n\n' + _table(head, rows)


def _claims(title: str, claims: Sequence[Claim], values: Mapping[str, Sequence[float]]) -> str:
  """Differences with their verdicts, alone and corrected for all claims of the table."""
  own = [one for one in claims if one.first in values and one.second in values]
  differences = [[a - b for a, b in zip(values[c.first], values[c.second])] for c in own]
  margins = [MARGIN if c.direction == 'equal' else 0.0 for c in own]
  found = [paired.interval(one) for one in differences]
  alone = [paired.verdict(f, c.direction, m) for f, c, m in zip(found, own, margins)]
  p_values = [paired.p_value(d, c.direction, m) for d, c, m in zip(differences, own, margins)]
  together = paired.corrected(alone, p_values)
  rows = []
  for claim, interval, values_, one, both in zip(own, found, differences, alone, together):
    margin = MARGIN if claim.direction == 'equal' else None
    needed = paired.seeds_that_decide(values_, margin) if both == paired.UNDECIDED else None
    rows.append(
      [
        claim.says + (f' (within {MARGIN:g})' if margin else ''),
        interval.text(1),
        WORDS.get(one, one),
        WORDS.get(both, both),
        '' if both != paired.UNDECIDED else '-' if needed is None else f'{needed:,}',
      ]
    )
  head = ['claim', 'difference', 'verdict', 'verdict (Holm)', 'seeds that would decide']
  return f'{title}\n\n' + (_table(head, rows) if rows else 'No claim has both of its arms.')


def verification_table(records: Records) -> str:
  """Percent right by way of choosing and number of answers, means over seeds."""
  counts, seeds = _counts(records), list(records.values())
  rows = [['greedy', _interval(shares(records)['greedy']), *['' for _ in counts[1:]]]]
  for method, says in NAMES.items():
    means = [statistics.fmean(_chosen(one, method, str(n)) for one in seeds) for n in counts[:-1]]
    last = _interval([_chosen(one, method, str(counts[-1])) for one in seeds])
    rows.append([says, *(f'{m:.1f}' for m in means), last])
  for how, says in (('last', 'best by PRM, last step'), ('product', 'best by PRM, product')):
    means = [
      statistics.fmean(_chosen(one, 'prm', str(n), how) for one in seeds) for n in counts[:-1]
    ]
    last = _interval([_chosen(one, 'prm', str(counts[-1]), how) for one in seeds])
    rows.append([says, *(f'{m:.1f}' for m in means), last])
  any_right = [100 * _of(one)['any_right'] / _of(one)['questions'] for one in seeds]
  rows.append(['any of them right', *['' for _ in counts[:-1]], _interval(any_right)])
  head = ['chosen', *(f'N={n}' for n in counts)]
  which = ', '.join(map(str, records))
  title = f'Held-out questions answered rightly by the start, %, means over the seeds {which}.'
  return f'{title}\n\n' + _table(head, rows)


def labels_table(records: Records) -> str:
  """How good labels and judges are, means over seeds."""
  seeds = [_of(one) for one in records.values()]
  rows = []
  for n in seeds[0]['labels']['by_completions']:
    own = [one['labels']['by_completions'][n] for one in seeds]
    cells = [_interval([100 * o[key] for o in own]) for key in ('precision', 'recall', 'accuracy')]
    rows.append([n, *cells])
  number = statistics.fmean(one['labels']['solutions'] for one in seeds)
  title = (
    f'Hard labels of steps before the last against true steps, %; {number:,.0f} solutions a seed.'
  )
  text = f'{title}\n\n' + _table(['completions', 'precision', 'recall', 'accuracy'], rows)

  def judged(pick: Callable[[Mapping[str, Any]], float | None]) -> str:
    known = [area for one in seeds if (area := pick(one['judges'])) is not None]
    return _interval(known, 3) if known else '-'  # nothing good among what is held out, or no bad

  rows = [
    ['PRM, labels of steps', judged(lambda one: one['prm']['auc'])],
    ['PRM, true steps', judged(lambda one: one['prm']['auc_of_truth'])],
    ['ORM, right solutions', judged(lambda one: one['orm']['auc'])],
  ]
  title = 'Judges on held-out solutions, area under the curve.'
  return f'{text}\n\n{title}\n\n' + _table(['judge', 'area'], rows)


def draw(arms: Mapping[str, arms_lib.Arm], records: Records, path: pathlib.Path):
  """Gains of the arms with their intervals; questions answered rightly over N."""
  figure = matplotlib.figure.Figure(figsize=(10, 3.4), layout='constrained')
  backend_agg.FigureCanvasAgg(figure)
  left, right = figure.subplots(1, 2)
  for i, values in enumerate(gains(arms, records).values()):
    found = paired.interval(values)
    if found.num_seeds > 1:
      left.plot([found.low, found.high], [i, i], color='C0', lw=2)
    left.plot(values, [i] * len(values), '.', color='0.6', ms=4)
    left.plot(found.mean, i, 'o', color='C0', ms=5)
  left.axvline(0, color='0.5', lw=1)
  left.set_yticks(range(len(arms)), [arm.says for arm in arms.values()], fontsize=8)
  left.invert_yaxis()
  left.set_xlabel('drawn answers right, points above the start')
  if all('verification' in one for one in records.values()):
    counts = _counts(records)
    for method, says in NAMES.items():
      means = [
        statistics.fmean(_chosen(one, method, str(n)) for one in records.values()) for n in counts
      ]
      right.plot(counts, means, 'o-', ms=3, label=says)
    right.axhline(statistics.fmean(shares(records)['greedy']), color='0.5', lw=1, label='greedy')
    right.set_xscale('log', base=2)
    right.set_xticks(counts, map(str, counts))
    right.set_xlabel('answers to each question')
    right.set_ylabel('right, %')
    right.legend(fontsize=7)
  figure.savefig(path, dpi=110, metadata={'Software': None})
