"""Which weights to tune for a task: all, LoRA's pairs, the experts that ESFT chooses, random ones.

python -m experiments.specialisation --workdir=runs/specialisation --base=runs/clean
  [--seeds=5] [--arms=full,lora,token,gate,random] [--steps=150] [--jobs=2] [--task=lines]
  [--table=main] [--out=experiments/specialisation] [--beside=OTHER.json]

Every arm tunes the same base with the same rows per seed, on one of three tasks: whether a line is
code or prose (lines, a base of configs/purify.py), which of eight packages a function is from
(packages), or sums. An arm may have a
rate and a share p of its own: --arms=full,full:rate=4e-3,token:p=0.4:rate=1e-2. Measured: right
answers, held-out bits per byte of the base's own text, parameters trained, bytes of the optimizer,
seconds. A killed command goes on; TABLE.json and the table of that name in README.md go to --out.
"""

from collections.abc import Sequence

from absl import flags

from experiments.common import cli, local_jobs

TASKS = ('lines', 'packages', 'sums')


def define_flags():
  """Defines the command's flags."""
  cli.workdir_flag('directory that holds a workdir per arm and seed')
  cli.path_flag('base', '', 'directory of the run that every arm starts from')
  flags.DEFINE_enum('task', 'lines', TASKS, 'what is learned')
  flags.DEFINE_list(
    'arms',
    ['full', 'lora', 'token', 'gate', 'random'],
    'what to tune, NAME[:rate=NUMBER][:p=NUMBER]',
  )
  flags.DEFINE_list('seeds', ['5'], 'values of train.seed, or how many')
  flags.DEFINE_integer('steps', 150, 'training steps')
  flags.DEFINE_integer('tokens', 16_384, 'tokens to score experts by, about')
  flags.DEFINE_integer('n', 512, 'questions at most')
  flags.DEFINE_string('table', 'main', 'name of the JSON file and of the table in README.md')
  cli.path_flag('beside', '', 'the JSON file of the same arms on another base, to compare with')
  local_jobs.define_flags()
  cli.path_flag('out', 'experiments/specialisation', 'directory of README.md and the JSON files')


def main(argv: Sequence[str]):
  """Tunes, measures, writes."""
  from experiments.specialisation import study

  study.main(argv)


if __name__ == '__main__':
  cli.run(main, define_flags)
