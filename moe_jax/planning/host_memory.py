"""How much memory this process has needed."""

import pathlib
import resource
import sys


def peak() -> int:
  """Bytes of this process at most so far.

  On Linux its resource usage would count that of a parent before the exec too.
  """
  status = pathlib.Path('/proc/self/status')
  if status.exists():
    line = next(line for line in status.read_text().splitlines() if line.startswith('VmHWM:'))
    return int(line.split()[1]) * 1024
  unit = 1 if sys.platform == 'darwin' else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
