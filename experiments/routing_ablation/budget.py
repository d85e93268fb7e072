"""Which claims can be decided in so many hours, and how many seeds of which arms that takes."""

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from experiments.routing_ablation import arms, measure
from moe_jax.analysis import paired
from moe_jax.config import schema
from moe_jax.planning import describe

MOST_SEEDS = 100  # more are no plan, but a question that wants another size


class Part(NamedTuple):
  """What one claim asks for."""

  claim: arms.Claim
  have: int  # pairs of runs that are there
  need: int | None  # seeds that decide it; None: no number up to `MOST_SEEDS` does
  first_look: bool  # there are too few pairs to say how many decide it
  seconds: float  # of runs that are missing, beside those of claims before it
  chosen: bool


class Plan(NamedTuple):
  """What is trained within the budget."""

  parts: Sequence[Part]
  seeds: Mapping[str, int]  # by arm: 0, 1, ..., so many
  seconds: float


def seconds_per_run(
  configs: Mapping[str, schema.Config], results: measure.Results
) -> dict[str, float]:
  """How long a run of each arm takes: its mean, or that of the others by its training FLOPs.

  Without any run that says so, a core's 5e9 FLOPs a second, about that of `tiny` on a CPU.
  """
  flops = {
    name: describe.describe(cfg, name).train_flops_per_token
    * cfg.train.num_steps
    * cfg.train.batch_size
    * cfg.model.max_seq_len
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
) -> Plan:
  """Claims in their order, each if what it still needs fits into what is left of the time.

  Args:
    asked: arms that may be trained.
    results: of the runs that are there.
    seconds: of a run, by arm.
    available: seconds of all processes together.
    first: seeds of a first look, at least two; a claim with fewer pairs than these and than three,
      which say how many it needs, asks for them first.
  """
  have = {name: len(results.get(name, {})) for name in asked}
  seeds, left, parts = dict(have), available, []
  for claim in arms.CLAIMS:
    names = [name for name in (claim.arm, claim.baseline) if name]
    if not set(names) <= set(asked):
      continue
    pairs, need, first_look = _need(claim, results, first)
    if need is None:
      parts.append(Part(claim, pairs, None, first_look, 0.0, False))
      continue
    # Runs are made from seed 0 on, so the n-th pair needs n runs of each.
    cost = sum(max(0, need - seeds[name]) * seconds[name] for name in names)
    chosen = cost <= left
    if chosen:
      seeds |= {name: max(need, seeds[name]) for name in names}
      left -= cost
    parts.append(Part(claim, pairs, need, first_look, cost, chosen))
  return Plan(parts, seeds, available - left)


def _need(claim: arms.Claim, results: measure.Results, first: int) -> tuple[int, int | None, bool]:
  """(pairs that are there, seeds that are needed, whether these are a first look)."""
  found = measure.against(results, claim.arm, claim.baseline, claim.figure) or ([], [])
  differences = [a - b for a, b in zip(*found)]
  first = max(first, 2)  # a single pair says nothing of the spread
  if len(differences) < min(first, 3):
    return len(differences), first, True
  margin = arms.EQUAL_MARGIN * statistics.fmean(found[1]) if claim.direction == 'equal' else None
  verdict = paired.verdict(paired.interval(differences), claim.direction, margin or 0.0)
  if verdict != paired.UNDECIDED:
    return len(differences), len(differences), False
  need = paired.seeds_that_decide(differences, margin)
  if need is None or need > MOST_SEEDS:
    return len(differences), None, False
  return len(differences), max(need, len(differences)), False


def lines(found: Plan, hours: float, jobs: int) -> list[str]:
  """The plan for people."""
  said = [f'--budget_hours={hours:g} with --jobs={jobs}: {found.seconds / 3600:.1f} process hours']
  return said + [f'  {_line(part)}' for part in found.parts]


def _line(part: Part) -> str:
  claim = part.claim
  name = f'{claim.arm} against {claim.baseline or "zero"}, {claim.figure}'
  if part.need is None:
    return f'left out: {name}: no {MOST_SEEDS} seeds decide it by the {part.have} that are there'
  if not part.first_look and part.need == part.have:
    return f'decided:  {name}: by {part.have} seeds'
  what = 'a first look' if part.first_look else 'to decide it with a power of 80 %'
  verb = 'train:   ' if part.chosen else 'left out:'
  return (
    f'{verb} {name}: {part.have} -> {part.need} seeds, {what}, {part.seconds / 3600:.1f} hours more'
  )
