"""A plan in round numbers, for the tests of what is made of plans."""

from moe_jax.planning import planner

PLAN = planner.Plan(
  topology='v5e:2x2',
  mesh={'data': 2, 'expert': 2},
  remat='full',
  micro_batch_size=4,
  how=planner.ESTIMATED,
  fits=True,
  hbm_bytes=3 * 2**30,
  hbm_capacity_bytes=4 * 2**30,
  breakdown={'parameters': 2 * 2**30, 'logits and loss': 2**30, 'batch': 0},
  exchange_bytes=2**29,
  flops_per_device=2.5e12,
  computed_flops_per_device=3e12,
  traffic_bytes=1.5e9,
  collective_bytes={'expert': {'all-to-all': 2e9}},
  seconds={'compute': 0.25, 'HBM': 0.0},
  seconds_by_axes={'expert': 0.125},
  step_seconds_bound=0.25,
  bound_by='compute',
  mfu_bound=0.625,
  tokens_per_second_bound=12345.6,
  compile_seconds=9.0,
  compile_cpu_seconds=9.0,
  host_memory_bytes=2**31,
  notes=('rows are few',),
)
