"""The study as a report: verdicts first, then figures, tables, and how to do it again."""

import csv
import io
import math
import os
import pathlib
import platform
import shlex
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from experiments.common import html_report, spread
from experiments.routing_ablation import (
  all_pairs,
  arms,
  earlier,
  learning_rates,
  matching,
  measure,
  over_tokens,
  pictures,
  repetition,
)
from moe_jax import atomic_files
from moe_jax.analysis import difference_curves, paired
from moe_jax.config import schema
from moe_jax.planning import describe
from moe_jax.runs import run_record

MODULE = 'experiments.routing_ablation'


class Study(NamedTuple):
  """Everything that was found."""

  scale: str
  configs: Mapping[str, schema.Config]  # by arm
  results: measure.Results
  rates: Mapping[str, float]  # training tokens per second, by arm
  described: Mapping[str, describe.Description]
  swept: learning_rates.Sweep  # what each learning rate came to, {} where none was swept


class Graded(NamedTuple):
  """A claim and what the runs say of it."""

  claim: arms.Claim
  difference: paired.Interval
  plain: str  # verdict of the held-out figures of this claim alone
  base: float  # mean of the baseline; of the arm's own bits per byte, where the baseline is zero
  p_value: float
  curve: difference_curves.Curve | None = None  # of the training loss, for claims about it
  moves: bool = False  # see `difference_curves.RULE`
  holm: str = ''  # verdict when all claims are read together

  @property
  def verdict(self) -> str:
    """At the end of these runs."""
    return difference_curves.NOT_YET if self.moves else self.plain


def commands_of(
  argv: Sequence[str], results: measure.Results, swept: learning_rates.Sweep
) -> list[str]:
  """The commands that train all runs of a report, without the machine's own paths.

  One for the arms of each set of seeds; those that came from earlier reports are among them.

  Args:
    argv: of the command that writes the report.
    results: its runs.
    swept: what their rates were chosen by. Rates of a sweep that came with earlier runs are those
      of the report itself.
  """
  own = ('--out=', '--workdir=', '--shard=', '--part=', '--earlier=', '--jobs=', '--budget_hours=')
  own += ('--arms=', '--seeds=')
  words = [word for word in _with_equals_signs(argv) if not word.startswith(own)]
  if swept and not any(word.startswith(('--rates_from=', '--learning_rates=')) for word in words):
    words.append('--rates_from=REPORT')
  lines = []
  for seeds, names in _by_seeds(results).items():
    first = seeds == tuple(range(len(seeds)))
    # A single number says how many.
    given = (
      str(len(seeds)) if first else ','.join(map(str, seeds * 2 if len(seeds) == 1 else seeds))
    )
    words_of_it = [*words, f'--arms={",".join(names)}', f'--seeds={given}']
    lines.append(shlex.join(['python', '-m', MODULE, '--workdir=W', *words_of_it]))
  return lines


def _with_equals_signs(argv: Sequence[str]) -> list[str]:
  """Flags as --name=value, where they may be -name=value or have the value as the next word."""
  found: list[str] = []
  for word in argv:
    if word.startswith('-'):
      found.append('--' + word.lstrip('-'))
    else:
      found[-1] += f'={word}'  # a word that belongs to no flag has been refused
  return found


def _by_seeds(results: measure.Results) -> dict[tuple[int, ...], list[str]]:
  """The arms that have each set of seeds."""
  found: dict[tuple[int, ...], list[str]] = {}
  for name, runs in results.items():
    found.setdefault(tuple(sorted(runs)), []).append(name)
  return found


