"""The one exception that a user can cause: bad input, explained in a single message."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
  """Bad input: names the field, its value, the rule it breaks and the way out.

  The commands print its text as one line and exit with status 2; a traceback would only hide it.
  """


def did_you_mean(name: str, known: Iterable[str]) -> str:
  """Returns `; did you mean 'x'?` for the known name nearest to `name`, or an empty string."""
  close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
  return f'; did you mean {close[0]!r}?' if close else ''
