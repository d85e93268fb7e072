"""A long run holds on to nothing: memory, open files and threads stay as they are.

One process trains a tiny MoE with evaluation, routing figures and a save every `EVERY` steps; what
it holds is counted at the step before each. The first quarter, in which caches and pools fill, is
the measure for the rest.
"""

import gc
import os
import pathlib
import shutil
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from moe_jax.config import pages, parse, schema
from moe_jax.runs import train_run

NUM_STEPS, EVERY = 2000, 100
SETTLED = NUM_STEPS // 4
MAX_GROWTH = 0.03  # of the resident memory: allocators give pages back late


class Sample(NamedTuple):
  """What the process holds behind a step."""

  step: int
  resident: int  # bytes
  handles: int
  threads: int
  arrays: int  # live ones of JAX
  array_bytes: int


class _EnoughError(Exception):
  """Time is up."""


def sample(step: int) -> Sample:
  """What this process holds now, garbage aside."""
  gc.collect()
  pages_held = int(pathlib.Path('/proc/self/statm').read_text().split()[1])
  live = jax.live_arrays()
  return Sample(
    step,
    pages_held * os.sysconf('SC_PAGE_SIZE'),
    len(os.listdir('/proc/self/fd')),
    threading.active_count(),
    len(live),
    sum(one.nbytes for one in live),
  )


def grown(samples: Sequence[Sample], settled: int = SETTLED) -> list[str]:
  """What has grown behind step `settled`, in words; [] for a run that holds on to nothing."""
  early = [s for s in samples if s.step <= settled]
  late = [s for s in samples if s.step > settled]
  if not early or len(late) < len(early):
    return [f'{len(early)} and {len(late)} samples around step {settled} are too few to judge']
  found = []
  for name in ('handles', 'threads', 'arrays', 'array_bytes'):
    # Not the most: now and then a save is still being written.
    before, after = (np.median([getattr(s, name) for s in part]) for part in (early, late))
    if after > before:
      found.append(f'{name}: {before:,.0f} until step {settled}, {after:,.0f} later')
  # What is resident goes up and down with what is in flight: averages of many.
  resident = np.array([s.resident for s in late])
  first, second = (half.mean() for half in np.array_split(resident, 2))
  if second > (1 + MAX_GROWTH) * first:
    found.append(f'resident memory: {first / 2**20:.1f} MiB, then {second / 2**20:.1f} MiB')
  return found


def run(workdir: pathlib.Path, stop: float) -> dict:
  """Trains, and counts.

  Args:
    workdir: scratch.
    stop: of `time.monotonic`.

  Returns:
    the samples, and the broken promises.
  """
  shutil.rmtree(workdir, ignore_errors=True)
  samples: list[Sample] = []

  def look(line: str):
    if line.startswith('step=') and ' loss=' in line:
      step = int(line.split()[0].removeprefix('step='))
      samples.append(sample(step))
      if time.monotonic() > stop:
        raise _EnoughError

  broken = []
  try:
    train_run.run_training(config(workdir / 'cache'), workdir / 'run', say=look)
  except _EnoughError:
    broken.append(f'step {samples[-1].step} of {NUM_STEPS} when the time was up; give more minutes')
  broken += grown(samples)
  print(table(samples))
  return {'samples': [s._asdict() for s in samples], 'broken': broken}


def config(cache: pathlib.Path) -> schema.Config:
  """Steps of milliseconds, with all that a run does beside them."""
  page = pages.values('smoke')
  changes = {
    'train.num_steps': NUM_STEPS,
    'train.batch_size': 4,
    'train.log_every': EVERY // 2,
    'train.sample_prompt': '',
    'train.eval_every': EVERY,
    'train.routing_every': EVERY,
    'checkpoint.save_every': EVERY,
    'checkpoint.keep_last': 2,
    'model.max_seq_len': 32,
    'model.num_layers': 2,
    'data.synthetic_documents': 100,
    'data.cache_dir': str(cache),
  }
  page.update_from_flattened_dict(changes)
  return parse.from_dict(page.to_dict())


def table(samples: Sequence[Sample]) -> str:
  """Every fourth sample, and the last."""
  lines = [
    '| step | resident MiB | handles | threads | live arrays | their MiB |',
    '|---:' * 6 + '|',
  ]
  shown = [*samples[:-1:4], *samples[-1:]]
  for one in shown:
    lines.append(
      f'| {one.step} | {one.resident / 2**20:.1f} | {one.handles} | {one.threads} | {one.arrays} '
      f'| {one.array_bytes / 2**20:.2f} |'
    )
  return '\n'.join(lines)
