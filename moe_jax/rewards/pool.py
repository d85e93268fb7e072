"""Rewards in processes of their own, beside whatever this one does, with a clock for every item.

A check that hangs is ended with its process from outside, which works wherever the check hangs; no
signal handler is involved. An answer whose check has failed is worth 0 and is counted under its
kind. But a pool that cannot work is an error: when a worker does not start, and when every check of
a batch has failed, for then it is the checks that are wrong and not the answers.
"""

import collections
import concurrent.futures
import json
import os
import pathlib
import queue
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from moe_jax import errors
from moe_jax.rewards import line_process, registry, reward

MEMORY = 2**32  # bytes of address space of a worker
START_SECONDS = 60.0  # for a worker to answer for the first time
REMEMBERED = 4096  # items whose rewards equal ones share
_ROOT = pathlib.Path(__file__).parents[2]


class PoolError(RuntimeError):
  """The pool cannot give rewards."""


class _Worker:
  """One process."""

  def __init__(self, setup: Mapping[str, Any]):
    """Starts it.

    Raises:
      PoolError: it does not start.
      errors.InputError: the reward is refused.
    """
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get('PYTHONPATH'))))
    self._process = line_process.LineProcess(
      [sys.executable, '-P', '-m', 'moe_jax.rewards.worker'], os.environ | {'PYTHONPATH': path}
    )
    try:
      answer = self._process.ask(setup, START_SECONDS)
    except (line_process.DiedError, line_process.TimeOverError) as e:
      self.kill()
      raise PoolError(f'a worker of the reward pool does not start: {e}') from e
    if 'refused' in answer:
      self.kill()
      raise errors.InputError(answer['refused'])
    self.isolation = str(answer['ready'])

  def ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """The answer to a request; raises as `LineProcess.ask`."""
    return self._process.ask(request, seconds)

  def kill(self):
    """Ends the process, whatever it does."""
    self._process.kill()


class _Shared:
  """What equal items are told; under the pool's lock."""

  def __init__(self):
    self.future: concurrent.futures.Future = concurrent.futures.Future()
    self.items = 1  # that wait for it

  @property
  def is_lost(self) -> bool:
    """Whether there is no reward, so that another try may find one."""
    if not self.future.done():
      return False
    return self.future.exception() is not None or bool(self.future.result()[1])


class Scored:
  """A batch that is being judged."""

  def __init__(self, futures: Sequence[concurrent.futures.Future]):
    """Futures of (reward, why its check failed or '')."""
    self._futures = futures

  def done(self) -> bool:
    """Whether `result` would return at once."""
    return all(future.done() for future in self._futures)

  def result(self) -> list[reward.Reward]:
    """The rewards, in the order of the items; waits for them.

    Raises:
      PoolError: the pool cannot work, or every check of the batch has failed.
    """
    found = [future.result() for future in self._futures]
    failed = [why for _, why in found if why]
    if found and len(failed) == len(found):
      raise PoolError(
        f'the checks of all {len(found)} answers of a batch have failed, so their rewards would '
        f'mean nothing; the first one: {failed[0]}'
      )
    return [one for one, _ in found]


def joined(parts: Sequence[Scored]) -> Scored:
  """Several submissions as one batch, in this order."""
  return Scored([future for part in parts for future in part._futures])


