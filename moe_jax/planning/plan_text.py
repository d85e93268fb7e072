"""A plan in words, for people."""

from collections.abc import Sequence

from moe_jax.planning import planner

GIB = 2**30


def table(plan: planner.Plan) -> str:
  """Memory by name, times by resource, bytes by mesh axis."""
  return '\n'.join([*_head(plan), '', *_memory(plan), '', *_time(plan), '', *_traffic(plan)])


def _head(plan: planner.Plan) -> list[str]:
  mesh = ', '.join(f'{name}={size}' for name, size in plan.mesh.items()) or 'one device'
  lines = [
    f'{plan.topology}: {mesh}; remat {plan.remat}, {plan.micro_batch_size} rows at a time',
    f'{plan.how}',
  ]
  if plan.how == planner.COMPILED:
    lines[1] += (
      f' in {plan.compile_seconds:.0f} s with {plan.host_memory_bytes / GIB:.1f} GiB of this '
      "host's memory"
    )
  return [*lines, *(f'note: {note}' for note in plan.notes)]


def _memory(plan: planner.Plan) -> list[str]:
  rows = [(name, f'{size / GIB:9.2f} GiB') for name, size in plan.breakdown.items() if size]
  rows += [
    ('needed', f'{plan.hbm_bytes / GIB:9.2f} GiB'),
    ('HBM that a program may use', f'{plan.hbm_capacity_bytes / GIB:9.2f} GiB'),
  ]
  margin = plan.hbm_capacity_bytes - plan.hbm_bytes
  verdict = (
    f'fits, {margin / GIB:.2f} GiB are left'
    if plan.fits
    else (f'DOES NOT FIT, {-margin / GIB:.2f} GiB too much')
  )
  if plan.exchange_bytes:
    rows.append(('exchange buffers, at their most', f'{plan.exchange_bytes / GIB:9.2f} GiB'))
  return ['MEMORY per device', *aligned(rows), verdict]


def _time(plan: planner.Plan) -> list[str]:
  rows = [(name, f'{seconds:10.3f} s') for name, seconds in plan.seconds.items() if seconds] + [
    (f'  along {axes}', f'{s:10.3f} s') for axes, s in plan.seconds_by_axes.items() if s
  ]
  return [
    'TIME per step, each resource alone at its peak',
    *aligned(rows),
    f'at least {plan.step_seconds_bound:.3f} s, bound by {plan.bound_by}: at most '
    f'{plan.tokens_per_second_bound:,.0f} tokens/s and {100 * plan.mfu_bound:.1f} % MFU',
  ]


def _traffic(plan: planner.Plan) -> list[str]:
  rows = [
    ("FLOPs of the model (as 'describe' counts)", f'{plan.flops_per_device / 1e12:12,.2f} T'),
    ('FLOPs computed, on the busiest device', f'{plan.computed_flops_per_device / 1e12:12,.2f} T'),
    ('bytes through HBM', f'{plan.traffic_bytes / 1e9:12,.2f} GB'),
  ]
  for axes, kinds in plan.collective_bytes.items():
    for kind, size in kinds.items():
      rows.append((f'{kind} along {axes}', f'{size / 1e9:12,.2f} GB'))
  return ['WORK per device and step', *aligned(rows)]


def aligned(rows: Sequence[tuple[str, str]]) -> list[str]:
  """Lines with a label and its value."""
  width = max(len(label) for label, _ in rows)
  return [f'  {label.ljust(width)}  {value}' for label, value in rows]


def ranking(plans: Sequence[planner.Plan]) -> str:
  """One line per plan."""
  lines = ['        GiB    left   bound s  MFU at most  by       mesh; remat, rows at a time']
  for number, plan in enumerate(plans, 1):
    mesh = ','.join(f'{name}={size}' for name, size in plan.mesh.items())
    lines.append(
      f'{number:>3}  {plan.hbm_bytes / GIB:>6.1f}  '
      f'{(plan.hbm_capacity_bytes - plan.hbm_bytes) / GIB:>6.1f}  {plan.step_seconds_bound:>8.2f}  '
      f'{100 * plan.mfu_bound:>9.1f} %  {plan.bound_by:<7}  {mesh}; {plan.remat}, '
      f'{plan.micro_batch_size}{"" if plan.how == planner.COMPILED else " (" + plan.how + ")"}'
    )
  return '\n'.join(lines)
