"""The study's figures: summary.json, the tables in README.md, curves.png."""

import json
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.figure
import numpy as np
from scipy import stats

from experiments.common import readme_tables
from experiments.watermark import arms as arms_lib
from moe_jax import atomic_files
from moe_jax.analysis import paired
from moe_jax.post_training import answers
from moe_jax.watermark import partition

START, END = '<!-- tables: written by the command -->', '<!-- end of tables -->'
DOMAINS = ('code', 'prose')  # of the prompts, alternately
LEVELS = (0.05, 0.01, 0.001)
Results = Mapping[int, Mapping[str, Any]]  # by seed


def shares(right: Sequence[bool]) -> str:
  """`93.3 [88.0, 96.4]`: per cent with Wilson's interval."""
  low, high = answers.wilson(sum(right), len(right))
  return f'{100 * sum(right) / len(right):.1f} [{100 * low:.1f}, {100 * high:.1f}]'


def write(out: pathlib.Path, settings: Any, results: Results, times: Mapping[str, float]):
  """Writes summary.json and curves.png to `out`, and the tables into its README.md."""
  tables = [
    sweep_table(results), equal_table(results), others_table(results), attack_table(results),
    domain_table(results), windows_table(results), times_table(times),
  ]  # fmt: skip
  text = '\n\n'.join(tables)
  out.mkdir(parents=True, exist_ok=True)
  summary = {'settings': settings, 'seeds': summaries(results), 'seconds': times}
  atomic_files.write_text(out / 'summary.json', json.dumps(summary, indent=1) + '\n')
  _draw(results).savefig(out / 'curves.png', dpi=110)
  readme_tables.fill(out, START, END, text)
  print(text)


def summaries(results: Results) -> dict[str, Any]:
  """Per seed and arm: texts and chunks that are right, and mean loss and entropy."""
  return {
    str(seed): {
      name: {key: statistics.fmean(values[key]) for key in ('loss', 'entropy')}
      | {'texts': len(values['loss']), 'messages': sum(map(all, values.get('right', [])))}
      | {'chunks': sum(map(sum, values.get('right', [])))}
      for name, values in found['texts'].items()
    }
    for seed, found in results.items()
  }


def messages(results: Results, name: str, row: slice = slice(None)) -> list[bool]:
  """Of all seeds: whether the whole message of each text is right."""
  return [all(one) for found in results.values() for one in found['texts'][name]['right'][row]]


def rises(results: Results, name: str) -> list[float]:
  """By seed: the judge's mean loss beyond that of unmarked texts of the same prompts and draws."""
  return [
    statistics.fmean(found['texts'][name]['loss'])
    - statistics.fmean(found['texts']['unmarked']['loss'])
    for found in results.values()
  ]


def _row(results: Results, arm: arms_lib.Arm) -> str:
  chunks = [c for f in results.values() for row in f['texts'][arm.name]['right'] for c in row]
  loss = [statistics.fmean(found['texts'][arm.name]['loss']) for found in results.values()]
  return (
    f'{shares(messages(results, arm.name))} | {shares(chunks)} | '
    f'{math.exp(statistics.fmean(loss)):.1f} | '
    f'{paired.interval(rises(results, arm.name)).text(3)} |'
  )


HEAD = 'messages right, % | chunks right, % | perplexity | loss above unmarked, nats a token |'


def sweep_table(results: Results) -> str:
  """Success and perplexity over delta."""
  unmarked = [statistics.fmean(f['texts']['unmarked']['loss']) for f in results.values()]
  rows = [f'| {a.delta:g} | {a.kind} | {_row(results, a)}' for a in arms_lib.SWEEP]
  title = 'Two chunks of 10 bits in 110 tokens (0.2 bits a token). Unmarked perplexity: '
  title += f'{math.exp(statistics.fmean(unmarked)):.1f}.'
  return '\n'.join([title, '', f'| delta | kind | {HEAD}', '| --- ' * 6 + '|', *rows])


