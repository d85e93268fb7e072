"""What a run logs: `metrics.jsonl`, TensorBoard events, and one line on the terminal.

`MetricWriter` appends one JSON object per logged step and can be resumed without duplicates.
"""

import contextlib
import itertools
import json
import math
import os
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from absl import logging
from tensorboardX import event_file_writer, summary
from tensorboardX.proto import event_pb2

from moe_jax import atomic_files
from moe_jax.training import policy_loss, preference_loss

TAIL = 0.2  # share of a run, at its end, over which a noisy figure is averaged
KEYS = (
  'step',
  'loss',
  'lr',
  'grad_norm',
  'tokens_per_second',
  'mfu',
  'max_vio',
  'drop_rate',
  'overflow_rate',
  'aux_loss',
  'mtp_loss',
  'data_wait_share',
  'save_stall_share',
  'skipped_steps',
)
PREFERENCE_KEYS = preference_loss.FIGURES  # behind them in a run of preferences
POLICY_KEYS = (*policy_loss.FIGURES, *policy_loss.ROLLOUT_FIGURES)  # behind them in one of rewards
PPO_KEYS = (*policy_loss.PPO_FIGURES, *policy_loss.PPO_ROLLOUT_FIGURES)  # and behind those in PPO
_PROTO: Any = event_pb2  # its classes are made as it is imported
_Path = str | os.PathLike[str]


class MetricWriter:
  """Appends metrics to `workdir/metrics.jsonl` and to TensorBoard events in `workdir/tensorboard`.

  Args:
    workdir: the run's directory.
    resume_step: last step whose metrics stand; later ones are dropped, for they will come again.
    enabled: False on every process but the first; the writer then does nothing.
  """

  def __init__(self, workdir: _Path, *, resume_step: int, enabled: bool):
    self._enabled = enabled
    if not enabled:
      return
    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / 'metrics.jsonl'
    if path.exists():
      _drop_after(path, resume_step)
    self._path, self._file = path, path.open('ab', buffering=0)
    self._events = _Events(workdir / 'tensorboard', resume_step + 1)

  def write(self, metrics: Mapping[str, float | None]):
    """Appends one step; the keys must be exactly `KEYS`, None where there is nothing to say, and
    `PREFERENCE_KEYS` where there are preferences, `POLICY_KEYS` where there are rewards, and
    `PPO_KEYS` where there is a value head too.

    Numbers are written with all their digits, so that equal lines mean bit-identical losses. JSON
    has no infinity and no NaN: they become null.

    Raises:
      errors.InputError: the disk is full.
    """
    more = [k for k in (PREFERENCE_KEYS, POLICY_KEYS, PPO_KEYS) if k[0] in metrics]
    keys = (*KEYS, *itertools.chain(*more))
    if set(metrics) != set(keys):
      wrong = sorted(set(metrics) ^ set(keys))
      raise ValueError(f'metrics must have the keys {", ".join(keys)}; missing or extra: {wrong}')
    if not self._enabled:
      return
    step = int(cast(float, metrics['step']))
    line = {'step': step, **{key: _json_number(metrics[key]) for key in keys[1:]}}
    data = (json.dumps(line, allow_nan=False) + '\n').encode()
    with atomic_files.told_if_full(self._path, len(data)):
      while data:
        data = data[self._file.write(data) :]
    self.write_scalars(step, {key: value for key, value in metrics.items() if key != 'step'})

  def write_scalars(self, step: int, scalars: Mapping[str, float | None]):
    """Adds scalars to TensorBoard only (held-out loss and the like); None is left out."""
    if not self._enabled:
      return
    self._events.write(step, scalars)

  def close(self):
    """Closes both files."""
    if self._enabled:
      self._file.close()
      self._events.close()


class _Events:
  """A file of TensorBoard events, written by the caller: no thread that an error would end.

  Where the file cannot be written that is said once, and the run goes on without.
  """

  def __init__(self, directory: pathlib.Path, first_step: int):
    self._writer, self._directory = None, directory
    session = _PROTO.SessionLog(status=_PROTO.SessionLog.START)
    with self._going_on():
      directory.mkdir(parents=True, exist_ok=True)
      # The suffix keeps writers that start within one second out of each other's file, in order.
      self._writer = event_file_writer.EventsWriter(str(directory / 'events'), f'.{time.time_ns()}')
      # Hides what an earlier start has written of this step and later ones.
      self._writer.write_event(_PROTO.Event(step=first_step, session_log=session))

  def write(self, step: int, scalars: Mapping[str, float | None]):
    """Adds what is not None, and has it on the disk."""
    if self._writer is None:
      return
    event = _PROTO.Event(wall_time=time.time(), step=int(step))
    for name, value in scalars.items():
      if value is not None:
        event.summary.MergeFrom(summary.scalar(name, float(value)))
    with self._going_on():
      self._writer.write_event(event)
      self._writer.flush()

  def close(self):
    if self._writer is not None:
      with self._going_on():
        self._writer.close()

  @contextlib.contextmanager
  def _going_on(self) -> Iterator[None]:
    try:
      yield
    except OSError as e:
      logging.warning(
        f'{self._directory} cannot be written ({e.strerror or e}): TensorBoard gets no more events '
        'of this start, metrics.jsonl has all of them'
      )
      writer, self._writer = self._writer, None
      if writer is not None:
        with contextlib.suppress(OSError):  # what it still holds
          writer.close()


