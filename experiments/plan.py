"""Will a run fit on a pod that is not here, and how fast could it be?

Run:  python -m experiments.plan --config=configs/deepseek_v2.py --topology=v5p:8x8x8
        --mesh=fsdp=64,expert=8 --config.train.batch_size=4096 --config.train.micro_batch_size=512
        [--decode --rows=4096] [--max_vio=1.0] [--estimate] [--search] [--json]

TPU topologies (v5e:16x16, v5p:8x8x8, two slices of one: v5e:16x16*2) compile the real step, which
needs the extra `tpu` and no TPU; GPUs (h100:8, h200:64) are counted from shapes. The step has
train.batch_size rows, whatever fewer a ramp begins with.
"""

import json
from collections.abc import Sequence

from absl import flags

from experiments.common import cli
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
  flags.DEFINE_bool('json', False, 'print one JSON object (a list with --search) and nothing else')


def main(argv: Sequence[str]):
  """Prints the plan."""
  del argv
  import jax

  from moe_jax.planning import plan_text, planner, planner_search

  args = flags.FLAGS
  topology = chips.parse(cli.required('topology'))
  page = args.config
  if page is not None:
    page.train.batch_ramp = ()
    page.mesh.update(parse.mesh_values(args.mesh) if args.mesh else {})
  cfg = cli.resolve(page)
  errors.require(
    args.max_vio is None or args.max_vio >= 0,
    f'--max_vio={args.max_vio} must not be negative: it is how far the largest load exceeds the '
    'mean, as a share of the mean',
  )
  errors.require(
    not (args.decode and args.search), '--search looks for train steps; leave out --decode'
  )
  # Shapes need no accelerator, and another process may be using it.
  jax.config.update('jax_platforms', 'cpu')
  request = planner.Request(cfg, topology, args.decode, args.rows, args.max_vio, args.estimate)
  if args.search:
    plans, tried = planner_search.search(request, args.best, progress=True)
    text = f'best of {tried} candidates\n{plan_text.ranking(plans)}'
    print(json.dumps([p.to_json() for p in plans], indent=2) if args.json else text)
    return
  plan = planner.plan(request, progress=True)
  print(json.dumps(plan.to_json(), indent=2) if args.json else plan_text.table(plan))
  if not plan.fits and not args.json:
    ways = planner_search.suggestions(request, plan)
    print('would fit:', *(ways or ['nothing that was tried']), sep='\n  ')


if __name__ == '__main__':
  cli.run(main, define_flags)
