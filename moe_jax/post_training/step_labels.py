"""Solutions whose steps carry labels, made by completing them (Math-Shepherd, arXiv 2312.08935).

A step is a line. The quality of a step is its potential: N continuations are written from the
question and the steps so far, and the label is the share of them that reach the right answer (soft,
SE), or whether any does (hard, HE). The last step's label is the check of the answer itself.
Labels are value estimates of whoever completes, not of truth: a wrong step may be repaired.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from moe_jax import atomic_files, errors
from moe_jax.data import json_files


class Labelled(NamedTuple):
  """One solution with what is known of its steps."""

  question: str
  gold: str  # a right solution, which rewards compare with
  text: str
  ends: tuple[int, ...]  # offset of the character behind each step's last one
  outcomes: tuple[tuple[bool, ...], ...]  # of each step, whether each completion was right
  truth: tuple[bool, ...] | None  # of each step, where a checker knows

  @property
  def soft(self) -> list[float]:
    """SE of every step."""
    return [sum(one) / len(one) for one in self.outcomes]

  @property
  def hard(self) -> list[bool]:
    """HE of every step."""
    return [any(one) for one in self.outcomes]

  @property
  def right(self) -> bool:
    """Whether the answer is."""
    return self.outcomes[-1][0]


def ends_of_steps(text: str) -> tuple[int, ...]:
  """Offset of the character behind each line's last one; lines of space alone are no steps."""
  found, begin = [], 0
  for line in text.splitlines(keepends=True):
    if line.strip():
      found.append(begin + len(line.rstrip()))
    begin += len(line)
  return tuple(found)


def prefix(text: str, end: int) -> str:
  """The text up to a step with the line break behind it, from which the next step is written."""
  rest = text[end:]
  return text[: end + len(rest) - len(rest.lstrip())]


def write(path: pathlib.Path, solutions: Sequence[Labelled]):
  """Writes JSON lines, whole or not at all."""
  atomic_files.write_text(path, ''.join(json.dumps(one._asdict()) + '\n' for one in solutions))


def read(path: str | pathlib.Path, field: str) -> list[Labelled]:
  """Solutions that `write` has written.

  Args:
    path: of the file.
    field: what the user calls it.

  Raises:
    errors.InputError: it is not there, empty, or a line has another form.
  """
  try:
    lines = json_files.lines(pathlib.Path(path))
  except (OSError, ValueError) as e:
    raise errors.InputError(
      f'{field}={str(path)!r} must be a file of labelled steps ({e}); write one with '
      'python -m experiments.process_reward label'
    ) from e
  found = []
  for number, line in enumerate(lines, start=1):
    if not line.strip():
      continue
    try:
      found.append(_parsed(json.loads(line)))
    except (ValueError, KeyError, TypeError) as e:
      raise errors.InputError(
        f'{field}={str(path)!r}, line {number}, is no labelled solution ({e!r}); write the file '
        'with python -m experiments.process_reward label'
      ) from e
  errors.require(bool(found), f'{field}={str(path)!r} is empty; label more questions')
  return found


def _parsed(line: dict[str, Any]) -> Labelled:
  truth = line['truth']
  one = Labelled(
    str(line['question']),
    str(line['gold']),
    str(line['text']),
    tuple(int(end) for end in line['ends']),
    tuple(tuple(map(bool, outcomes)) for outcomes in line['outcomes']),
    None if truth is None else tuple(map(bool, truth)),
  )
  lengths = {len(one.ends), len(one.outcomes), *([] if truth is None else [len(truth)])}
  rising = all(a < b for a, b in zip((0, *one.ends), (*one.ends, len(one.text) + 1)))
  if len(lengths) != 1 or not one.ends or not all(one.outcomes) or not rising:
    raise ValueError('every step must have an end behind the last one, outcomes and a truth')
  return one
