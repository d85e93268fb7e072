"""The one exception that a user can cause: bad input, explained in a single message."""

import difflib
from collections.abc import Collection, Iterable
from typing import Any, TypeVar

_T = TypeVar('_T')


class InputError(ValueError):
  """Bad input: names the field, its value, the rule it breaks and the way out.

  The commands print its text as one line and exit with status 2; a traceback would only hide it.
  """


def did_you_mean(name: str, known: Iterable[str]) -> str:
  """Returns `; did you mean 'x'?` for the known name nearest to `name`, or an empty string."""
  close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
  return f'; did you mean {close[0]!r}?' if close else ''


def require(condition: bool, message: str):
  """Raises `InputError(message)` unless `condition` holds."""
  if not condition:
    raise InputError(message)


def present(value: _T | None, problem: str) -> _T:
  """Returns `value`, and raises InputError(problem) if it is None."""
  if value is None:
    raise InputError(problem)
  return value


def choice(name: str, value: str, known: Collection[str]):
  """Requires that `config.<name>`, whose value is `value`, is one of `known`."""
  shown = ', '.join(k or "''" for k in known)
  require(
    value in known,
    f'config.{name}={value!r} must be one of {shown}{did_you_mean(value, known)}',
  )


def at_least(section: Any, prefix: str, minimum: float, *names: str):
  """Requires that the fields `names` of the config section `prefix` are not below `minimum`."""
  for name in names:
    value = getattr(section, name)
    require(value >= minimum, f'config.{prefix}.{name}={value!r} must be at least {minimum}')
