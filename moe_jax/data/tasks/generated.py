"""The generated tasks by the name of their data source: their questions, and how to check answers.

A task is a module with a NamedTuple `Difficulty` of whole numbers and a function `problem(number,
difficulty)`, whose result has `question`, `solution` and `label`.
"""

from collections.abc import Iterator
from typing import Any

from moe_jax import errors
from moe_jax.data import conversations
from moe_jax.data.tasks import arithmetic, programs

TASKS: dict[str, Any] = {'arithmetic': arithmetic, 'programs': programs}
_PROBLEMS, _MOST = 20_000, 10**7


def questions(
  source: str, path: str, where: str
) -> Iterator[tuple[Any, conversations.Conversation]]:
  """Yields (problem, its question and solution as a conversation), each question once.

  Args:
    source: a key of TASKS.
    path: how hard they are, '' or for example '?max_value=20&operations=3&problems=20000'.
    where: begins error messages.

  Raises:
    errors.InputError: the path has another form.
  """
  task = TASKS[source]
  options = task.Difficulty()._asdict() | {'problems': _PROBLEMS}
  example = '&'.join(f'{key}={value}' for key, value in options.items())
  given = [part.partition('=') for part in path.removeprefix('?').split('&') if part]
  for key, _, value in given:
    errors.require(
      key in options and value.isdecimal() and 0 < int(value) <= _MOST,
      f'{where} must be of the form ?{example}, with whole numbers from 1 to {_MOST:,}; it has '
      f'{key}={value}',
    )
    options[key] = int(value)
  number = options.pop('problems')
  difficulty = task.Difficulty(**options)
  seen: set[str] = set()
  for i in range(number):
    one = task.problem(i, difficulty)
    if one.question not in seen:
      seen.add(one.question)
      yield one, conversation(one.question, one.solution)


def conversation(question: str, solution: str) -> conversations.Conversation:
  """A problem as the question of a user and the answer of an assistant."""
  return (
    conversations.Turn('user', question, False),
    conversations.Turn('assistant', solution, True),
  )


def example(source: str, question: str, answer: str) -> dict[str, Any]:
  """What a reward is told of a question (`moe_jax.rewards.reward`).

  Args:
    source: that the question is from, one of config.data.source.
    question: what the user says last.
    answer: the answer of the data.
  """
  found = {'question': question, 'answer': answer}
  if source == 'programs':
    found |= {'entry': programs.ENTRY, 'tests': programs.tests(question)}
  return found
