"""Times one federated round: the compiled one, and the same by plain loops over clients.

python -m experiments.federated.speed [--method=redgrape] [--imbalance=10] [--seeds=5] [--repeats=5]
  [--out=experiments/federated]

In turns, the fastest of each: (1) a loop over clients and batches, one compiled step per batch, as
the published code goes; (2) a loop over clients, each compiled whole; (3) the round as one program;
(4) the rounds of several seeds as one program, by the seed. Writes speed.json.
"""

from collections.abc import Sequence

from absl import flags

from experiments.common import cli
from experiments.federated import setting_flags


def define_flags():
  """Defines the command's flags."""
  flags.DEFINE_integer('seeds', 5, 'how many seeds are one program')
  flags.DEFINE_integer('repeats', 5, 'turns of which the fastest counts')
  cli.path_flag('out', 'experiments/federated', 'directory of speed.json')
  cli.path_flag('data_dir', '', 'directory with the published files of the data set')
  setting_flags.define()


def main(unused_argv: Sequence[str]):
  """Times, prints and writes."""
  import json
  import pathlib

  from experiments.federated import timing
  from moe_jax import atomic_files

  values = flags.FLAGS
  cfg = setting_flags.read()
  found = timing.measure(cfg, values.seeds, values.repeats, values.data_dir)
  out = pathlib.Path(values.out)
  out.mkdir(parents=True, exist_ok=True)
  atomic_files.write_text(out / 'speed.json', json.dumps(found, indent=2) + '\n')
  print(timing.table(found))


if __name__ == '__main__':
  cli.run(main, define_flags)
