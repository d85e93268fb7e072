"""Which claims and sweeps can be decided in so many hours, and which seeds of which arms they take.

A plan is over seed numbers. Runs that are there count as they are; of those that are not, the
cheapest pairs come first: a seed that one arm has already before one that both lack, and the lowest
numbers among equals.
"""

import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from experiments.routing_ablation import arms, matching, measure
from moe_jax.analysis import paired
from moe_jax.config import schema
from moe_jax.planning import describe

MOST_SEEDS = 100  # more are no plan, but a question that wants another size


class Part(NamedTuple):
  """What one claim or sweep asks for."""

  claim: arms.Claim | arms.Sweep
  names: Sequence[str]  # its arms
  have: int  # seeds for which all of them have a run
  need: int | None  # seeds that decide it; None: no number up to `MOST_SEEDS` does
  first_look: bool  # there are too few to say how many decide it
  seconds: float  # of runs that are missing, beside those of claims before it
  chosen: bool
  why_not: str = ''  # such runs cannot be trained by this call; '' = they can


class Rest(NamedTuple):
  """An arm that no part asks for."""

  arm: str
  why: str
  more: int  # seeds that it lacks of those of a first look
  seconds: float  # of these


class Plan(NamedTuple):
  """What is trained within the budget."""

  parts: Sequence[Part]
  rest: Sequence[Rest]
  seeds: Mapping[str, Sequence[int]]  # by arm, with those that are there
  seconds: float


def seconds_per_run(
  configs: Mapping[str, schema.Config], results: measure.Results
) -> dict[str, float]:
  """How long a run of each arm takes: its mean, or that of the others by its training FLOPs.

  Without any run that says so, a core's 5e9 FLOPs a second, about that of `tiny` on a CPU.
  """
  flops = {
    name: describe.describe(cfg, name).train_flops_per_token * matching.tokens(cfg)
    for name, cfg in configs.items()
  }
  known = {
    name: statistics.fmean(found)
    for name in configs
    if (found := [r['seconds'] for r in results.get(name, {}).values() if r['seconds']])
  }
  per_flop = statistics.fmean(known[n] / flops[n] for n in known) if known else 1 / 5e9
  return {name: known.get(name, flops[name] * per_flop) for name in configs}


def plan(
  asked: Sequence[str],
  results: measure.Results,
  seconds: Mapping[str, float],
  available: float,
  first: int,
  elsewhere: Mapping[str, Collection[int]] | None = None,
) -> Plan:
  """Claims in their order and then sweeps, each if what it still needs fits into what is left.

  Args:
    asked: arms that may be trained.
    results: of the runs that are there.
    seconds: of a run, by arm.
    available: seconds of all processes together.
    first: seeds of a first look, at least two; a claim with fewer pairs than these and than three,
      which say how many it needs, asks for them first.
    elsewhere: seeds, by arm, whose figures are among `results` and whose checkpoints are not here:
      no arm starts from these (`arms.Arm.start`).
  """
  first = max(first, 2)  # a single pair says nothing of the spread
  runs = _Runs(asked, results, seconds, elsewhere or {})
  left, parts = available, []
  for claim in (*arms.CLAIMS, *arms.SWEEPS):
    names = _names(claim, asked, results)
    if not names:
      continue
    have, need, first_look = _need(claim, names, results, first)
    if need is None:
      parts.append(Part(claim, names, have, None, first_look, 0.0, False))
      continue
    missing = runs.missing(names, need)
    if missing is None:
      why = _why_not(names, asked, results)
      parts.append(Part(claim, names, have, need, first_look, 0.0, False, why))
      continue
    cost = sum(seconds[name] for name, _ in missing)
    chosen = cost <= left
    if chosen:
      runs.add(missing)
      left -= cost
    parts.append(Part(claim, names, have, need, first_look, cost, chosen))
  rest = _rest(asked, parts, results, seconds, first)
  return Plan(parts, rest, {name: sorted(runs.seeds[name]) for name in asked}, available - left)


class _Runs:
  """The runs that are there or planned, and which ones are cheapest to add."""

  def __init__(
    self,
    asked: Sequence[str],
    results: measure.Results,
    seconds: Mapping[str, float],
    elsewhere: Mapping[str, Collection[int]],
  ):
    self.seeds = {name: set(results.get(name, {})) for name in {*asked, *results}}
    self._asked, self._seconds, self._elsewhere = set(asked), seconds, elsewhere

  def add(self, runs: Collection[tuple[str, int]]):
    """Plans runs, by arm and seed."""
    for name, seed in runs:
      self.seeds[name].add(seed)

  def missing(self, names: Sequence[str], need: int) -> list[tuple[str, int]] | None:
    """The cheapest runs, by arm and seed, with which all of these arms have `need` seeds.

    Those that arms start from are among them. None: this call cannot train so many.
    """
    more = need - len(set.intersection(*(self.seeds[name] for name in names)))
    if more <= 0:
      return []
    options = []
    for seed in {*range(2 * MOST_SEEDS), *(s for name in names for s in self.seeds[name])}:
      lacking = self._lacking(names, seed)
      if lacking:  # neither [], which is there, nor None
        options.append((sum(self._seconds[name] for name in lacking), seed, lacking))
    chosen = sorted(options)[:more]
    if len(chosen) < more:
      return None
    return [(name, seed) for _, seed, lacking in chosen for name in lacking]

  def _lacking(self, names: Sequence[str], seed: int) -> list[str] | None:
    """Which arms are to be trained with a seed; None: they cannot."""
    lacking = [name for name in names if seed not in self.seeds[name]]
    starts = [start for name in lacking if (start := arms.ARMS[name].start)]
    if any(seed in self._elsewhere.get(start, ()) for start in starts):
      return None
    lacking += [start for start in starts if seed not in self.seeds.get(start, ())]
    return list(dict.fromkeys(lacking)) if self._asked >= set(lacking) else None


