r"""Which way of learning from rewards gains most, and which way of choosing among answers? Sums.

python -m experiments.reinforcement --workdir=runs/reinforcement [--seeds=5]
  [--arms=rft,outcome,process,process_prm,ppo,step_ppo,step_ppo_unreplayed,dense_process]
  [--iterations=30] [--parts=learning,verification] [--jobs=2] [--out=experiments/reinforcement]

A seed trains one base (configs/reasoner.py:small, and :small_dense for the arms that need it), and
every arm starts from there and writes as many answers. `verification` labels steps, trains judges
of steps and of solutions, and chooses among answers of the base. A killed command goes on;
results.json and the tables in README.md go to --out.
"""

from collections.abc import Sequence

from absl import flags

from experiments.common import cli, local_jobs
from experiments.reinforcement import arms


def define_flags():
  """Defines the command's flags."""
  cli.workdir_flag('directory that holds everything of every seed')
  flags.DEFINE_list('seeds', ['5'], 'values of train.seed, or how many')
  flags.DEFINE_list('arms', list(arms.ARMS), 'ways to learn')
  flags.DEFINE_list('parts', list(arms.PARTS), 'learning, verification')
  flags.DEFINE_integer('iterations', 30, 'batches of answers that an arm learns from')
  flags.DEFINE_list('rates', [], 'peak learning rates, ARM=RATE; other arms have those of pages')
  flags.DEFINE_integer('base_steps', 0, 'training steps of a base; 0 = those of its page')
  flags.DEFINE_integer('n', 512, 'held-out questions at most')
  flags.DEFINE_integer('samples', 4, 'answers drawn to each, beside the greedy one')
  flags.DEFINE_integer('label_questions', 768, 'questions whose solutions are labelled')
  flags.DEFINE_integer('solutions', 4, 'solutions to each of them')
  flags.DEFINE_integer('completions', 8, 'completions of each beginning of a solution')
  flags.DEFINE_integer('judge_steps', 0, 'training steps of a judge; 0 = those of its page')
  flags.DEFINE_integer('candidates', 16, 'answers that are chosen among; a power of two')
  local_jobs.define_flags()
  cli.path_flag('out', 'experiments/reinforcement', 'directory of README.md and results.json')


def main(argv: Sequence[str]):
  """Trains, measures, writes."""
  from experiments.reinforcement import study

  study.main(argv)


if __name__ == '__main__':
  cli.run(main, define_flags)