def read_metrics(workdir: _Path) -> list[dict[str, Any]]:
  """The objects of `workdir/metrics.jsonl`, in order; empty when there is no such file.

  A last line torn by a kill is left out; an unreadable line elsewhere is left out with a warning.
  """
  path = pathlib.Path(workdir) / 'metrics.jsonl'
  return _parse(path) if path.exists() else []


def tail_mean(lines: Sequence[Mapping[str, Any]], key: str, num_steps: int) -> float | None:
  """Mean of a figure over the last `TAIL` of a run of `num_steps`; None where there is none."""
  tail = [line[key] for line in lines if line['step'] > (1 - TAIL) * num_steps]
  return None if not tail or None in tail else sum(tail) / len(tail)


def format_line(metrics: Mapping[str, float | None]) -> str:
  """One line for people and grep, `-` for None.

  `step=120 loss=3.4567 lr=1.0e-03 grad_norm=0.53 tokens/s=5123 mfu=31.2% max_vio=0.53 ...`
  """
  formats = {
    'step': ('step', '{:d}'),
    'loss': ('loss', '{:.4f}'),
    'lr': ('lr', '{:.1e}'),
    'grad_norm': ('grad_norm', '{:.2f}'),
    'tokens_per_second': ('tokens/s', '{:.0f}'),
    'mfu': ('mfu', '{:.1%}'),
    'max_vio': ('max_vio', '{:.2f}'),
    'drop_rate': ('dropped', '{:.1%}'),
    'data_wait_share': ('data_wait', '{:.1%}'),
  }
  if metrics['overflow_rate']:
    formats['overflow_rate'] = ('overflow', '{:.1%}')
  if metrics['skipped_steps']:
    formats['skipped_steps'] = ('skipped', '{:d}')
  if PREFERENCE_KEYS[0] in metrics:
    formats['preference_accuracy'] = ('accuracy', '{:.1%}')
    formats['reward_margin'] = ('margin', '{:.3f}')
  if POLICY_KEYS[0] in metrics:
    formats |= {
      'reward': ('reward', '{:.3f}'),
      'right_share': ('right', '{:.1%}'),
      'answer_tokens': ('length', '{:.1f}'),
      'entropy': ('entropy', '{:.3f}'),
      'equal_groups': ('equal_groups', '{:.0%}'),
      'clip_share': ('clipped', '{:.1%}'),
      'reference_kl': ('kl', '{:.4f}'),
      'sampler_k3': ('sampler_k3', '{:.1e}'),
      'experts_differ': ('experts_differ', '{:.1%}'),
      'rollout_seconds': ('rollout', '{:.1f}s'),
    }
  if PPO_KEYS[0] in metrics:
    formats['value_loss'] = ('value_loss', '{:.4f}')
    formats['explained_variance'] = ('explained', '{:.2f}')
  if metrics['mtp_loss'] is not None:
    formats['mtp_loss'] = ('mtp_loss', '{:.4f}')
  return ' '.join(
    f'{name}={"-" if metrics[key] is None else form.format(metrics[key])}'
    for key, (name, form) in formats.items()
  )


def _json_number(value: float | None) -> float | None:
  value = None if value is None else float(value)
  return value if value is not None and math.isfinite(value) else None


def _parse(path: pathlib.Path) -> list[dict[str, Any]]:
  text = path.read_text(encoding='utf-8', errors='replace')
  lines = text.split('\n')
  lines.pop()  # what follows the last newline: nothing, or a torn line
  found, unreadable = [], 0
  for line in lines:
    try:
      value = json.loads(line)
      found.append({**value, 'step': int(value['step'])})
    except (ValueError, TypeError, KeyError):
      unreadable += 1
  if unreadable:
    logging.warning('%d unreadable lines in %s are left out', unreadable, path)
  return found


def _drop_after(path: pathlib.Path, step: int):
  kept = [json.dumps(value) + '\n' for value in _parse(path) if value['step'] <= step]
  atomic_files.write_text(path, ''.join(kept))