class RewardPool:
  """Processes that give rewards; a context that ends them.

  A reward is a function of its item: equal ones that follow each other, as many answers to one
  question are, are judged once. A failure is no reward, and the next equal item is judged anew.
  """

  def __init__(
    self,
    spec: str,
    workers: int = 2,
    time_limit_s: float = 30.0,
    *,
    defaults: Mapping[str, Mapping[str, Any]] | None = None,
  ):
    """Starts the processes.

    Args:
      spec: a sum of rewards, see `registry.parse`.
      workers: how many processes.
      time_limit_s: seconds of an item; a check that takes longer is ended, and of kind 'time'.
      defaults: options of rewards by name, see `registry.build`.

    Raises:
      errors.InputError: the sum or a number is refused.
      PoolError: a process does not start.
    """
    registry.parse(spec)
    for name, number in (('workers', workers), ('time_limit_s', time_limit_s)):
      errors.require(number > 0, f'{name}={number} of the reward pool must be positive')
    self.counts: collections.Counter[str] = collections.Counter()  # kind -> items so far
    self._seconds = time_limit_s
    self._setup = {'spec': spec, 'defaults': dict(defaults or {})}
    self._setup |= {'seconds': time_limit_s, 'memory': MEMORY}
    self._tasks: queue.SimpleQueue = queue.SimpleQueue()
    self._broken: Exception | None = None
    self._lock = threading.Lock()
    self._known: collections.OrderedDict[str, _Shared] = collections.OrderedDict()
    first = [_Worker(self._setup)]  # if it is refused, it is refused once
    self.isolation = first[0].isolation  # in which programs run; '' if none do
    self._threads = [
      threading.Thread(target=self._serve, args=(first if i == 0 else [],), daemon=True)
      for i in range(workers)
    ]
    for thread in self._threads:
      thread.start()

  def submit(self, batch: Sequence[reward.Item]) -> Scored:
    """Has a batch judged, and returns at once.

    Raises:
      PoolError: the pool is closed.
    """
    if not self._threads:
      raise PoolError('the reward pool is closed')
    return Scored([self._submit(item) for item in batch])

  def _submit(self, item: reward.Item) -> concurrent.futures.Future:
    request = item._asdict() | {'completion_ids': [int(i) for i in item.completion_ids]}
    key = json.dumps(request, sort_keys=True)
    with self._lock:
      shared = self._known.get(key)
      if shared is not None and not shared.is_lost and self._broken is None:
        if shared.future.done():
          self.counts[shared.future.result()[0].kind] += 1
        else:
          shared.items += 1
        return shared.future
      self._known[key] = shared = _Shared()
      while len(self._known) > REMEMBERED:
        self._known.popitem(last=False)
    self._tasks.put((request, shared))
    return shared.future

  def score(self, batch: Sequence[reward.Item]) -> list[reward.Reward]:
    """The rewards of a batch; waits for them. Raises as `Scored.result`."""
    return self.submit(batch).result()

  def close(self):
    """Ends the processes; what has been submitted is judged before."""
    for _ in self._threads:
      self._tasks.put(None)
    for thread in self._threads:
      thread.join()
    self._threads = []

  def __enter__(self) -> 'RewardPool':
    return self

  def __exit__(self, *unused: object):
    self.close()

  def _serve(self, workers: list[_Worker]):
    """Judges items with one process until None comes; `workers` holds it, or nothing."""
    while (task := self._tasks.get()) is not None:
      request, shared = task
      try:
        if self._broken is not None:
          raise self._broken
        found, why = self._judged(workers, request)
        with self._lock:
          self.counts[found.kind] += shared.items
          shared.future.set_result((found, why))
      except Exception as e:  # whoever waits for the reward is told, and all who come later
        self._broken = e
        with self._lock:
          shared.future.set_exception(e)
    for worker in workers:
      worker.kill()

  def _judged(
    self, workers: list[_Worker], request: Mapping[str, Any]
  ) -> tuple[reward.Reward, str]:
    """(reward, why the check failed or '') of an item."""
    for last in (False, True):
      if not workers:
        workers.append(_Worker(self._setup))
      try:
        answer = workers[0].ask(request, self._seconds)
      except line_process.TimeOverError as e:
        workers.pop().kill()
        return reward.Reward(0.0, {}, 'time'), str(e)
      except line_process.DiedError as e:
        workers.pop().kill()
        if last:  # it may have been the process; twice, it is the item
          return reward.Reward(0.0, {}, 'error'), f'the check ended its process: {e}'
        continue
      if 'failed' in answer:
        return reward.Reward(0.0, {}, answer['kind']), answer['failed']
      value, parts, kind, in_steps = answer['reward']
      steps = None if in_steps is None else [(int(end), float(r)) for end, r in in_steps]
      return reward.Reward(value, parts, kind, steps), ''
    raise AssertionError('unreachable')
