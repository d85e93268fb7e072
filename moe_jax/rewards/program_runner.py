"""Calls a program's function; the one file that stands inside of the sandbox beside the program.

Standard input: {"source", "entry", "calls": [arguments, ...]}, with "processes" if the limit on
them is to be set here. Descriptor 3: a line of JSON for every call, {"value": ...} or {"error":
"..."}; or one line, {"failed": "..."} or {"missing": name}, if there is no function to call. The
program can write there too, and change this process: the lines are what it claims its results to
be. Which ones are right is not known here.
"""

import json
import os
import resource
import sys
from collections.abc import Callable
from typing import Any


def line(kind: str, action: Callable[[], Any], if_raises: str) -> tuple[str, bool]:
  """(the line with what an action returns, whether it has returned)."""
  try:
    return json.dumps({kind: action()}, allow_nan=False), True
  except BaseException as e:  # the program's SystemExit and KeyboardInterrupt too
    return json.dumps({if_raises: f'{type(e).__name__}: {e}'[:200]}), False


def run(job: dict[str, Any], tell: Callable[[str], object]):
  """Tells a line for every call."""
  space: dict[str, Any] = {'__name__': 'program'}
  text, loaded = line(
    'value', lambda: exec(compile(job['source'], '<program>', 'exec'), space), 'failed'
  )
  if not loaded:
    tell(text)
    return
  function = space.get(job['entry'])
  if not callable(function):
    tell(json.dumps({'missing': job['entry']}))
    return
  for arguments in job['calls']:
    tell(line('value', lambda given=arguments: function(*given), 'error')[0])


def main():
  """Runs the program that standard input describes."""
  with os.fdopen(3, 'w') as results:

    def tell(text: str):
      results.write(text + '\n')
      results.flush()

    job = json.load(sys.stdin)
    if 'processes' in job:
      resource.setrlimit(resource.RLIMIT_NPROC, (job['processes'],) * 2)
    run(job, tell)


if __name__ == '__main__':
  main()
