"""Will a run fit on a pod that is not here, and how fast could it be?

Run:  python -m experiments.plan --config=configs/deepseek_v2.py --topology=v5p:8x8x8
        --mesh=fsdp=64,expert=8 --config.train.batch_size=4096 --config.train.micro_batch_size=512
        [--decode --rows=4096] [--max_vio=1.0] [--estimate] [--search] [--json]
        [--tokens=8.1e12 --chip_hour_price=2.2 --mfu=0.4] [--pipeline=8]
        [--mtbf_hours=50000 --checkpoint_seconds=60 --restart_seconds=600]

TPU topologies (v5e:16x16, v5p:8x8x8, two slices of one: v5e:16x16*2) compile the real step, which
needs the extra `tpu` and no TPU; GPUs (h100:8, h200:64) are counted from shapes. The step has
train.batch_size rows, whatever fewer a ramp begins with. Cost, goodput and pipeline are estimates,
with --search of the best plan.
"""

import math
from collections.abc import Sequence
from typing import Any

from absl import flags

from experiments.common import cli, json_output
from moe_jax import errors
from moe_jax.config import parse
from moe_jax.planning import chips


def define_flags():
  """Defines the command's flags."""
  cli.config_flag()
  flags.DEFINE_string('topology', None, 'accelerators, CHIP:SHAPE, for example v5p:8x8x8 or h200:8')
  flags.DEFINE_string('mesh', '', 'sizes of mesh axes, axis=size,...; replaces config.mesh')
  flags.DEFINE_bool('decode', False, 'plan a step of decoding, not of training')
  flags.DEFINE_integer('rows', 0, 'with --decode: sequences at a time; 0 = one per device')
  flags.DEFINE_float('max_vio', None, 'the busiest device has 1 + this times the mean load')
  flags.DEFINE_bool('estimate', False, 'count from shapes also where a compiler could tell')
  flags.DEFINE_bool('search', False, 'try meshes, remat policies and micro-batches')
  flags.DEFINE_integer('best', 3, 'with --search: how many plans to show')
  flags.DEFINE_float('tokens', 1e12, 'tokens of the run, for its cost')
  flags.DEFINE_float('chip_hour_price', None, 'price of one chip for an hour, in any unit')
  flags.DEFINE_float('mfu', None, "what steps reach of a chip's peak; default: the plan's bound")
  flags.DEFINE_float('mtbf_hours', None, 'mean hours between failures of one chip, for the goodput')
  flags.DEFINE_float('checkpoint_seconds', 60, 'with --mtbf_hours: steps stand still so long')
  flags.DEFINE_float('restart_seconds', 600, 'with --mtbf_hours: from a failure to the next step')
  flags.DEFINE_integer('pipeline', 0, 'compare with so many pipeline stages (an estimate only)')
  flags.DEFINE_bool('json', False, 'print one JSON object (a list with --search) and nothing else')


def main(argv: Sequence[str]):
  """Prints the plan."""
  del argv
  import jax

  from moe_jax.planning import outlook_text, plan_text, planner, planner_search

  args = flags.FLAGS
  topology = chips.parse(cli.required('topology'))
  page = args.config
  if page is not None:
    page.train.batch_ramp = ()
    page.mesh.update(parse.mesh_values(args.mesh) if args.mesh else {})
  cfg = cli.resolve(page)
  _check_flags()
  # Shapes need no accelerator, and another process may be using it.
  jax.config.update('jax_platforms', 'cpu')
  request = planner.Request(cfg, topology, args.decode, args.rows, args.max_vio, args.estimate)
  if args.search:
    plans, tried = planner_search.search(request, args.best, progress=True)
    text = f'best of {tried} candidates\n{plan_text.ranking(plans)}'
  else:
    plans = [planner.plan(request, progress=True)]
    text = plan_text.table(plans[0])
  further = _outlook(request, plans[0])
  if args.json:
    values = [plan.to_json() for plan in plans]
    values[0]['outlook'] = further.to_json()
    json_output.show(values if args.search else values[0], indent=2)
    return
  print(text, '', outlook_text.table(further), sep='\n')
  if not plans[0].fits:
    ways = planner_search.suggestions(request, plans[0])
    print('would fit:', *(ways or ['nothing that was tried']), sep='\n  ')


def _check_flags():
  args = flags.FLAGS
  errors.require(
    args.max_vio is None or (args.max_vio >= 0 and math.isfinite(args.max_vio)),
    f'--max_vio={args.max_vio} must be a number and not negative: it is how far the largest load '
    'exceeds the mean, as a share of the mean',
  )
  errors.require(
    not (args.decode and args.search), '--search looks for train steps; leave out --decode'
  )
  errors.require(
    args.rows >= 0, f'--rows={args.rows} must be a number of sequences, or 0 for one per device'
  )
  errors.require(args.best > 0, f'--best={args.best} must be at least 1, the plan that is shown')
  errors.require(
    args.pipeline >= 0, f'--pipeline={args.pipeline} must be a number of stages, or 0 for none'
  )
  for names, needed in (
    (('rows',), 'decode'),
    (('best',), 'search'),
    (('checkpoint_seconds', 'restart_seconds'), 'mtbf_hours'),
  ):
    if args[needed].value in (None, False):
      cli.refuse_idle(names, f'without --{needed}')


def _outlook(request: Any, plan: Any) -> Any:
  """The `outlook.Outlook` of a plan, by the flags."""
  from moe_jax.planning import failures, outlook

  args = flags.FLAGS
  stated = None
  if args.mtbf_hours is not None:
    stated = failures.Failures(args.mtbf_hours, args.checkpoint_seconds, args.restart_seconds)
  asked = outlook.Questions(args.tokens, args.chip_hour_price, args.mfu, stated, args.pipeline)
  return outlook.outlook(request, plan, asked)


if __name__ == '__main__':
  cli.run(main, define_flags)
