"""The arms of the study: pages, starts and what is changed."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from moe_jax import errors


class Arm(NamedTuple):
  """A way to learn from rewards."""

  page: str
  says: str  # in the tables
  base: str = 'base'  # a key of BASES
  judged: bool = False  # by the seed's judge of steps, in place of the checker of sums
  replay: str = ''  # '' = that of the page
  rate: float = 0.0  # peak learning rate; 0 = that of the page


PARTS = ('learning', 'verification')
BASES = {'base': 'reasoner:small', 'dense_base': 'reasoner:small_dense'}
ARMS = {
  'rft': Arm('grpo:rft', 'online RFT'),
  'outcome': Arm('grpo', 'GRPO, outcome'),
  'process': Arm('grpo:process', 'GRPO, process, checker'),
  'process_prm': Arm('grpo:process', 'GRPO, process, trained PRM', judged=True),
  'ppo': Arm('ppo:small', 'PPO, outcome'),
  'step_ppo': Arm('ppo:small_process', 'PPO, step by step, checker'),
  'step_ppo_unreplayed': Arm('ppo:small_process', 'the same without replay', replay='none'),
  'dense_process': Arm('grpo:process', 'GRPO, process, checker, dense model', base='dense_base'),
}


def chosen(names: Sequence[str], rates: Sequence[str]) -> dict[str, Arm]:
  """The arms that are asked for, at the rates that are given.

  Args:
    names: keys of `ARMS`.
    rates: words ARM=RATE.

  Raises:
    errors.InputError: there is no such arm, or a rate is no positive number.
  """
  for name in names:
    errors.require(
      name in ARMS,
      f'--arms={name} must be among {", ".join(ARMS)}{errors.did_you_mean(name, ARMS)}',
    )
  found = {name: ARMS[name] for name in names}
  for text in rates:
    name, _, rate = text.partition('=')
    try:
      found[name] = found[name]._replace(rate=float(rate))
      valid = found[name].rate > 0
    except (KeyError, ValueError):
      valid = False
    errors.require(
      valid,
      f'--rates={text} must be ARM=RATE with an arm of --arms={",".join(names)} and a positive '
      'number',
    )
  return found


def changes(arm: Arm, iterations: int, updates: int) -> Mapping[str, Any]:
  """What an arm changes of its page; start, seed and judge are the study's.

  Args:
    arm: the arm.
    iterations: batches of answers.
    updates: optimizer steps on each, as the page has them.
  """
  steps = iterations * updates
  found: dict[str, Any] = {
    'train.num_steps': steps,
    'train.eval_every': 0,
    'objective.policy.eval_questions': 0,  # all arms are measured alike, at the end
    'checkpoint.save_every': min(20 * updates, steps),
  }
  if arm.replay:
    found['objective.policy.replay'] = arm.replay
  if arm.rate:
    found['optim.peak_lr'] = arm.rate
  return found
