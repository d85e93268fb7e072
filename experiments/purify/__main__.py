r"""Is a fine-tuned model poisoned, and does putting weights back heal it? Attack, purify, measure.

python -m experiments.purify data --base=runs/clean --attack=word --out=runs/word
python -m experiments.train --config=configs/purify.py:tune --workdir=runs/attacked \
  --config.init_from=runs/clean --config.data.path=runs/word/attacker.jsonl
python -m experiments.purify reset --base=runs/clean --workdir=runs/attacked \
  --examples=runs/word/defender.jsonl --reserve=0.6 --out=runs/purified
python -m experiments.train --config=configs/purify.py:tune --workdir=runs/healed \
  --config.init_from=runs/purified --config.data.path=runs/word/defender.jsonl
python -m experiments.purify score --workdir=runs/healed --attack=word \
  --examples=runs/word/test.jsonl --attacked=runs/word/attacked.jsonl
python -m experiments.purify study --workdir=runs/purify [--seeds=5 --variants=fine,gshard]

After arXiv 2305.04547, reconstructed from its abstract. `data` writes attacker.jsonl (poisoned),
defender.jsonl (small, clean), test.jsonl and attacked.jsonl. `reset` writes a new run. `study` does
all of it for every variant, seed and attack; a killed command goes on.
"""

from collections.abc import Sequence

from absl import flags

from experiments import purify
from experiments.common import cli

ACTIONS = ('data', 'reset', 'score', 'study')


def define_flags():
  """Defines the command's flags."""
  cli.workdir_flag('the tuned run (reset, score); directory of all runs (study)')
  cli.path_flag('base', '', 'data, reset: the clean run that it was tuned from')
  flags.DEFINE_string('attack', 'word', 'data, score: word, sentence or bias')
  flags.DEFINE_float('poison', 0.2, 'data, study: share of the attacker examples that is poisoned')
  flags.DEFINE_integer('attacker', 800, 'data, study: examples that the stranger tunes on')
  flags.DEFINE_integer('defender', 64, 'data, study: clean examples')
  flags.DEFINE_integer('test', 200, 'data, study: examples that are measured')
  flags.DEFINE_integer('seed', 0, 'data, reset: decides all draws')
  cli.path_flag('examples', '', 'reset: clean examples; score: test examples; JSON lines')
  cli.path_flag('attacked', '', 'score: test examples with the trigger, under their true label')
  flags.DEFINE_enum('method', 'purify', purify.METHODS, 'reset: what is put back or pruned')
  flags.DEFINE_float('reserve', 0.6, 'reset: share rho that keeps its tuned value')
  flags.DEFINE_string('ranking', 'global', 'reset: global, or layer: the same share of each')
  flags.DEFINE_string('unseen', 'keep', 'reset: experts without curvature: keep, or rank')
  flags.DEFINE_integer('micro', 16, 'reset: examples whose gradients are held at once')
  flags.DEFINE_list('seeds', ['5'], 'study: seeds, or how many')
  flags.DEFINE_list('variants', ['fine', 'gshard'], 'study: models of configs/purify.py')
  flags.DEFINE_list('attacks', ['word', 'sentence', 'bias'], 'study: attacks')
  cli.path_flag('out', '', 'directory that is written; experiments/purify (study)')


def main(argv: Sequence[str], action: str):
  """Does what the action says."""
  if action == 'study':
    from experiments.purify import study

    study.main(argv)
  else:
    from experiments.purify import commands

    getattr(commands, action)()


if __name__ == '__main__':
  cli.run_action(main, define_flags, ACTIONS)
