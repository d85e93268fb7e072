"""An outlook in words, for people."""

from moe_jax.planning import outlook, plan_text

_HOUR, _DAY = 3600, 86_400


def table(found: outlook.Outlook) -> str:
  """Cost, goodput and pipelines, as far as they were asked for."""
  lines = _cost(found)
  if found.goodput:
    lines += ['', *_goodput(found)]
  if found.pipelines:
    lines += ['', *_pipelines(found)]
  return '\n'.join(lines)


def _cost(found: outlook.Outlook) -> list[str]:
  cost = found.cost
  rows = [
    ('chip-hours per trillion tokens', f'{cost.chip_hours_per_trillion_tokens:14,.0f}'),
    ('chip-hours', f'{cost.chip_hours:14,.0f}'),
    ('days', f'{cost.seconds / _DAY:14,.1f}'),
  ]
  if cost.money is not None:
    rows.insert(1, ('money per trillion tokens', f'{cost.money_per_trillion_tokens:14,.0f}'))
    rows.append(('money', f'{cost.money:14,.0f}'))
  head = f'COST of {cost.tokens:.4g} tokens on {cost.num_chips} chips, '
  head += f'at {100 * cost.mfu:.1f} % MFU'
  if cost.goodput < 1:
    head += f' and {100 * cost.goodput:.1f} % goodput'
  return [head, *plan_text.aligned(rows)]


def _goodput(found: outlook.Outlook) -> list[str]:
  one = found.goodput
  assert one is not None
  rows = [
    ('a failure every', f'{one.mtbf_seconds / _HOUR:10.2f} h'),
    ("work between checkpoints, Young's", f'{one.young_seconds:10,.0f} s'),
    ("work between checkpoints, Daly's", f'{one.interval_seconds:10,.0f} s'),
    ('which are steps', f'{found.steps_between_checkpoints:10,d}'),
    ('lost to checkpoints', f'{100 * one.checkpoints:10.2f} %'),
    ('lost to failures', f'{100 * one.failures:10.2f} %'),
    ('goodput', f'{100 * one.goodput:10.2f} %'),
  ]
  return ['GOODPUT, saving as often as is best', *plan_text.aligned(rows)]


def _pipelines(found: outlook.Outlook) -> list[str]:
  plan, alone = found.step_seconds_bound, found.step_seconds_one_by_one
  lines = [
    f'PIPELINE of {found.pipelines[0].stages} stages (an estimate that favours it; only gpipe is '
    'built), against the plan above',
    '  schedule     bound s  of plan  one by one  of plan  bubble     GiB  of a stage',
    f'  {"none":<11} {plan:>8.2f}           {alone:>10.2f}',
  ]
  for one in found.pipelines:
    mesh = ','.join(f'{name}={size}' for name, size in one.mesh.items())
    bound, serial = one.step_seconds_bound, one.step_seconds_one_by_one
    lines.append(
      f'  {one.schedule:<11} {bound:>8.2f}  {bound / plan:>7.2f}  {serial:>10.2f}  '
      f'{serial / alone:>7.2f}  {100 * one.bubble_share:>4.1f} %  '
      f'{one.hbm_bytes / plan_text.GIB:>6.1f}  {mesh}; {one.remat}, '
      f'{one.micro_batches} x {one.micro_batch_size}'
      f'{f" in {one.passes} passes" if one.passes > 1 else ""}'
    )
  return lines
