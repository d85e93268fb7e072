"""What a machine has that training needs, and what is to be done where it lacks something."""

import importlib.metadata
import os
import pathlib
import shutil
import sys
from collections.abc import Mapping
from typing import NamedTuple

import jax

from moe_jax import atomic_files, errors
from moe_jax.config import pages, parse, paths
from moe_jax.runs import run_record, train_run

PYTHON = (3, 11)
DISK_BYTES, MEMORY_BYTES = 2 * 10**9, 2 * 10**9  # the least with which the small pages run well
_GPU, _TPU = 'nvidia', 'accel'  # device files of a machine that has them


class Line(NamedTuple):
  """One fact, and what to do if it is wrong."""

  what: str
  value: str
  remedy: str = ''  # '' = it is well

  def text(self) -> str:
    """As it is printed."""
    return f'{"wrong" if self.remedy else "ok":5} {self.what}: {self.value}' + (
      f'; {self.remedy}' if self.remedy else ''
    )


class Facts(NamedTuple):
  """What was found on a machine."""

  python: tuple[int, ...]
  versions: Mapping[str, str | None]  # None: not installed
  platform: str  # that JAX chose
  devices: tuple[str, ...]
  device_files: tuple[str, ...]  # of GPUs and TPUs that the system shows
  plugins: Mapping[str, str | None]  # versions of cuDNN, libtpu, JAX's plugins
  free_bytes: Mapping[str, int]  # by directory
  memory_bytes: int
  lock_problem: str  # of the workdir; '' where files can be made and locked
  cache_problem: str  # the same of the cache


def facts(workdir: pathlib.Path) -> Facts:
  """Looks at this machine."""
  places = {str(workdir): workdir, 'the cache': pathlib.Path(paths.cache_root(''))}
  names = [path.name for path in pathlib.Path('/dev').glob('*')]
  devices = jax.devices()
  return Facts(
    tuple(sys.version_info[:3]),
    run_record.versions(),
    devices[0].platform,
    tuple(device.device_kind for device in devices),
    tuple(sorted(n for n in names if n.rstrip('0123456789') in (_GPU, _TPU))),
    {name: _version(name) for name in ('nvidia-cudnn-cu12', 'nvidia-cudnn-cu13', 'libtpu')},
    {name: shutil.disk_usage(_existing(path)).free for name, path in places.items()},
    os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'),
    *(_lock_problem(path) for path in places.values()),
  )


def judge(found: Facts) -> list[Line]:
  """What is well and what is not."""
  python = '.'.join(map(str, found.python))
  old = found.python < PYTHON
  needed = '.'.join(map(str, PYTHON))
  lines = [Line('python', python, f'install Python {needed} or newer' if old else '')]
  for name, version in found.versions.items():
    if name not in ('python', 'moe_jax'):
      lines.append(Line(name, version or 'missing', '' if version else 'pip install -e .'))
  kinds = {kind: found.devices.count(kind) for kind in found.devices}
  devices = ', '.join(f'{count} x {kind}' for kind, count in kinds.items())
  lines.append(Line('devices', f'{devices} ({found.platform})', _unused(found)))
  lines += [Line(name, version) for name, version in found.plugins.items() if version]
  for where, free in found.free_bytes.items():
    remedy = f'free {DISK_BYTES:,} bytes there, or choose another place'
    remedy = '' if free >= DISK_BYTES else remedy
    lines.append(Line(f'disk at {where}', f'{free:,} bytes free', remedy))
  enough = found.memory_bytes >= MEMORY_BYTES
  memory = '' if enough else f'{MEMORY_BYTES:,} are the least for the small pages'
  lines.append(Line('memory', f'{found.memory_bytes:,} bytes', memory))
  another = 'that can be written, on a file system with locks'
  for where, problem, remedy in (
    ('the workdir', found.lock_problem, f'use a --workdir {another}'),
    ('the cache', found.cache_problem, f'set MOE_JAX_CACHE to a directory {another}'),
  ):
    lines.append(Line(f'locks at {where}', problem or 'work', remedy if problem else ''))
  return lines


def try_training(directory: pathlib.Path) -> Line:
  """Takes two steps of the smallest page in an empty directory."""
  page = pages.values('smoke')
  changes = {
    'train.num_steps': 2,
    'optim.warmup_steps': 0,
    'train.log_every': 1,
    'data.synthetic_documents': 60,
    'data.cache_dir': str(directory / 'cache'),
    'train.batch_size': page.train.batch_size * max(jax.device_count(), 1),
  }
  page.update_from_flattened_dict(changes)
  said: list[str] = []
  try:
    cfg = parse.from_dict(page.to_dict())
    train_run.run_training(cfg, directory / 'run', say=said.append)
  except (errors.InputError, RuntimeError, OSError) as e:
    reason = ' '.join(str(e).split())[:300]
    return Line('two steps of smoke', f'{type(e).__name__}: {reason}', 'see the lines above it')
  last = [line for line in said if line.startswith('step=2 ')]
  return Line('two steps of smoke', last[0] if last else 'no second step')


def _unused(found: Facts) -> str:
  """What to do where the machine has an accelerator that JAX does not use."""
  if found.platform != 'cpu' or not found.device_files:
    return ''
  if any(name.startswith(_GPU) for name in found.device_files):
    return "a GPU is here that JAX does not use: pip install -e '.[cuda]'"
  return "a TPU is here that JAX does not use: pip install -e '.[tpu]'"


def _existing(path: pathlib.Path) -> pathlib.Path:
  """The directory itself, or the nearest above it that is there."""
  path = path.absolute()
  return next(one for one in (path, *path.parents) if one.is_dir())


def _version(name: str) -> str | None:
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return None


def _lock_problem(directory: pathlib.Path) -> str:
  """Why a directory could not be made here, locked or written; '' if it can."""
  path = directory.absolute()
  there = next(one for one in (path, *path.parents) if os.path.lexists(one))
  if not there.is_dir():
    return f'{there} is no directory'
  probe = there / f'.doctor-{os.getpid()}'
  try:
    probe.mkdir()
    try:
      with atomic_files.lock(probe):
        return ''
    finally:
      shutil.rmtree(probe)
  except (errors.InputError, OSError) as e:
    return ' '.join(str(e).split())