def grade(results: measure.Results, configs: Mapping[str, schema.Config]) -> list[Graded]:
  """All claims whose two arms were trained and have the figure."""
  found = []
  for claim in arms.CLAIMS:
    if (both := measure.against(results, claim.arm, claim.baseline, claim.figure)) is None:
      continue
    values, baseline = both
    scale = baseline if claim.baseline else measure.column(results, claim.arm, arms.BITS)
    base = abs(float(np.mean(scale)))
    margin = arms.EQUAL_MARGIN * base
    difference = paired.difference(values, baseline)
    verdict = paired.verdict(difference, claim.direction, margin)
    p_value = paired.p_value([a - b for a, b in zip(values, baseline)], claim.direction, margin)
    curve = over_tokens.curve(claim, results, configs)
    moves = over_tokens.moves(claim, curve, difference, results, configs)
    found.append(Graded(claim, difference, verdict, base, p_value, curve, moves))
  corrected = paired.corrected([g.plain for g in found], [g.p_value for g in found])
  return [g._replace(holm=verdict) for g, verdict in zip(found, corrected)]


def sentence(graded: Graded) -> str:
  """A claim's verdict for people."""
  claim, found = graded.claim, graded.difference
  what, digits = arms.FIGURES[claim.figure]
  notes = [f'at this length {graded.plain}'] if graded.moves else []
  if claim.direction == 'equal' and graded.plain == paired.CONTRADICTED:
    notes.append(f'{"below" if found.mean < 0 else "above"}, not equal')
  if graded.holm != graded.plain:
    notes.append(f'{graded.holm} when all claims are read together')
  note = f' ({"; ".join(notes)})' if notes else ''
  return (
    f'**{graded.verdict.capitalize()}**{note}: '
    f'`{claim.arm}`{f" against `{claim.baseline}`" if claim.baseline else ""}, {what}: '
    f'{found.text(digits)}, {_seeds(found.num_seeds)}. The paper: {claim.paper}.'
  )


def _seeds(*numbers: int) -> str:
  """`5 seeds`, `5 to 15 seeds`."""
  low, high = min(numbers), max(numbers)
  return f'{low} to {high} seeds' if low < high else f'{low} seed{"s" if low > 1 else ""}'


def slope(results: measure.Results, sweep: arms.Sweep) -> tuple[paired.Interval, np.ndarray] | None:
  """(bits per byte per doubling, coefficients of the parabola through the means) of a sweep.

  The slope is fitted seed by seed, over the seeds that all its arms have, on the logarithm to base
  2 of the axis. None with fewer than three arms, or no such seed.
  """
  if (found := measure.along(results, sweep)) is None:
    return None
  x, bits = found
  slopes = np.polyfit(x, bits, 1)[0]
  return paired.interval(slopes.tolist()), np.polyfit(x, bits.mean(axis=1), 2)


def write(out: pathlib.Path, study: Study, commands: Sequence[str]) -> list[pathlib.Path]:
  """Writes report.md, report.html, the tables and the pictures; returns the paths."""
  out.mkdir(parents=True, exist_ok=True)
  graded = grade(study.results, study.configs)
  drawn = pictures.draw(
    out, study.results, graded, [(s, slope(study.results, s)) for s in arms.SWEEPS]
  )
  pairs = all_pairs.pairs(study.results)
  if pairs:
    drawn.append(all_pairs.draw(out / 'pairs.png', pairs))
  claims = [one.claim for one in graded]
  repeated = repetition.blocks(out / 'repetition.png', study.results, claims)
  written = html_report.write(
    [
      *_verdicts(study, graded),
      *over_tokens.blocks(graded),
      *_figures(drawn),
      *repeated,
      *_tables(study, commands),
    ],
    out,
  )
  texts = {'results.csv': csv_text(study)}
  if pairs:
    texts[all_pairs.FILE] = all_pairs.csv_text(pairs)
  if any(one.curve is not None for one in graded):
    texts['differences.csv'] = over_tokens.csv_text(graded)
  if any(run['curve'] for runs in study.results.values() for run in runs.values()):
    texts['runs.csv'] = over_tokens.runs_text(study.results)
  if study.swept:
    texts[learning_rates.FILE] = learning_rates.csv_text(study.swept)
  tables = [out / name for name in texts]
  for path, text in zip(tables, texts.values()):
    atomic_files.write_text(path, text)
  shown = [*drawn, *(one for one in repeated if isinstance(one, html_report.Picture))]
  return [*written, *tables, *(p.path for p in shown)]