def _names(
  claim: arms.Claim | arms.Sweep, asked: Sequence[str], results: measure.Results
) -> list[str]:
  """The arms that decide a claim or sweep; [] if this call can do nothing for it."""
  points = claim.points if isinstance(claim, arms.Sweep) else (claim.arm, claim.baseline)
  there = [name for name in points if name in asked or results.get(name)]
  wanted = (
    measure.LEAST_POINTS if isinstance(claim, arms.Sweep) else len(list(filter(None, points)))
  )
  return there if len(there) >= wanted and set(there) & set(asked) else []


def _why_not(names: Sequence[str], asked: Sequence[str], results: measure.Results) -> str:
  """Why this call cannot train what arms lack."""
  reasons = [
    f'{name} is not among --arms and has {len(results.get(name, {}))}'
    for name in names
    if name not in asked
  ]
  for name in names:
    start = arms.ARMS[name].start
    if start and start not in asked:
      reasons.append(f'{name} starts from runs of {start}, which is not among --arms')
    elif start:
      reasons.append(f'{name} starts from runs of {start}, whose checkpoints are not here')
  return '; '.join(reasons)


def _rest(
  asked: Sequence[str],
  parts: Sequence[Part],
  results: measure.Results,
  seconds: Mapping[str, float],
  first: int,
) -> list[Rest]:
  """The arms that no part asks for."""
  names = {name for part in parts for name in part.names}
  names |= {arms.ARMS[name].start for name in names}
  found = []
  for name in asked:
    if name not in names:
      more = max(0, first - len(results.get(name, {})))
      found.append(Rest(name, _why_in_none(name), more, more * seconds[name]))
  return found


def _why_in_none(name: str) -> str:
  others = [
    other
    for claim in arms.CLAIMS
    if name in (claim.arm, claim.baseline)
    for other in (claim.arm, claim.baseline)
    if other and other != name
  ]
  reasons = [f'its claims need {" or ".join(dict.fromkeys(others))}'] if others else []
  reasons += [
    f'the sweep {sweep.name} needs {measure.LEAST_POINTS} of {", ".join(sweep.points)}'
    for sweep in arms.SWEEPS
    if name in sweep.points
  ]
  return '; '.join(reasons) or 'no claim or sweep has it'


def _need(
  claim: arms.Claim | arms.Sweep, names: Sequence[str], results: measure.Results, first: int
) -> tuple[int, int | None, bool]:
  """(seeds that are there, seeds that are needed, whether these are a first look)."""
  if isinstance(claim, arms.Sweep):
    differences, direction, margin = _slopes(claim, names, results), 'lower', None
  else:
    found = measure.against(results, claim.arm, claim.baseline, claim.figure) or ([], [])
    differences, direction = [a - b for a, b in zip(*found)], claim.direction
    equal = direction == 'equal' and found[1]
    margin = arms.EQUAL_MARGIN * statistics.fmean(found[1]) if equal else None
  if len(differences) < min(first, 3):
    return len(differences), first, True
  verdict = paired.verdict(paired.interval(differences), direction, margin or 0.0)
  if verdict != paired.UNDECIDED:
    return len(differences), len(differences), False
  need = paired.seeds_that_decide(differences, margin)
  if need is None or need > MOST_SEEDS:
    return len(differences), None, False
  return len(differences), max(need, len(differences)), False


def _slopes(sweep: arms.Sweep, names: Sequence[str], results: measure.Results) -> list[float]:
  """The slope of a sweep by seed, over those that all its arms have."""
  if not all(results.get(name) for name in names):
    return []
  found = measure.along(results, sweep)
  return [] if found is None else np.polyfit(*found, 1)[0].tolist()


def lines(found: Plan, hours: float, jobs: int) -> list[str]:
  """The plan for people."""
  said = [f'--budget_hours={hours:g} with --jobs={jobs}: {found.seconds / 3600:.1f} process hours']
  said += [f'  {_line(part)}' for part in found.parts]
  for arm, why, more, seconds in found.rest:
    cost = f'; without --budget_hours {more} seeds take {seconds / 3600:.1f} hours' if more else ''
    said.append(f'  left out: {arm}: {why}{cost}')
  return said


def _line(part: Part) -> str:
  claim = part.claim
  if isinstance(claim, arms.Sweep):
    name = f'{claim.name}, slope through {", ".join(part.names)}'
  else:
    name = f'{claim.arm} against {claim.baseline or "zero"}, {claim.figure}'
  if part.need is None:
    return f'left out: {name}: no {MOST_SEEDS} seeds decide it by the {part.have} that are there'
  if part.why_not:
    return f'left out: {name}: {part.have} -> {part.need} seeds: {part.why_not}'
  if not part.first_look and part.need == part.have:
    return f'decided:  {name}: by {part.have} seeds'
  what = 'a first look' if part.first_look else 'to decide it with a power of 80 %'
  verb = 'train:   ' if part.chosen else 'left out:'
  return (
    f'{verb} {name}: {part.have} -> {part.need} seeds, {what}, {part.seconds / 3600:.1f} hours more'
  )
