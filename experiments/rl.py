"""Reinforcement: a tuned run learns from the rewards of answers that it writes; again, it resumes.

python -m experiments.rl --config=configs/grpo.py --config.init_from=runs/reasoner \
  --workdir=runs/grpo [--config.objective.policy.group_size=16 ...]

Variants: configs/grpo.py:process (a reward for every step), :rft, :gspo, :programs (run against
hidden tests in a sandbox); configs/ppo.py and its :process, PPO with a value head. Held-out
questions are asked before, at train.eval_every, and after; see docs/topics/reinforcement.md. On
many processes as experiments.train.
"""

from collections.abc import Sequence

from absl import flags

from experiments.common import cli, train_command
from moe_jax import errors


def define_flags():
  """Flags of this command."""
  train_command.define_flags()


def main(unused_argv: Sequence[str]) -> int:
  """Trains on rewards, then reports; an interrupted run says how to go on."""
  cfg = cli.resolve(flags.FLAGS.config)
  errors.require(
    cfg.objective.kind == 'policy',
    f"config.objective.kind={cfg.objective.kind!r} must be 'policy' here; take a page such as "
    'configs/grpo.py, or run python -m experiments.train',
  )
  return train_command.train(cfg, 'experiments.rl')


if __name__ == '__main__':
  cli.run(main, define_flags)
