"""Which of an answer's tokens a place of its text is reached with."""

import bisect
from collections.abc import Callable


def reaching(decoded: Callable[[int], str], size: int, text: str) -> int:
  """The fewest tokens, at least one, whose text begins with `text`; `size` where none are enough.

  Bytes of a character may be tokens of their own, and the first of them are decoded to another
  character (U+FFFD), or to several: so it is texts that are compared, and not their lengths.

  Args:
    decoded: number of tokens -> the text of the first so many.
    size: tokens in all.
    text: beginning of the text of all of them.
  """
  counts = range(1, size)
  return 1 + bisect.bisect_left(counts, True, key=lambda n: decoded(n).startswith(text))