def _verdicts(study: Study, graded: Sequence[Graded]) -> list[html_report.Block]:
  cfg = next(iter(study.configs.values()))
  counts = {v: sum(g.verdict == v for g in graded) for v in _VERDICTS}
  plain = [sum(g.plain == v for g in graded) for v in _PLAIN]
  holm = [sum(g.holm == v for g in graded) for v in _PLAIN]
  lines = [sentence(g) for verdict in _VERDICTS for g in graded if g.verdict == verdict]
  for sweep in arms.SWEEPS:
    if (found := slope(study.results, sweep)) is not None:
      lines.append(
        f'{sweep.title}: {found[0].text(4)} bits per byte per doubling of {sweep.axis}'
        f'{_lowest(sweep, found[1], study.results)}.'
      )
  blocks: list[html_report.Block] = [
    html_report.Heading(f'Routing ablation, scale {study.scale}', 1),
    html_report.Heading('Verdict'),
  ]
  if graded:
    parts = ', '.join(f'{count} {verdict}' for verdict, count in counts.items() if count)
    blocks.append(
      html_report.Text(
        f'Of {len(graded)} claims of the papers, runs of {matching.tokens(cfg):,} tokens with '
        f'{_seeds(*(g.difference.num_seeds for g in graded))} give: **{parts}**. This is what runs '
        "of this size show, not what the papers' do."
      )
    )
  blocks.append(html_report.Bullets(lines or ['No two arms of a claim were trained.']))
  if rates := learning_rates.from_elsewhere(study.swept, study.configs, study.scale):
    blocks.append(html_report.Text(rates))
  blocks.append(
    html_report.Text(
      'Differences are paired by seed (same start, same batches): mean [95 % confidence interval, '
      "Student's t]. An interval that covers zero is *not distinguishable*, whatever its sign; "
      f'claims of equality are confirmed within {arms.EQUAL_MARGIN:.1%} of the baseline. '
      f'{difference_curves.RULE}. '
      f'Of the held-out figures at the end alone, {_counted(plain)}. Of {len(graded)} intervals at '
      f'95 %, about {0.05 * len(graded):.1f} would miss their mean by chance; corrected for their '
      f'number (Holm), {_counted(holm)}.'
    )
  )
  return blocks


def _lowest(sweep: arms.Sweep, parabola: np.ndarray, results: measure.Results) -> str:
  """Where the parabola is lowest, if that lies among the arms that were trained."""
  bend, slope, _ = parabola
  at = -slope / (2 * bend) if bend > 0 else -math.inf  # its logarithm to base 2
  trained = [point for name, point in sweep.points.items() if results.get(name)]
  low, high = (math.log2(pick(trained)) for pick in (min, max))
  inside = low < at < high
  return f'; the parabola through the means is lowest at {2**at:.1f}' if inside else ''


_PLAIN = (paired.CONFIRMED, paired.CONTRADICTED, paired.UNDECIDED)
_VERDICTS = (*_PLAIN, difference_curves.NOT_YET)


def _counted(counts: Sequence[int]) -> str:
  return ', '.join(f'{count} {verdict}' for count, verdict in zip(counts, _PLAIN)) + ' claims'


def _figures(drawn: Sequence[html_report.Picture]) -> list[html_report.Block]:
  return [html_report.Heading('Figures'), *drawn] if drawn else []


