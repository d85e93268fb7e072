"""Each claim against the length of training, from reports of several lengths.

python -m experiments.routing_ablation.lengths --reports=DIR,DIR,... --out=DIR [--scale=tiny]

Within a run a difference moves with the tokens and with the learning rate, which falls; arms with
different rates part in the middle and come together as both fall. Here every point is the end of
whole runs, each with the schedule of its length. An arm that starts from another one's run is also
compared at equal tokens altogether. Writes lengths.md, lengths.png of the claim that is known at
most lengths, and claims.png of all. Trains nothing.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags

from experiments.common import cli
from experiments.routing_ablation import arms


class Point(NamedTuple):
  """A claim at one length."""

  tokens: int  # of the arm's own run
  graded: Any  # report.Graded
  rates: tuple[float, ...]  # peak rates of the arm and its baseline


def define_flags():
  """Flags of this command."""
  flags.DEFINE_list('reports', [], 'directories of reports, one or more per length')
  flags.DEFINE_enum('scale', 'tiny', list(arms.SCALES), 'size of their arms')
  cli.path_flag('out', '', 'directory of the page and its pictures')


def main(unused_argv: Sequence[str]):
  """Reads, grades, writes."""
  from experiments.common import html_report
  from experiments.routing_ablation import length_pictures
  from moe_jax import atomic_files, errors

  values = flags.FLAGS
  errors.require(
    len(values.reports) >= 2, '--reports must be two directories of reports or more, of other steps'
  )
  out = pathlib.Path(cli.required('out'))
  runs = read([pathlib.Path(one) for one in values.reports], values.scale)
  found = points(runs, values.scale)
  errors.require(
    bool(found), '--reports: no claim was graded at two lengths; name reports that share two arms'
  )
  out.mkdir(parents=True, exist_ok=True)
  drawn = length_pictures.draw(out, found)
  shown = found | with_their_start(runs, values.scale)
  texts = [html_report.markdown(block) for block in blocks(shown, drawn)]
  atomic_files.write_text(out / 'lengths.md', '\n\n'.join(texts) + '\n')
  print('wrote: ' + ' '.join(str(path) for path in (out / 'lengths.md', *(p.path for p in drawn))))


def read(directories: Sequence[pathlib.Path], scale: str) -> dict[int, Any]:
  """The runs of reports as `measure.Results`, by their steps, shortest first.

  Args:
    directories: of reports; those of one length are joined, the first one's runs first.
    scale: of all of them.

  Raises:
    errors.InputError: a report cannot be read, has runs of several lengths, or joined with others
      an arm at several learning rates.
  """
  from experiments.routing_ablation import earlier
  from moe_jax import errors

  by_steps: dict[int, Any] = {}
  for directory in directories:
    pages = {arm.name: arms.resolve(arm, scale) for arm in arms.of_scale(scale)}
    runs = earlier.read(directory, pages, scale)
    steps = sorted({run['step'] for by_seed in runs.values() for run in by_seed.values()})
    errors.require(
      len(steps) == 1, f'--reports={directory} must have runs of one length, and has {steps} steps'
    )
    by_steps[steps[0]] = earlier.joined(by_steps.get(steps[0], {}), runs)
  for steps, results in by_steps.items():
    for name, by_seed in results.items():
      rates = sorted({run['peak_lr'] for run in by_seed.values()})
      errors.require(
        len(rates) == 1,
        f'--reports have `{name}` at peak rates {", ".join(f"{rate:g}" for rate in rates)} for '
        f'{steps} steps, which is no one arm; leave one of these reports out',
      )
  return dict(sorted(by_steps.items()))


def points(by_steps: Mapping[int, Any], scale: str) -> dict[arms.Claim, list[Point]]:
  """Every claim that was graded at two lengths or more, shortest first.

  Args:
    by_steps: of `read`.
    scale: of all runs.
  """
  from experiments.routing_ablation import matching, report

  found: dict[arms.Claim, list[Point]] = {}
  for steps, results in by_steps.items():
    configs = {name: arms.resolve(arms.ARMS[name], scale, steps) for name in results}
    for graded in report.grade(results, configs):
      claim = graded.claim
      rates = [_rate(results[name]) for name in (claim.arm, claim.baseline) if name]
      tokens = matching.tokens(configs[claim.arm])
      found.setdefault(claim, []).append(Point(tokens, graded, tuple(rates)))
  return {claim: some for claim, some in found.items() if len(some) >= 2}


def with_their_start(by_steps: Mapping[int, Any], scale: str) -> dict[arms.Claim, list[Point]]:
  """Arms that start from another run against baselines trained for as many tokens altogether.

  The start was trained for as many steps as the arm, so that the baseline has twice its steps.

  Args:
    by_steps: of `read`.
    scale: of all runs.
  """
  from experiments.routing_ablation import matching, measure, report
  from moe_jax.analysis import paired

  found: dict[arms.Claim, list[Point]] = {}
  for claim in (claim for claim in arms.CLAIMS if arms.ARMS[claim.arm].start):
    for steps, results in by_steps.items():
      longer = by_steps.get(2 * steps, {})
      if claim.arm not in results or claim.baseline not in longer:
        continue
      both = {claim.arm: results[claim.arm], claim.baseline: longer[claim.baseline]}
      pair = measure.against(both, claim.arm, claim.baseline, claim.figure)
      if pair is None:
        continue
      start = arms.ARMS[claim.arm].start
      asked = f'nothing of this; both have as many tokens here, those of `{start}` counted in full'
      counted = dataclasses.replace(claim, direction='equal', paper=asked, matched=())
      base = sum(pair[1]) / len(pair[1])
      difference = paired.difference(*pair)
      verdict = paired.verdict(difference, 'equal', arms.EQUAL_MARGIN * base)
      graded = report.Graded(counted, difference, verdict, base, 1.0)
      tokens = matching.tokens(arms.resolve(arms.ARMS[claim.arm], scale, steps))
      rates = tuple(_rate(runs) for runs in both.values())
      found.setdefault(counted, []).append(Point(tokens, graded, rates))
  return found


def _rate(runs: Mapping[int, Mapping[str, Any]]) -> float:
  return next(iter(runs.values()))['peak_lr']


def blocks(found: Mapping[arms.Claim, Sequence[Point]], drawn: Sequence[Any]) -> list[Any]:
  """The page: the pictures, then a table per claim."""
  from experiments.common import html_report
  from experiments.routing_ablation import length_pictures
  from moe_jax.analysis import difference_curves

  made = [
    html_report.Heading('Claims against the length of training', 1),
    html_report.Text(
      'Every point is the end of whole runs, each with the learning-rate schedule of its length; '
      'differences are paired by seed, with 95 % intervals. A crossover lies on the line between '
      'two lengths, over the logarithm of the tokens; its interval reaches from the last length '
      'whose interval is on the old side of zero to the first whose interval is on the new one. '
      'The last column corrects the verdict for the number of claims at its length (Holm).'
    ),
    *drawn,
  ]
  for claim, some in found.items():
    what, digits = arms.FIGURES[claim.figure]
    against = f' against `{claim.baseline}`' if claim.baseline else ''
    made += [
      html_report.Heading(f'`{claim.arm}`{against}: {what}'),
      html_report.Text(f'The paper: {claim.paper}. {length_pictures.over_lengths(some)}.'),
      html_report.Table(
        ['tokens', 'difference', 'seeds', 'peak rates', 'verdict', 'all claims together'],
        [
          [
            difference_curves.millions(point.tokens),
            point.graded.difference.text(digits),
            str(point.graded.difference.num_seeds),
            ', '.join(f'{rate:g}' for rate in point.rates),
            point.graded.plain,
            point.graded.holm or '-',
          ]
          for point in some
        ],
      ),
    ]
  return made


if __name__ == '__main__':
  cli.run(main, define_flags)
