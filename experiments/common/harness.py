"""Honest timing: programs run in turn in one process, against what the device itself can do.

A suite makes `Program`s, `measure` runs them: a warm-up each, then rounds in which every program
runs once, in an order drawn anew per round, so that a slow minute of the machine falls on all. Each
call blocks on all of its outputs and gets the number of its round, to choose fresh inputs by.
Ratios are medians over the rounds' own, since two programs of a round share the machine's state.
"""

import dataclasses
import datetime
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import tqdm

from moe_jax.devices import peak_flops

# What `--json` prints of every result; `detail` holds what only some suites know.
FIELDS = (
  *('suite', 'name', 'variant', 'seconds_median', 'seconds_min', 'seconds_max', 'repeats'),
  *('ratio_to_dense', 'ratio_to_plain', 'ratio_to_peak', 'ratio_to_transformers', 'peak_bytes'),
)
PACKAGES = ('jax', 'jaxlib', 'flax', 'tokamax', 'torch', 'transformers', 'libtpu')


@dataclasses.dataclass(frozen=True)
class Program:
  """Something to time. Programs of one `name` are compared with each other."""

  name: str  # what is computed, with its sizes
  variant: str  # how
  run: Callable[[int], Any]  # number of the round -> outputs
  role: str = ''  # 'dense', 'plain' or 'transformers': what the others of its name are divided by
  flops: float = 0.0  # that the model needs, per call
  bytes: float = 0.0  # that have to pass through memory, per call
  peak_bytes: int | None = None  # temporaries of the compiled program
  detail: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Peaks:
  """What the device reached in this very run."""

  flops: float  # per second, of a large product of matrices
  bytes: float  # per second, read and written by a copy

  def bound(self, flops: float, num_bytes: float) -> float:
    """Seconds below which the device cannot do this."""
    return max(flops / self.flops, num_bytes / self.bytes)


@dataclasses.dataclass(frozen=True)
class Options:
  """What the command's flags say to a suite."""

  only: tuple[str, ...] = ()  # words that the name and variant of a program must hold
  repeats: int = 10
  transformers: bool = True  # where it is installed

  def wants(self, *words: str) -> bool:
    """Whether something with these names was asked for."""
    text = ' '.join(words)
    return all(word in text for word in self.only)


@dataclasses.dataclass(frozen=True)
class Result:
  """One line of a benchmark.

  `ratio_to_dense` is our time over the dense twin's (1 = as fast), `ratio_to_plain` that over the
  time of a dense FFN in a few lines of JAX, `ratio_to_peak` the bound of `Peaks` over our time (1 =
  nothing is faster), `ratio_to_transformers` their time over ours (2 = we are twice as fast). None:
  there is no such program in this run.
  """

  suite: str
  name: str
  variant: str
  seconds_median: float
  seconds_min: float
  seconds_max: float
  repeats: int
  ratio_to_dense: float | None
  ratio_to_peak: float | None
  ratio_to_transformers: float | None
  peak_bytes: int | None
  detail: dict[str, Any] = dataclasses.field(default_factory=dict)
  ratio_to_plain: float | None = None  # as in results of before it was measured

  def to_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self)


def measure(
  suite: str, programs: Sequence[Program], repeats: int, peaks: Peaks, seed: int = 0
) -> list[Result]:
  """Times programs, those of one name in turn.

  Args:
    suite: for the results.
    programs: in any order; results keep it.
    repeats: rounds per name, after one call of each as a warm-up.
    peaks: see `measure_peaks`.
    seed: of the order within rounds.
  """
  order = random.Random(seed)
  groups: dict[str, list[int]] = {}
  for i, program in enumerate(programs):
    groups.setdefault(program.name, []).append(i)
  seconds: dict[int, list[float]] = {i: [] for i in range(len(programs))}
  bar = tqdm.tqdm(total=len(programs) * (repeats + 1), desc=suite, leave=False, disable=None)
  for members in groups.values():
    for number in range(repeats + 1):
      for i in order.sample(members, len(members)):
        bar.set_postfix_str(f'{programs[i].name} {programs[i].variant}'[:60], refresh=False)
        start = time.perf_counter()
        jax.block_until_ready(programs[i].run(number))
        if number:
          seconds[i].append(time.perf_counter() - start)
        bar.update()
  bar.close()
  found = []
  for i, program in enumerate(programs):
    against = {programs[j].role: seconds[j] for j in groups[program.name] if programs[j].role}
    found.append(_result(suite, program, seconds[i], against, peaks))
  return found


def _result(
  suite: str,
  program: Program,
  seconds: list[float],
  against: Mapping[str, list[float]],
  peaks: Peaks,
) -> Result:
  def paired(role: str, upside_down: bool) -> float | None:
    if role not in against:
      return None
    pairs = zip(against[role], seconds) if upside_down else zip(seconds, against[role])
    return statistics.median(a / b for a, b in pairs)

  median = statistics.median(seconds)
  bound = peaks.bound(program.flops, program.bytes)
  return Result(
    suite=suite,
    name=program.name,
    variant=program.variant,
    seconds_median=median,
    seconds_min=min(seconds),
    seconds_max=max(seconds),
    repeats=len(seconds),
    ratio_to_dense=paired('dense', False),
    ratio_to_plain=paired('plain', False),
    ratio_to_peak=bound / median if bound else None,
    ratio_to_transformers=paired('transformers', True),
    peak_bytes=program.peak_bytes,
    detail=dict(program.detail),
  )


def measure_peaks(dtype: Any = jnp.float32, repeats: int = 10) -> Peaks:
  """The rates of a product of two large matrices and of a copy that no cache holds, best of some.

  Args:
    dtype: of the matrices.
    repeats: of the copy.
  """
  platform = jax.default_backend()
  num_bytes = 2**28 if platform == 'cpu' else 2**32
  x = jax.random.normal(jax.random.key(1), (num_bytes // 4,), jnp.float32)
  # In place, for the first touch of fresh memory is slower; a bare copy would be left out.
  copy = jax.jit(lambda x: x + 1.0, donate_argnums=0)
  seconds = []
  for _ in range(repeats + 1):
    start = time.perf_counter()
    x = jax.block_until_ready(copy(x))
    seconds.append(time.perf_counter() - start)
  seconds = min(seconds[1:])
  return Peaks(peak_flops.measure_peak(jnp.dtype(dtype), platform), 2 * num_bytes / seconds)


def temporaries(compiled: Any) -> int:
  """Bytes that a compiled program allocates beside its arguments and results."""
  return int(compiled.memory_analysis().temp_size_in_bytes)


def environment() -> dict[str, Any]:
  """Where and with what a benchmark ran: for the head of its results."""
  root = os.path.dirname(__file__)

  def git(*words):
    return subprocess.run(
      ['git', *words], cwd=root, capture_output=True, text=True, check=False
    ).stdout.strip()

  versions = {}
  for package in PACKAGES:
    try:
      versions[package] = metadata.version(package)
    except metadata.PackageNotFoundError:
      versions[package] = None
  return {
    'date': datetime.date.today().isoformat(),
    'commit': git('rev-parse', '--short', 'HEAD') or None,
    'changed_files': len(git('status', '--porcelain', '--untracked-files=no').splitlines()),
    'python': platform.python_version(),
    'versions': versions,
    'device': jax.devices()[0].device_kind,
    'num_devices': jax.device_count(),
    'cores': os.cpu_count(),
    'load_average': os.getloadavg()[0],  # of other programs, if it exceeds what ours keep busy
  }
