"""A command that trains many runs, split over processes of one machine: --jobs=2.

Every process takes each jobs-th of the runs that are left, and is kept on its share of the cores:
small models lose more by waiting for another core than they gain from it. A single run takes longer
so, all of them less; and what each process holds, it holds for itself: weights, text, compiled
programs. None begins before all know what is left, or a run that ends early would shift the others'
shares.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import tqdm
from absl import flags

from moe_jax import errors


class ShardError(errors.InputError):
  """One of the processes of `run` failed and has said why; the others have done their parts."""


def define_flags():
  """Defines `--jobs` and, for the processes that it starts, `--shard`."""
  flags.DEFINE_integer('jobs', 1, 'processes that train at the same time, each on its own cores')
  flags.DEFINE_integer('shard', -1, 'internal: only every jobs-th run, from this one on')
  flags.DEFINE_list('start', [], 'internal: the pipes by which processes wait for each other')


def is_shard() -> bool:
  """Whether this process was started by `run`, to train its part and nothing else."""
  return flags.FLAGS.shard >= 0


def jobs() -> int:
  """How many processes share the runs."""
  return flags.FLAGS.jobs


def run(
  module: str,
  pending: Sequence[Any],
  train: Callable[[Any], object],
  more_flags: Sequence[str] = (),
):
  """Trains what is pending: here, or in `--jobs` processes that run `module` with these flags.

  Args:
    module: the command.
    pending: what is to be trained.
    train: trains one of them.
    more_flags: for the processes, after the flags of this one.

  Raises:
    ShardError: one of the processes failed; all have ended.
  """
  shard, jobs = flags.FLAGS.shard, flags.FLAGS.jobs
  errors.require(jobs >= 1, f'--jobs={jobs} must be at least 1')
  if is_shard():
    if pending:
      _wait_for_the_others()
    for one in pending[shard::jobs]:
      train(one)
  elif jobs > 1 and len(pending) > 1:
    command = [sys.executable, '-m', module, *sys.argv[1:], *more_flags]
    places, shards = _cores(jobs), []
    print(cost(places), file=sys.stderr)
    start = _Start()
    for i in range(jobs):
      shards.append(start.process([*command, f'--shard={i}']))
      _keep_on_cores(shards[i].pid, places[i])
    start.once_all_are_ready()
    if any([shard.wait() for shard in shards]):
      raise ShardError('a shard failed, see above; the same command again goes on from there')
  else:
    for one in tqdm.tqdm(pending, desc='runs', unit='run'):
      train(one)


class _Start:
  """Processes that begin their work together: each says that it is ready, and waits."""

  def __init__(self):
    self._ready, self._say_ready = os.pipe()
    self._wait, self._go = os.pipe()

  def process(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Starts one."""
    pipes = (self._say_ready, self._wait)
    return subprocess.Popen([*command, f'--start={pipes[0]},{pipes[1]}'], pass_fds=pipes)

  def once_all_are_ready(self):
    """Lets them begin when each has said so, or has ended."""
    os.close(self._say_ready)
    os.close(self._wait)
    while os.read(self._ready, 1):  # at its end no process holds the other side any more
      _wait_for_the_others()
    os.close(self._ready)
    os.close(self._go)


def _wait_for_the_others():
  """In a process of `_Start`: says that this one is ready, and returns once all are."""
  ready, wait = map(int, flags.FLAGS.start)
  os.close(ready)
  os.read(wait, 1)  # its end
  os.close(wait)


def seeds(words: Sequence[str]) -> list[int]:
  """The seeds of `--seeds=0,1,2`, or of a single number N: 0, 1, ..., N - 1; `7,7` is seed 7.

  Raises:
    errors.InputError: a word is no whole number or a negative one, or there is none.
  """
  try:
    found = [int(word) for word in words]
  except ValueError as error:
    raise errors.InputError(
      f'--seeds={",".join(words)} must be whole numbers, as in --seeds=0,1,2, or how many'
    ) from error
  errors.require(
    min(found, default=0) >= 0,
    f'--seeds={",".join(words)} must be at least 0, which is what the generators of numbers take; '
    'choose others',
  )
  found = list(range(found[0])) if len(found) == 1 else list(dict.fromkeys(found))
  errors.require(bool(found), f'--seeds={",".join(words)} must be at least one seed')
  return found


def cost(places: Sequence[Sequence[int]]) -> str:
  """Says in a line what processes on these cores, [] where they are not set, take and save."""
  where = ' | '.join(','.join(map(str, cores)) for cores in places)
  line = f'--jobs={len(places)}: processes'
  line += f' on cores {where}' if where.strip('| ') else ', whose cores this system does not set'
  if len({core for cores in places for core in cores}) < len(places):
    line += ' (fewer cores than processes: they wait for each other)'
  return line + (
    '; a single run takes longer, all of them less; each process holds weights, text and compiled '
    'programs of its own'
  )


def _cores(jobs: int) -> list[list[int]]:
  """Of each process its share of the cores of this one, all of them if there are too few."""
  if not hasattr(os, 'sched_setaffinity'):
    return [[] for _ in range(jobs)]
  cores = sorted(os.sched_getaffinity(0))
  return [cores[i::jobs] or cores for i in range(jobs)]


def _keep_on_cores(process: int, cores: Sequence[int]):
  """Of a process that has just begun: threads that it starts later stay there too."""
  if cores:
    with contextlib.suppress(ProcessLookupError):  # it has failed already, and has said why
      os.sched_setaffinity(process, cores)
