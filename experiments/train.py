"""Trains a config page on its corpus; the same command again resumes.

python -m experiments.train --config=configs/quickstart.py --workdir=runs/quickstart \
  [--config.optim.peak_lr=1e-3 ...] [--allow_config_change] [--profile_steps=10,13]

On many processes the same command runs on each, with --coordinator=HOST:PORT --num_processes=P
--process_id=I where they cannot find that out themselves; see docs/launch/.
"""

from collections.abc import Sequence

from absl import flags

from experiments.common import cli, train_command


def define_flags():
  """Flags of this command."""
  train_command.define_flags()


def main(unused_argv: Sequence[str]) -> int:
  """Trains, then reports; an interrupted run says how to go on."""
  return train_command.train(cli.resolve(flags.FLAGS.config), 'experiments.train')


if __name__ == '__main__':
  cli.run(main, define_flags)
