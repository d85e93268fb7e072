"""GShard against fine-grained routing, and the other claims of the papers, on matched arms.

python -m experiments.routing_ablation --scale=tiny|mini|small|2b --workdir=W [--arms=a,b]
  [--seeds=5] [--steps=N] [--jobs=2] [--together=N] [--out=DIR] [--earlier=DIR] [--dry_run]
  [--data_source=S --data_path=P --heldout_fraction=F] [--budget_hours=H]
  [--learning_rates=A,B,C --rate_seeds=2 | --rates_from=DIR]

Prints what the arms cost and refuses pairs that do not match; trains each arm with all seeds, as an
axis of one compiled step where they fit; evaluates, probes, times; writes the report. The same
command again goes on where it stopped, and computes no finished arm again; the report has every
finished run of the workdir with these settings, whichever call trained it. WORKDIR/progress says
what is done and how long the rest takes; an arm that fails does not stop the others.
"""

from collections.abc import Sequence

from absl import flags

from experiments.common import cli, local_jobs
from experiments.routing_ablation import arms


def define_flags():
  """Flags of this command."""
  flags.DEFINE_enum('scale', 'tiny', list(arms.SCALES), 'size of the arms')
  cli.workdir_flag('directory that holds a workdir per arm and seed, and the report')
  flags.DEFINE_list(
    'arms', [], f'some of {", ".join(arms.ARMS)}; without, all but {", ".join(arms.ASIDE)}'
  )
  flags.DEFINE_list('seeds', ['5'], 'values of train.seed, or how many')
  flags.DEFINE_integer(
    'steps', 0, 'training steps; 0 = 3,000 at scale tiny, otherwise as the config pages say'
  )
  flags.DEFINE_integer('together', 0, 'seeds that train as one; 0 = what suits the scale')
  flags.DEFINE_string('data_source', '', 'data.source of all arms; as the pages say without')
  flags.DEFINE_string('data_path', '', 'data.path of all arms; as the pages say without')
  flags.DEFINE_float(
    'heldout_fraction', None, 'data.heldout_fraction of all arms; few documents need more'
  )
  flags.DEFINE_bool(
    'dry_run', False, 'print what the arms cost and whether they match; no training'
  )
  flags.DEFINE_list(
    'learning_rates', [], 'peak rates to try for each family of arms; the best is taken'
  )
  flags.DEFINE_list('rate_seeds', ['2'], 'values of train.seed, or how many, that try them')
  cli.path_flag('rates_from', '', 'directory of a report whose best learning rates are used')
  flags.DEFINE_float(
    'budget_hours', 0.0, 'decide what can be decided in so long; 0 = all of --seeds', lower_bound=0
  )
  cli.path_flag('earlier', '', 'directory of a report whose runs are added, not trained again')
  cli.path_flag('out', '', 'directory of the report; WORKDIR/report without')
  flags.DEFINE_enum('part', '', ['', 'rates'], 'internal: what a process of --jobs trains')
  local_jobs.define_flags()


def main(argv: Sequence[str]):
  """Checks, trains, measures, reports."""
  from experiments.routing_ablation import study

  study.main(argv)


if __name__ == '__main__':
  cli.run(main, define_flags)
