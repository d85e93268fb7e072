"""What the runs of two groups say: paired differences of held-out figures, and of the loss.

A difference is called lower or higher only between pairs of runs that saw the same batches, with
schedules of one length.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from moe_jax.analysis import difference_curves, paired
from moe_jax.analysis.comparison import curves, fairness
from moe_jax.analysis.comparison import groups as groups_lib
from moe_jax.training import optim

LOWER, HIGHER = 'lower', 'higher'
NOT_COMPARABLE = 'not comparable'
BITS = 'bits_per_byte'
NEAR = 0.1  # share of a figure's tokens; a curve that ends further away says nothing of the figure
FIGURES = {  # held-out figure -> (what it is, digits); lower is better in all of them
  BITS: ('held-out bits per byte', 4),
  'max_vio': ('MaxVio over the held-out text', 2),
}
_WORDS = {paired.CONFIRMED: LOWER, paired.CONTRADICTED: HIGHER}


class Claim(NamedTuple):
  """One figure of an arm against its baseline."""

  arm: str
  baseline: str
  figure: str
  seeds: list[int]
  reasons: list[str]  # why nothing can be said; then there is no difference
  difference: paired.Interval | None
  verdict: str  # lower, higher, or of `paired` and `difference_curves`
  plain: str  # of this figure at this length alone
  holm: str  # when all claims against the baseline are read together
  p_value: float
  ends_curve: bool = False  # whether the figure is of where `curve_of` the two ends


def held_out(group: groups_lib.Group, figure: str) -> dict[int, float]:
  """A held-out figure of a group by seed, of the runs that have it."""
  values = {seed: run.held_out.get(figure) for seed, run in group.runs.items()}
  return {seed: float(value) for seed, value in values.items() if value is not None}


def interval(group: groups_lib.Group, figure: str) -> paired.Interval | None:
  """Mean and interval of a held-out figure over the seeds; None if no run has it."""
  values = list(held_out(group, figure).values())
  return paired.interval(values) if values else None


def against(baseline: groups_lib.Group, groups: Sequence[groups_lib.Group]) -> list[Claim]:
  """Every held-out figure of every other group against the baseline.

  Args:
    baseline: one of the groups.
    groups: all of them.
  """
  found = []
  for arm in groups:
    if arm.name == baseline.name:
      continue
    reasons = fairness.reasons(arm, baseline)
    curve = None if reasons else curve_of(arm, baseline)
    for figure in FIGURES:
      claim = _claim(arm, baseline, figure, reasons, curve)
      if claim is not None:
        found.append(claim)
  decided = [claim for claim in found if claim.difference is not None]
  holm = paired.corrected([one.plain for one in decided], [one.p_value for one in decided])
  corrected = iter(holm)
  return [c if c.difference is None else c._replace(holm=next(corrected)) for c in found]


def at_end(claims: Sequence[Claim]) -> dict[str, str]:
  """{arm: verdict} on held-out bits per byte, of the arms whose curves end where it is of."""
  return {c.arm: c.verdict for c in claims if c.figure == BITS and c.ends_curve}


def graded(arm: groups_lib.Group, baseline: groups_lib.Group, figure: str = BITS) -> list[int]:
  """The seeds of which both groups have a held-out figure."""
  return [seed for seed in held_out(arm, figure) if seed in held_out(baseline, figure)]


def curve_of(arm: groups_lib.Group, baseline: groups_lib.Group) -> difference_curves.Curve | None:
  """The paired difference of the training loss, of the seeds that are graded; see `curves`.

  Pairs without a logged step are left out. Where nothing is graded, it is that of `curves.seeds`.
  """
  logged = [
    seed for seed in graded(arm, baseline) if arm.runs[seed].metrics and baseline.runs[seed].metrics
  ]
  return curves.difference(arm, baseline, logged or curves.seeds(arm, baseline))


def _claim(
  arm: groups_lib.Group,
  baseline: groups_lib.Group,
  figure: str,
  reasons: list[str],
  curve: difference_curves.Curve | None,
) -> Claim | None:
  """None where one of the groups has no such figure, as a dense model has no balance."""
  values, base = held_out(arm, figure), held_out(baseline, figure)
  if not values or not base:
    return None
  seeds = graded(arm, baseline, figure)
  steps = {g.runs[seed].held_out['step'] for g in (arm, baseline) for seed in seeds}
  if not reasons and not seeds:
    reasons = ['no seed that both have was evaluated']
  if not reasons and len(steps) > 1:
    shown = ', '.join(map(str, sorted(steps)))
    reasons = [f'they were evaluated after different numbers of steps ({shown})']
  if not reasons:
    reasons = _not_finite(figure, arm, baseline, seeds)
  if reasons:
    none = NOT_COMPARABLE
    return Claim(arm.name, baseline.name, figure, seeds, reasons, None, none, none, none, 1.0)
  differences = [values[seed] - base[seed] for seed in seeds]
  found = paired.interval(differences)
  plain = in_words(paired.verdict(found, 'lower'))
  ends_curve = _ends(curve, arm, steps.pop())
  moves = figure == BITS and ends_curve and _moves(found, curve, arm, baseline, seeds)
  verdict = difference_curves.NOT_YET if moves else plain
  p_value = paired.p_value(differences, 'lower')
  names = (arm.name, baseline.name, figure)
  return Claim(*names, seeds, [], found, verdict, plain, plain, p_value, ends_curve)


def _ends(curve: difference_curves.Curve | None, arm: groups_lib.Group, step: int) -> bool:
  """Whether a curve ends about where a figure was taken, after that step."""
  (tokens,) = optim.tokens_at(arm.cfg.train, arm.cfg.model.max_seq_len, [step])
  return curve is not None and abs(curve.end - tokens) <= NEAR * tokens


def _not_finite(
  figure: str, arm: groups_lib.Group, baseline: groups_lib.Group, seeds: Sequence[int]
) -> list[str]:
  """The runs whose figure is infinite or NaN, as that of one that diverged is."""
  found = []
  for group in (arm, baseline):
    values = held_out(group, figure)
    wrong = ', '.join(str(seed) for seed in seeds if not math.isfinite(values[seed]))
    if wrong:
      found.append(f'it is not finite in `{group.name}` with seed {wrong}')
  return found


def _moves(
  found: paired.Interval,
  curve: difference_curves.Curve | None,
  arm: groups_lib.Group,
  baseline: groups_lib.Group,
  seeds: Sequence[int],
) -> bool:
  """Whether bits per byte wait for longer runs, by the slope of the training loss."""
  if curve is None or len(curve.tokens) < difference_curves.MIN_POINTS:
    return False
  if not difference_curves.same_rates(arm.cfg.optim, baseline.cfg.optim):
    return False
  bits, nats = (held_out(baseline, key) for key in (BITS, 'loss'))
  if not all(seed in nats for seed in seeds):
    return False
  ratio = sum(bits[seed] for seed in seeds) / sum(nats[seed] for seed in seeds)
  slope = difference_curves.outcome(curve, 'lower').slope
  return difference_curves.still_moves(found, difference_curves.scaled(slope, ratio), 'lower')


def in_words(verdict: str) -> str:
  """'lower' or 'higher' of a verdict on the claim that the arm is lower."""
  return _WORDS.get(verdict, verdict)


def sentence(claim: Claim) -> str:
  """A claim for people."""
  what, digits = FIGURES[claim.figure]
  pair = f'`{claim.arm}` against `{claim.baseline}`, {what}'
  if claim.difference is None:
    return no_difference(pair, claim.reasons)
  notes = [f'at this length {claim.plain}'] if claim.verdict == difference_curves.NOT_YET else []
  if claim.holm != claim.plain:
    notes.append(f'{claim.holm} when all claims are read together')
  if claim.difference.num_seeds == 1:
    notes.append('one seed has no interval: train others with --config.train.seed=N')
  note = f' ({"; ".join(notes)})' if notes else ''
  seeds = len(claim.seeds)
  counted = f', {seeds} pairs' if seeds > 1 else ''
  return f'**{claim.verdict.capitalize()}**{note}: {pair}: {claim.difference.text(digits)}{counted}'


def no_difference(pair: str, reasons: Sequence[str]) -> str:
  """What is said in place of a difference."""
  return (
    f'**{NOT_COMPARABLE.capitalize()}**: {pair}: {"; ".join(reasons)}. No difference between them '
    'is called real'
  )
