"""Which weights to tune for a task: all, LoRA's pairs, the experts that ESFT chooses, random ones.

python -m experiments.specialisation --workdir=runs/specialisation --base=runs/quickstart
  [--seeds=5] [--arms=full,lora,token,gate,random] [--steps=300] [--rates=lora=4e-3] [--jobs=2]
  [--out=experiments/specialisation]

Every arm tunes the same base on sums (configs/sft.py) with the same rows per seed. Measured: right
answers, held-out bits per byte of the base's own text, parameters trained, bytes of the optimizer,
seconds. A killed command goes on; results.json and the table in README.md go to --out.
"""

from collections.abc import Sequence

from absl import flags

from experiments.common import cli, local_jobs


def define_flags():
  """Defines the command's flags."""
  cli.workdir_flag('directory that holds a workdir per arm and seed')
  cli.path_flag('base', '', 'directory of the run that every arm starts from')
  flags.DEFINE_list('arms', ['full', 'lora', 'token', 'gate', 'random'], 'what to tune')
  flags.DEFINE_list('seeds', ['5'], 'values of train.seed, or how many')
  flags.DEFINE_list('rates', [], 'peak learning rates, ARM=RATE; other arms have those of ARMS')
  flags.DEFINE_integer('steps', 300, 'training steps')
  flags.DEFINE_integer('tokens', 16_384, 'tokens to score experts by, about')
  flags.DEFINE_integer('n', 256, 'questions at most')
  local_jobs.define_flags()
  cli.path_flag('out', 'experiments/specialisation', 'directory of README.md and results.json')


def main(argv: Sequence[str]):
  """Tunes, measures, writes."""
  from experiments.specialisation import study

  study.main(argv)


if __name__ == '__main__':
  cli.run(main, define_flags)
