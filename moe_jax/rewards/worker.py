"""A process of `pool.RewardPool`: it gives rewards, one at a time, line by line.

Standard input: the first line is {"spec", "defaults", "seconds", "memory"}, every other one an
item. Standard output: {"ready": what isolates programs} or {"refused": why}; then for every item
{"reward": [value, parts, kind, step rewards]} or {"failed": why, "kind": a kind of failure}.
"""

import json
import math
import os
import resource
import sys
from collections.abc import Mapping
from typing import Any, TextIO

from moe_jax import errors
from moe_jax.rewards import registry, reward, sandbox

_SPARE_SECONDS = 5  # behind the pool's clock: whoever has outlived the pool is ended by then


def judge(function: reward.Function, item: Mapping[str, Any]) -> dict[str, Any]:
  """The line that answers an item; what stops the sandbox from working ends this process."""
  try:
    found = function(item['prompt'], item['completion_ids'], item['text'], item['example'])
    in_steps = found.step_rewards
    values = [found.value, *found.parts.values(), *(r for _, r in in_steps or ())]
    if not all(map(math.isfinite, values)) or found.kind not in reward.KINDS:
      raise ValueError(f'the reward is {found}')
    steps = None if in_steps is None else [list(one) for one in in_steps]
    return {'reward': [found.value, dict(found.parts), found.kind, steps]}
  except sandbox.SandboxError:
    raise
  except MemoryError:
    return {'failed': 'the check ran out of memory', 'kind': 'memory'}
  except Exception as e:  # whatever a reward function can raise is told, and counted by the pool
    return {'failed': f'{type(e).__name__}: {e}', 'kind': 'error'}


def serve(requests: TextIO, answers: TextIO):
  """Answers lines until there are no more."""

  def tell(answer: Mapping[str, Any]):
    answers.write(json.dumps(answer) + '\n')
    answers.flush()

  setup = json.loads(requests.readline())
  resource.setrlimit(resource.RLIMIT_AS, (setup['memory'], setup['memory']))
  try:
    function = registry.build(setup['spec'], setup['defaults'])
  except errors.InputError as e:
    tell({'refused': str(e)})
    return
  tell({'ready': function.isolation})
  for line in requests:
    _allow(setup['seconds'] + _SPARE_SECONDS)
    tell(judge(function, json.loads(line)))


def _allow(seconds: float):
  """Gives the next item its CPU time, behind which the operating system ends this process."""
  used = resource.getrusage(resource.RUSAGE_SELF)
  until = int(used.ru_utime + used.ru_stime + seconds) + 1
  resource.setrlimit(resource.RLIMIT_CPU, (until, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def main():
  """Serves the process that has started this one; what rewards print goes to standard error."""
  answers = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)
  serve(sys.stdin, answers)


if __name__ == '__main__':
  main()
