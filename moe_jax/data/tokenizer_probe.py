"""Tries a tokenizer.json in a process of its own, before anything here depends on it.

`tokenizers` runs what the file describes: a malformed one can end in a panic of its native code, in
a loop, or in more memory than there is, and a plausible one can lose text in silence. So the file
is read, and a few texts go there and back, where time and memory are bounded. This file is also the
program of that process, which imports `tokenizers` alone.
"""

import functools
import json
import resource
import subprocess
import sys
from typing import Any

SECONDS = 60.0  # for a file and a few lines of text; the largest published ones take 2
_BYTES = 6 * 2**30  # address space of the process, beside 40 bytes for each one of the file

WORDS = 'the quick brown fox jumps over the lazy dog'
KINDS = {
  'capital letters': 'The Quick BROWN Fox',
  'digits': 'a 0123456789 b',
  'punctuation': 'f(x) = {"a": [1]} # & *-+/\\ !?;.,\'<>@$%^_`~|',
  'line breaks and indentation': 'a\n  b\n\n\tc\n',
  'letters beyond ASCII': 'naïve Straße Жук 漢字',
  'emoji': 'a 🙂 b',
}


@functools.lru_cache(maxsize=64)
def run(text: str, seconds: float = SECONDS) -> tuple[str, tuple[str, ...]]:
  """Tries a tokenizer.json.

  Args:
    text: of the file.
    seconds: after which it is given up.

  Returns:
    (what is wrong with it, '' for nothing; the KINDS of text that it does not give back).
  """
  command = [sys.executable, '-I', __file__]
  try:
    done = subprocess.run(
      command, input=text.encode(errors='replace'), capture_output=True, timeout=seconds, check=True
    )
    problem, lost = json.loads(done.stdout)
  except subprocess.TimeoutExpired:
    return f'it has not read and written a line of text after {seconds:g} s', ()
  except (subprocess.CalledProcessError, ValueError):
    return 'reading it and a line of text with it ends the library `tokenizers`', ()
  return problem, tuple(lost)


def try_out(text: str) -> tuple[str, list[str]]:
  """What `run` returns, found out in this process."""
  import tokenizers  # the process of `run` imports nothing else

  try:
    inner = tokenizers.Tokenizer.from_str(text)
    inner.encode_special_tokens = True
    inner.no_truncation()
    inner.no_padding()
    words, again = _there_and_back(inner, WORDS), _there_and_back(inner, WORDS)
    lost = [kind for kind, line in KINDS.items() if _there_and_back(inner, line) != line]
  except BaseException as e:  # a panic of native code is no Exception
    if isinstance(e, (KeyboardInterrupt, SystemExit, GeneratorExit)):
      raise
    return f'{type(e).__name__}: {e}', []
  if words != again:
    return 'it reads the same text in two ways', lost
  if _letters(words) != _letters(WORDS) or not _breaks(words) >= _breaks(WORDS):
    return f'it loses text: {WORDS!r} comes back as {words[:80]!r}', lost
  return '', lost


def _there_and_back(inner: Any, text: str) -> str:
  ids = inner.encode(text, add_special_tokens=False).ids
  return inner.decode(ids, skip_special_tokens=True)


def _letters(text: str) -> str:
  return ''.join(text.lower().split())


def _breaks(text: str) -> set[int]:
  """Between which letters a text has a space."""
  lengths, total = set(), 0
  for word in text.split():
    total += len(word)
    lengths.add(total)
  return lengths


def _main():
  data = sys.stdin.buffer.read()
  limit = _BYTES + 40 * len(data)
  resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
  print(json.dumps(try_out(data.decode('utf-8'))))


if __name__ == '__main__':
  _main()
