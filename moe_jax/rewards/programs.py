"""Execution feedback: a completion is a program, worth what it passes of the example's tests."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from moe_jax import errors
from moe_jax.rewards import isolation, reward, sandbox

_FENCED = re.compile(r'```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)', re.DOTALL)
_KINDS = {'missing': 'no_answer', 'error': 'error', 'time': 'time', 'memory': 'memory'}


class Runner(Protocol):
  """What runs programs; `sandbox.Sandbox` does."""

  isolation: str

  def run(self, source: str, entry: str, calls: Sequence[Sequence[Any]]) -> sandbox.Outcome:
    """Calls a program's function."""
    ...

  def close(self):
    """Ends its processes."""
    ...


def source_in(text: str, prefix: str = '') -> str:
  """The program of a completion: its last fenced block, or all of it, behind a prefix."""
  blocks = _FENCED.findall(text)
  return prefix + (blocks[-1] if blocks else text if prefix else text.strip())


def equal(found: Any, expected: Any) -> bool:
  """Whether two JSON values are the same: True is not 1, but 2.0 is 2, and floats need be near."""
  if isinstance(found, bool) or isinstance(expected, bool):
    return found is expected
  if isinstance(found, int | float) and isinstance(expected, int | float):
    exact = isinstance(found, int) and isinstance(expected, int)
    return found == expected if exact else math.isclose(found, expected, rel_tol=1e-9, abs_tol=1e-9)
  if isinstance(found, list) and isinstance(expected, list):
    return len(found) == len(expected) and all(map(equal, found, expected))
  if isinstance(found, dict) and isinstance(expected, dict):
    return found.keys() == expected.keys() and all(equal(found[k], expected[k]) for k in found)
  return type(found) is type(expected) and found == expected


class Program:
  """The reward of programs: 1 if every test passes, else 0.

  The example has 'entry', the name of a function, and 'tests', a list of [arguments, value] in JSON
  values; 'prefix', if given, is text that the completion continues. A program is given arguments
  only, and what it returns is compared here.
  """

  def __init__(self, runner: Runner, *, share: bool = False):
    """Keeps what runs programs.

    Args:
      runner: see `Runner`.
      share: worth the share of tests that pass, which is denser and easier to be satisfied with.
    """
    self._runner, self._share = runner, share

  @property
  def isolation(self) -> str:
    """What isolates programs, in words."""
    return self._runner.isolation

  def close(self):
    """Ends the processes of what runs programs."""
    self._runner.close()

  def __call__(
    self, prompt: str, completion_ids: Sequence[int], text: str, example: Mapping[str, Any]
  ) -> reward.Reward:
    tests = example['tests']
    if not tests:
      raise ValueError(f'the question {example.get("question")!r} has no tests')
    source = source_in(text, str(example.get('prefix', '')))
    found = self._runner.run(source, str(example['entry']), [given for given, _ in tests])
    passed = [
      'value' in one and equal(one['value'], expected)
      for one, (_, expected) in zip(found.results, tests)
    ]
    share = sum(passed) / len(tests)
    right = found.kind == 'ran' and share == 1
    kind = 'right' if right else _KINDS.get(found.kind, 'wrong')
    return reward.Reward(share if self._share else float(right), {'passed': share}, kind)


def isolated(
  unsafe: bool = False,
  share: bool = False,
  cpu_seconds: int = isolation.Limits().cpu_seconds,
  wall_seconds: float = isolation.Limits().wall_seconds,
  memory_mib: int = isolation.Limits().memory >> 20,
) -> Program:
  """`Program` over a sandbox of its own.

  Args:
    unsafe: run programs without isolation.
    share: see `Program`.
    cpu_seconds: of a program, on all tests together.
    wall_seconds: until a program that sleeps is ended.
    memory_mib: of a program.

  Raises:
    errors.InputError: this machine does not isolate programs, or a limit is none.
  """
  given = {'cpu_seconds': cpu_seconds, 'wall_seconds': wall_seconds, 'memory_mib': memory_mib}
  for name, value in given.items():
    errors.require(value > 0, f'program({name}={value}) must be positive')
  limits = isolation.Limits(cpu_seconds, wall_seconds, memory_mib << 20)
  return Program(sandbox.Sandbox(limits, unsafe=unsafe), share=share)