def at_rise(results: Results, kind: str, rise: float) -> list[float] | None:
  """By seed: messages right, per cent, where the mean loss is `rise` above unmarked.

  Between the deltas of the sweep along straight lines, from nothing without a mark. The place is
  found on the mean over seeds, so that both kinds and all seeds have one delta each.

  Returns:
    None if no delta of the sweep reaches that rise.
  """
  swept = [arm for arm in arms_lib.SWEEP if arm.kind == kind]
  mean = [0.0, *(statistics.fmean(rises(results, arm.name)) for arm in swept)]
  deltas = [0.0, *(arm.delta for arm in swept)]
  above = next((i for i, value in enumerate(mean) if value >= rise), None)
  if above is None:
    return None
  part = (rise - mean[above - 1]) / (mean[above] - mean[above - 1])
  delta = deltas[above - 1] + part * (deltas[above] - deltas[above - 1])
  found = []
  for seed in results.values():
    right = [100 * statistics.fmean(map(all, seed['texts'][arm.name]['right'])) for arm in swept]
    found.append(float(np.interp(delta, deltas, [0.0, *right])))
  return found


def equal_table(results: Results) -> str:
  """Balance against vanilla at equal loss of the judge, paired by prompts and draws."""
  rows = []
  for rise in arms_lib.RISES:
    balance, vanilla = (at_rise(results, kind, rise) for kind in partition.KINDS)
    if balance is None or vanilla is None:
      rows.append(f'| {rise:g} | no delta of the sweep costs so much | | | |')
      continue
    difference = paired.difference(balance, vanilla)
    verdict = paired.verdict(difference, 'higher')
    means = ' | '.join(f'{statistics.fmean(one):.1f}' for one in (balance, vanilla))
    rows.append(f'| {rise:g} | {means} | {difference.text(1)} | {verdict} |')
  head = (
    '| loss above unmarked | balance, % | vanilla, % | difference, points | balance is better |'
  )
  title = (
    'Messages right at equal loss of the judge (between the deltas above along straight lines).'
  )
  return '\n'.join([title, '', head, '| --- ' * 5 + '|', *rows])


def others_table(results: Results) -> str:
  """Rates, message lengths and chunk sizes."""
  rows = [
    f'| {1 / a.tokens_per_bit:g} | {a.message_bits} | {a.chunk_bits} | {a.delta:g} | {a.kind} | '
    f'{_row(results, a)}'
    for a in arms_lib.RATES + arms_lib.CHUNKS
  ]
  head = f'| bits a token | message | chunk | delta | kind | {HEAD}'
  return '\n'.join(['Rates, lengths, chunks.', '', head, '| --- ' * 9 + '|', *rows])


def attack_table(results: Results) -> str:
  """Messages that survive, by attack and kind."""
  found = {kind: [f['attacks'][kind] for f in results.values()] for kind in partition.KINDS}
  rows = []
  for name in found['balance'][0]['right']:
    by_seed = {
      kind: [list(map(all, seed['right'][name])) for seed in found[kind]] for kind in found
    }
    cells = [shares([one for seed in by_seed[kind] for one in seed]) for kind in partition.KINDS]
    means = [[100 * statistics.fmean(s) for s in by_seed[kind]] for kind in partition.KINDS]
    rows.append(
      f'| {name} | {" | ".join(cells)} | {paired.difference(means[0], means[1]).text(1)} |'
    )
  scans = {k: [[o['exact'] for o in seed['scan']] for seed in found[k]] for k in found}
  cells = [shares([one for seed in scans[kind] for one in seed]) for kind in partition.KINDS]
  means = [[100 * statistics.fmean(s) for s in scans[kind]] for kind in partition.KINDS]
  rows.append(
    f'| pasted into 300 tokens, scanned | {" | ".join(cells)} | '
    f'{paired.difference(means[0], means[1]).text(1)} |'
  )
  done = statistics.fmean(s['replaced'][str(arms_lib.SUBSTITUTED[-1])] for s in found['balance'])
  other = statistics.fmean(s['other_ids'] for kind in found for s in found[kind])
  title = (
    f'Attacks at delta {arms_lib.ATTACKED:g}, messages right, %. Of 30 % to be substituted '
    f'{100 * done:.1f} % were; {100 * other:.0f} % of the texts have other ids when tokenised '
    'again.'
  )
  head = '| attack | balance | vanilla | difference, points |'
  return '\n'.join([title, '', head, '| --- ' * 4 + '|', *rows])