def _tables(study: Study, commands: Sequence[str]) -> list[html_report.Block]:
  base = 'gshard' if 'gshard' in study.rates else next(iter(study.rates))
  cfg = next(iter(study.configs.values()))
  return [
    html_report.Heading('Arms'),
    html_report.Table(
      [
        *('arm', 'what', 'seeds', 'peak rate'),
        *('bits per byte', f'minus {base}, by seed'),
        *('MaxVio', 'sum of gates', 'saved when repeated'),
        *('dropped in training, %', 'tokens/s'),
        f'x {base}',
      ],
      [
        [
          f'`{name}`',
          arms.ARMS[name].label,
          str(len(study.results[name])),
          f'{study.configs[name].optim.peak_lr:g}',
          _mean(study.results, name, arms.BITS, 4),
          _minus(study.results, name, base),
          _mean(study.results, name, arms.VIO, 2),
          _gates(study.results, name),
          _mean(study.results, name, measure.SAVED, 2),
          _mean(study.results, name, 'train_drop_rate', 1, 100.0),
          f'{study.rates[name]:,.0f}',
          f'{study.rates[name] / study.rates[base]:.2f}',
        ]
        for name in sorted(study.configs, key=lambda n: measure.rank(study.results, n))
      ],
    ),
    html_report.Text(
      'Mean ± sample standard deviation over seeds, best first; MaxVio is of the whole held-out '
      'text, mean over layers; the gates of a token are added up before and after training, mean '
      'over layers and held-out tokens; saved when repeated are the nats per token that held-out '
      'text costs less the second time in a row (`moe_jax/analysis/copying.py`); dropped is over '
      'the last fifth of training; tokens/s is the training step of one seed, arms timed in turns '
      'on the machine below, those of a later call in turns with one of before.'
    ),
    *learning_rates.blocks(study.swept),
    html_report.Heading('Do the arms match?'),
    html_report.Table(matching.HEADER, matching.rows(study.described)),
    html_report.Bullets(matching.check(study.described)),
    html_report.Heading('Do it again'),
    html_report.Code(commands),
    html_report.Bullets(
      [
        *(
          ['REPORT is the directory of this page'] if any('=REPORT' in c for c in commands) else []
        ),
        f'{_whose_seeds(study.results)}; {cfg.train.num_steps} steps of '
        f'{cfg.train.batch_size} x {cfg.model.max_seq_len} tokens; data `{cfg.data.source}`',
        f'{measure.hours_text(study.results)} of one process on {_hardware()}',
        ', '.join(f'{k} {v}' for k, v in run_record.versions().items() if v),
        f'trained at commit {", ".join(measure.commits(study.results))} (+ = with changes)',
      ]
    ),
  ]


def _whose_seeds(results: measure.Results) -> str:
  """`seeds 0, 1, 2`, or which arms have which."""
  groups = {', '.join(map(str, seeds)): names for seeds, names in _by_seeds(results).items()}
  if len(groups) == 1:
    return f'seeds {next(iter(groups))}'
  return '; '.join(f'seeds {seeds} of {", ".join(names)}' for seeds, names in groups.items())


def _mean(results: measure.Results, name: str, figure: str, digits: int, scale: float = 1.0) -> str:
  return spread.spread(measure.column(results, name, figure), digits, scale)


def _gates(results: measure.Results, name: str) -> str:
  """`0.13 -> 0.52` before and after training, over the runs that say so."""
  ends = [
    [run[key] for run in results[name].values() if run.get(key) is not None]
    for key in measure.GATES
  ]
  return ' -> '.join(f'{np.mean(values):.2f}' for values in ends) if all(ends) else '-'


def _minus(results: measure.Results, name: str, base: str) -> str:
  """Difference of bits per byte over the seeds that both have."""
  both = measure.against(results, name, base, arms.BITS)
  if name == base or both is None:
    return '0' if name == base else '-'
  return spread.spread([a - b for a, b in zip(*both)], 4)


def _hardware() -> str:
  device = jax.devices()[0]
  return (
    f'{jax.device_count()} x {device.device_kind} ({os.cpu_count()} cores, {platform.machine()})'
  )


def csv_text(study: Study) -> str:
  """A line per arm and seed."""
  keys = [*arms.FIGURES, *earlier.KEPT]
  text = io.StringIO()
  writer = csv.writer(text, lineterminator='\n')
  writer.writerow(['arm', 'seed', *keys, 'tokens_per_second', 'scale'])
  for name, runs in study.results.items():
    for seed, figures in runs.items():
      row = ['' if figures.get(key) is None else figures[key] for key in keys]
      writer.writerow([name, seed, *row, round(study.rates[name]), study.scale])
  return text.getvalue()
