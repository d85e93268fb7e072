"""Any runs beside each other: what `moe_jax.compare` and `experiments.compare` return and print."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterable, Sequence

from moe_jax import errors
from moe_jax.analysis import difference_curves, paired
from moe_jax.analysis.comparison import curves, fairness, verdicts, workdirs
from moe_jax.analysis.comparison import groups as groups_lib

COST_NOTE = (
  'Loss against tokens says what a design learns of a text; against FLOPs and seconds, what it '
  'costs. Seconds are those of the training steps, from the logged tokens per second, on the '
  'machine of each run.'
)


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Runs as groups, and what they say of each other.

  Attributes:
    groups: runs that differ in nothing but their seed, in the order in which they were named.
    baseline: name of the group that the others are held against.
  """

  groups: list[groups_lib.Group]
  baseline: str

  @functools.cached_property
  def settings(self) -> dict[str, list[str]]:
    """In what the configs differ: {key: value of each group}."""
    return groups_lib.settings(self.groups)

  @functools.cached_property
  def budgets(self) -> list[dict[str, float]]:
    """{quantity: value} of each group: parameters, FLOPs, bytes."""
    return fairness.budgets(self.groups)

  @functools.cached_property
  def series(self) -> dict[str, curves.Series | None]:
    """What was logged over training, by the name of the group."""
    return {one.name: curves.series(one) for one in self.groups}

  @functools.cached_property
  def routing(self) -> dict[str, tuple[curves.Balance, curves.Load] | None]:
    """Balance and loads over training, by the name of the group."""
    return {one.name: curves.routing(one) for one in self.groups}

  def budget_rows(self) -> list[list[str]]:
    """The budgets as text, a row per quantity: values, and their differences from the baseline."""
    reference = self.groups.index(self.group(self.baseline))
    return fairness.budget_rows(self.budgets, reference)

  def group(self, name: str) -> groups_lib.Group:
    """The group of that name."""
    return next(one for one in self.groups if one.name == name)

  def claims(self, baseline: str = '') -> list[verdicts.Claim]:
    """Every other group's held-out figures against those of a group, '' being `baseline`."""
    return verdicts.against(self.group(baseline or self.baseline), self.groups)

  def curve(self, arm: str, baseline: str = '') -> difference_curves.Curve | None:
    """The paired difference of the training loss of two groups; None where they are no pairs."""
    first, second = self.group(arm), self.group(baseline or self.baseline)
    if fairness.reasons(first, second):
      return None
    return verdicts.curve_of(first, second)

  def curve_reasons(self, arm: str, baseline: str = '') -> list[str]:
    """Why there is no `curve` of two groups."""
    reasons = fairness.reasons(self.group(arm), self.group(baseline or self.baseline))
    return reasons or ['no step was logged with a finite loss in every run of both']

  def curve_verdict(self, arm: str, baseline: str = '') -> str:
    """What the `curve` of two groups says alone, where nothing was evaluated at its end."""
    curve = self.curve(arm, baseline)
    if curve is None or len(curve.tokens) < difference_curves.MIN_POINTS:
      return paired.UNDECIDED
    found = difference_curves.outcome(curve, 'lower')
    first, second = self.group(arm), self.group(baseline or self.baseline)
    if difference_curves.same_rates(first.cfg.optim, second.cfg.optim):
      return verdicts.in_words(found.verdict)
    return verdicts.in_words(paired.verdict(found.end, 'lower'))

  def curve_sentences(self) -> list[str]:
    """For each other group, how its loss moves against the baseline's, in words."""
    claims = self.claims()
    at_end, said = verdicts.at_end(claims), {c.arm for c in claims if c.figure == verdicts.BITS}
    lines = []
    for one in self.groups:
      pair = f'`{one.name}` against `{self.baseline}`, training loss'
      curve = self.curve(one.name) if one.name != self.baseline else None
      if curve is not None:
        verdict = at_end.get(one.name) or self.curve_verdict(one.name)
        lines.append(f'{pair}: {difference_curves.sentence(curve, verdict)}')
      elif one.name != self.baseline and one.name not in said:
        lines.append(verdicts.no_difference(pair, self.curve_reasons(one.name)))
    return lines

  def remarks(self) -> list[str]:
    """What a reader has to know before believing anything: unfinished runs, costs that differ."""
    lines = []
    for one in self.groups:
      runs, of = list(one.runs.values()), one.cfg.train.num_steps
      behind = [run.step for run in runs if not run.is_finished]
      if behind:
        lines.append(f'{one.name}: {len(behind)} of {len(runs)} runs at step {min(behind)} of {of}')
      elif not all(run.held_out for run in runs):
        lines.append(f'{one.name}: runs without evaluation.json, and so without held-out figures')
      if left_out := curves.left_out(one):
        lines.append(f'{one.name}: its curves leave out {left_out}')
      series = self.series[one.name]
      if series is not None and (counted := curves.not_finite(series)):
        lines.append(f'{one.name}: curves leave out logged steps without a finite loss, {counted}')
      steps = sorted({run.upcycled['step'] for run in runs if run.upcycled})
      if steps:
        lines.append(
          f'{one.name}: upcycled from a dense run of {steps[0]} steps, which no budget counts'
        )
    unequal = fairness.unmatched(self.budgets)
    if unequal:
      lines.append(f'not matched to 0.5 %: {", ".join(unequal)}')
    few = [one.name for one in self.groups if len(one.runs) == 1]
    if few and len(self.groups) > 1:
      lines.append(f'one seed proves nothing: {", ".join(few)}')
    return lines

  def __str__(self) -> str:
    """The comparison as plain text."""
    names = [one.name for one in self.groups]
    lines = [
      f'{one.name}: {len(one.runs)} run(s), seeds {_listed(one.runs)}' for one in self.groups
    ]
    if self.settings:
      lines += ['', *_aligned([['', *names], *([k, *v] for k, v in self.settings.items())])]
    lines += ['', *_aligned([['', *names], *self.budget_rows()]), '']
    lines += [_plain(verdicts.sentence(claim)) for claim in self.claims()]
    lines += [_plain(line) for line in [*self.curve_sentences(), *self.remarks()]]
    return '\n'.join(lines)


def _plain(text: str) -> str:
  return text.replace('**', '').replace('`', '')


def _listed(values: Iterable[int]) -> str:
  return ', '.join(map(str, values))


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
  widths = [max(map(len, column)) for column in zip(*rows)]
  return ['  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def compare(directories: Sequence[str | os.PathLike[str]], baseline: str = '') -> Comparison:
  """Reads runs and groups them by what differs in their configs.

  Args:
    directories: workdirs, or directories that hold some.
    baseline: name of the group, or a directory of it, that the others are held against; '' is the
      first group.

  Raises:
    errors.InputError: a directory holds no run, two runs are the same, or no group is the baseline.
  """
  errors.require(bool(directories), 'no workdir is given; name at least one, or a folder of them')
  groups = groups_lib.group([workdirs.read(path) for path in workdirs.find(directories)])
  return Comparison(groups, _baseline(groups, baseline))


def _baseline(groups: Sequence[groups_lib.Group], baseline: str) -> str:
  names = [one.name for one in groups]
  if not baseline or baseline in names:
    return baseline or names[0]
  given = pathlib.Path(baseline).absolute()
  for one in groups:
    for run in one.runs.values():
      if given in (run.path.absolute(), *run.path.absolute().parents):
        return one.name
  raise errors.InputError(
    f'baseline={baseline!r} is none of the groups {", ".join(names)}'
    f'{errors.did_you_mean(baseline, names)}'
  )