def domain_table(results: Results) -> str:
  """Success by the kind of prompt, with the writer's entropy."""
  rows = []
  for arm in arms_lib.SWEEP:
    cells = []
    for number in range(len(DOMAINS)):
      part = slice(number, None, 2)
      entropy = [v for f in results.values() for v in f['texts'][arm.name]['entropy'][part]]
      right = shares(messages(results, arm.name, part))
      cells.append(f'{right} | {statistics.fmean(entropy):.2f}')
    gaps = [
      100 * (statistics.fmean(map(all, right[0::2])) - statistics.fmean(map(all, right[1::2])))
      for right in (f['texts'][arm.name]['right'] for f in results.values())
    ]
    rows.append(
      f'| {arm.delta:g} | {arm.kind} | {" | ".join(cells)} | {paired.interval(gaps).text(1)} |'
    )
  head = (
    '| delta | kind | code, % | entropy, nats | prose, % | entropy, nats | code - prose, points |'
  )
  title = 'Messages right behind prompts of code and of prose.'
  return '\n'.join([title, '', head, '| --- ' * 7 + '|', *rows])


def windows_table(results: Results) -> str:
  """How often text without a mark, or with another key, is claimed to carry something.

  The windows are the same for every seed, which reads them with its key.
  """
  rows, keys = [], len(results)
  for kind in partition.KINDS:
    windows = [w for f in results.values() for w in f['windows'][kind]]
    wrong = [
      p for f in results.values() for row in f['attacks'][kind]['wrong_key_p_values'] for p in row
    ]
    plain = [1024 * float(stats.binom.sf(hits - 1, places, 0.5)) for _, hits, places in windows]
    for name, values in (
      (
        f'{len(windows) // keys:,} windows of 50 tokens, {keys} keys',
        [p for p, _, _ in windows],
      ),
      ('the same, by a plain binomial', plain),
      (f'{len(wrong)} marked chunks, another key', wrong),
    ):
      cells = []
      for level in LEVELS:
        right = sum(p <= level for p in values)
        low, high = answers.wilson(right, len(values))
        cells.append(f'{100 * right / len(values):.2f} [{100 * low:.2f}, {100 * high:.2f}]')
      rows.append(f'| {kind} | {name} | {" | ".join(cells)} |')
  levels = ' | '.join(f'confidence {1 - level:g}' for level in LEVELS)
  title = 'Claims about text that does not carry a message of the key, %.'
  return '\n'.join([title, '', f'| kind | text | {levels} |', '| --- ' * 5 + '|', *rows])


def times_table(times: Mapping[str, float]) -> str:
  """Seconds per text."""
  rows = [f'| {name} | {seconds:.3f} |' for name, seconds in times.items()]
  return '\n'.join(
    ['Seconds per text of 110 tokens.', '', '| what | seconds |', '| --- | --- |', *rows]
  )


def _draw(results: Results) -> matplotlib.figure.Figure:
  """Messages right over the judge's loss, by kind and by prompt, with Wilson's intervals."""
  figure = matplotlib.figure.Figure(figsize=(10, 4), layout='constrained')
  panels = figure.subplots(1, 3, sharey=True)
  for panel, (title, part) in zip(
    panels, (('all', slice(None)), ('code', slice(0, None, 2)), ('prose', slice(1, None, 2)))
  ):
    for kind, color in zip(partition.KINDS, ('#1b6ca8', '#c0561f')):
      swept = [arm for arm in arms_lib.SWEEP if arm.kind == kind]
      x, y, low, high = [], [], [], []
      for arm in swept:
        right = messages(results, arm.name, part)
        bounds = answers.wilson(sum(right), len(right))
        y.append(sum(right) / len(right))
        low.append(max(0.0, y[-1] - bounds[0]))
        high.append(max(0.0, bounds[1] - y[-1]))
        x.append(
          statistics.fmean(
            v - u
            for f in results.values()
            for v, u in zip(
              f['texts'][arm.name]['loss'][part], f['texts']['unmarked']['loss'][part]
            )
          )
        )
      panel.errorbar(x, y, [low, high], marker='o', color=color, capsize=3, label=kind)
      for arm, a, b in zip(swept, x, y):
        panel.annotate(
          f'{arm.delta:g}', (a, b), textcoords='offset points', xytext=(5, -10), size=8
        )
    panel.set_title(f'prompts: {title}', size=10)
    panel.set_xlabel("judge's loss above unmarked, nats a token", size=9)
    panel.grid(alpha=0.3)
  panels[0].set_ylabel('messages of 20 bits that are right')
  panels[0].legend()
  return figure
