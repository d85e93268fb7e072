"""What a run logs: `metrics.jsonl`, TensorBoard events, one line on the terminal, and the clock.

`MetricWriter` appends one JSON object per logged step and can be resumed without duplicates.
`StepTimer` turns tokens and seconds into throughput, model FLOPs utilisation (MFU) and the share of
the time spent waiting for data. MFU is measured against what a plain square matmul reaches on the
device at hand (`matmul_peak`), not against a data sheet.
"""

import contextlib
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import tensorboardX
from absl import logging

from moe_jax import files

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
)
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
    self._file = path.open('a', encoding='utf-8')
    # The suffix keeps two writers that start within one second out of each other's file, in order.
    self._events = tensorboardX.SummaryWriter(
      str(workdir / 'tensorboard'),
      purge_step=resume_step + 1,
      filename_suffix=f'.{time.time_ns()}',
    )

  def write(self, metrics: Mapping[str, float | None]):
    """Appends one step; the keys must be exactly `KEYS`, None where there is nothing to say.

    Numbers are written with all their digits, so that equal lines mean bit-identical losses. JSON
    has no infinity and no NaN: they become null.
    """
    if set(metrics) != set(KEYS):
      wrong = sorted(set(metrics) ^ set(KEYS))
      raise ValueError(f'metrics must have the keys {", ".join(KEYS)}; missing or extra: {wrong}')
    if not self._enabled:
      return
    step = int(metrics['step'])
    line = {'step': step, **{key: _json_number(metrics[key]) for key in KEYS[1:]}}
    self._file.write(json.dumps(line, allow_nan=False) + '\n')
    self._file.flush()
    self.write_scalars(step, {key: value for key, value in metrics.items() if key != 'step'})

  def write_scalars(self, step: int, scalars: Mapping[str, float | None]):
    """Adds scalars to TensorBoard only (held-out loss and the like); None is left out."""
    if not self._enabled:
      return
    for name, value in scalars.items():
      if value is not None:
        self._events.add_scalar(name, float(value), int(step))
    self._events.flush()

  def close(self):
    """Closes both files."""
    if self._enabled:
      self._file.close()
      self._events.close()


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
  if metrics['mtp_loss'] is not None:
    formats['mtp_loss'] = ('mtp_loss', '{:.4f}')
  return ' '.join(
    f'{name}={"-" if metrics[key] is None else form.format(metrics[key])}'
    for key, (name, form) in formats.items()
  )


class StepTimer:
  """Throughput between two log lines.

  Call `report` after a value of the last step was fetched: steps are dispatched asynchronously, and
  the clock should include their work.

  Args:
    flops_per_token: training FLOPs of the model per token.
    peak: FLOP/s of all devices, from `matmul_peak`.
    clock: seconds, monotonic.
  """

  def __init__(
    self, flops_per_token: float, peak: float, *, clock: Callable[[], float] = time.perf_counter
  ):
    self._flops_per_token, self._peak, self._clock = flops_per_token, peak, clock
    self._trained, self._saved = 0.0, 0.0
    self._restart()

  def add_tokens(self, tokens: int):
    """Counts the tokens of one global batch."""
    self._tokens += tokens

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """Around `next(batches)`: the time inside counts as waiting for data."""
    start = self._clock()
    try:
      yield
    finally:
      self._waited += self._clock() - start

  @contextlib.contextmanager
  def saving(self) -> Iterator[None]:
    """Around saving, once the steps in flight are done: like `paused`, and it is reported."""
    start = self._clock()
    try:
      with self.paused():
        yield
    finally:
      self._saved += self._clock() - start

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Around compilation and evaluation: the time inside does not count at all."""
    start = self._clock()
    try:
      yield
    finally:
      self._paused += self._clock() - start

  def report(self) -> dict[str, float]:
    """`tokens_per_second`, `mfu` and `data_wait_share` since the last report; starts anew.

    Saves are many reports apart: `save_stall_share` is of all training and saving so far.
    """
    seconds = max(self._clock() - self._start - self._paused, 1e-9)
    self._trained += seconds
    tokens_per_second = self._tokens / seconds
    report = {
      'tokens_per_second': tokens_per_second,
      'mfu': tokens_per_second * self._flops_per_token / self._peak,
      'data_wait_share': min(self._waited / seconds, 1.0),
      'save_stall_share': self._saved / (self._trained + self._saved),
    }
    self._restart()
    return report

  def _restart(self):
    self._start, self._tokens, self._waited, self._paused = self._clock(), 0, 0.0, 0.0


def matmul_peak(dtype: Any, cache_dir: _Path) -> float:
  """FLOP/s that square matmuls of `dtype` reach here, over all devices; measured once, then cached.

  Virtual CPU devices share the cores of their host, so the CPU counts once. The cache,
  `cache_dir/matmul_peak.json`, is keyed by device kind, dtype, jax version and CPU count.
  """
  device = jax.local_devices()[0]
  count = 1 if device.platform == 'cpu' else jax.device_count()
  dtype = jnp.dtype(dtype)
  key = f'{device.device_kind}|{dtype.name}|jax {jax.__version__}|{os.cpu_count()} cpus'
  path = pathlib.Path(cache_dir) / 'matmul_peak.json'
  cache = _read_peaks(path)
  if key not in cache:
    cache[key] = measure_peak(dtype, device.platform)
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
      files.write_text(path, json.dumps(cache, indent=2) + '\n')
    except OSError as e:
      logging.warning('Matmul peak is not cached, it will be measured again next time: %s', e)
  return cache[key] * count


def measure_peak(dtype: jnp.dtype, platform: str) -> float:
  """FLOP/s of one device, the best over a few sizes; each is tried for a fraction of a second."""
  sizes, seconds, launches = (4096, 8192), 0.5, 8
  if platform == 'cpu':
    sizes, seconds, launches = (512, 1024, 1536), 0.25, 1
  multiply = jax.jit(jnp.matmul)
  best = 0.0
  for size in sizes:
    a = jax.random.normal(jax.random.key(size), (size, size), jnp.float32).astype(dtype)
    jax.block_until_ready(multiply(a, a))  # compiles
    stop = time.perf_counter() + seconds
    while True:
      start = time.perf_counter()
      # Several launches in flight hide the cost of dispatch on an accelerator.
      jax.block_until_ready([multiply(a, a) for _ in range(launches)])
      now = time.perf_counter()
      best = max(best, launches * 2 * size**3 / (now - start))
      if now > stop:
        break
  return best


def _read_peaks(path: pathlib.Path) -> dict[str, float]:
  try:
    cache = json.loads(path.read_text(encoding='utf-8'))
    if not all(isinstance(v, float) and 0 < v < math.inf for v in cache.values()):
      raise ValueError('a value is not a positive number')
    return cache
  except FileNotFoundError:
    return {}
  except (OSError, ValueError, AttributeError) as e:
    logging.warning('Cached matmul peaks in %s are unusable (%s); measuring again', path, e)
    return {}


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
  files.write_text(path, ''.join(kept))
