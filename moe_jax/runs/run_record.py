"""What a run was: `config.json` in its workdir, and whether a second start is the same run.

The record holds the resolved config, package versions, the git commit, the command line, the
fingerprint of the data and the working directory. A record that differs from the one on disk never
replaces it: the old one is kept as `config.<k>.json`.
"""

import importlib.metadata
import json
import os
import pathlib
import platform
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import moe_jax
from moe_jax import atomic_files, errors, trees
from moe_jax.config import moe_config, parse, schema
from moe_jax.devices import host_allocator
from moe_jax.runs import working_directory

PACKAGES = (
  'jax',
  'jaxlib',
  'flax',
  'optax',
  'orbax-checkpoint',
  'grain',
  'tokenizers',
  'numpy',
)
# Where and how the numbers are computed, not which: another mesh, another way for tokens to travel,
# or more patience with steps that are skipped, continues the same run. Keys, or sections with all
# that is in them.
PLACEMENT = (
  'mesh',
  'model.moe.exchange',
  'model.moe.grouped_matmul',
  'train.loss_chunk',
  'train.max_skipped_steps',
  'train.stall_seconds',
)
_Path = str | os.PathLike[str]


class Differences(NamedTuple):
  """Lines `key: old -> new` of two configs."""

  changes: list[str]
  placement: list[str]  # of `PLACEMENT`, which any run may change


def differences(old: trees.Json, new_config: schema.Config) -> Differences:
  """In what a recorded config differs from that of this start."""
  # Through JSON, like the old one: tuples are lists there.
  lines = parse.diff(parse.completed(old), json.loads(json.dumps(parse.to_dict(new_config))))
  placed = [line for line in lines if _is_placement(line)]
  return Differences([line for line in lines if line not in placed], placed)


def _is_placement(line: str) -> bool:
  """Whether a line `key: old -> new` changes no number but by its last bits."""
  key, _, values = line.partition(':')
  if any(qtype in values for qtype in moe_config.LOW_PRECISION):
    return False
  return any(key == name or key.startswith(f'{name}.') for name in PLACEMENT)


def check_workdir(
  workdir: _Path, new_config: schema.Config, allow_change: bool, allow_longer: bool = True
) -> Differences:
  """Makes sure that this run may use `workdir`; call before anything is compiled or written.

  Args:
    workdir: where the run writes.
    new_config: the resolved config of this start.
    allow_change: continue a run under another config (`--allow_config_change`).
    allow_longer: more steps for a finished run are no change; a study, whose results of finished
      runs are not computed again, passes False.

  Returns:
    Where `new_config` differs from the config in the workdir.

  Raises:
    errors.InputError: the workdir cannot be written, or holds a run of another config and
      `allow_change` is False.
  """
  workdir = pathlib.Path(workdir)
  found = _changes(workdir / 'config.json', new_config, allow_change)
  if allow_longer and prolongs(
    found.changes, new_config, lambda step: (workdir / 'checkpoints' / step).is_dir()
  ):
    steps = new_config.train.num_steps
    longer = f'{found.changes[0]} (the learning rate goes on as that of a run of {steps} steps)'
    found = found._replace(changes=[longer])
  elif found.changes and not allow_change:
    raise errors.InputError(
      f'--workdir={workdir} holds a run of another config: {"; ".join(found.changes)}. Use another '
      '--workdir, undo the change, or pass --allow_config_change to go on under the new config'
    )
  _check_writable(workdir)
  if (workdir / 'checkpoints').exists():
    _check_writable(workdir / 'checkpoints')
  return found


def _check_writable(directory: pathlib.Path):
  """Tries the directory, or the nearest that is there; a refused run leaves none behind."""
  there = next(path for path in (directory, *directory.absolute().parents) if os.path.lexists(path))
  try:
    with tempfile.TemporaryFile(dir=there):
      pass
  except OSError as e:
    raise errors.InputError(
      f'--workdir={directory} must be a directory that can be written: {e.strerror or e}; choose '
      'another --workdir, or free this one'
    ) from e


def prolongs(
  changes: Sequence[str], new_config: schema.Config, was_reached: Callable[[str], bool]
) -> bool:
  """Whether `changes` are no more than further steps for a run that was finished.

  Args:
    changes: lines of `differences`.
    new_config: with the further steps.
    was_reached: whether the run reached a step, its old last one.
  """
  line = re.fullmatch(r'train\.num_steps: (\d+) -> \d+', changes[0]) if len(changes) == 1 else None
  return line is not None and int(line[1]) < new_config.train.num_steps and was_reached(line[1])


def write(
  workdir: _Path,
  run_config: schema.Config,
  *,
  argv: Sequence[str],
  data_fingerprint: Any,
  directory: str = '',
) -> pathlib.Path:
  """Writes `workdir/config.json` and returns its path; an older, different record is kept.

  `directory` is what relative paths of the config are seen from; '' for this one.
  """
  path = pathlib.Path(workdir) / 'config.json'
  path.parent.mkdir(parents=True, exist_ok=True)
  record = {
    'config': parse.to_dict(run_config),
    'data_fingerprint': data_fingerprint,
    'argv': list(argv),
    'versions': versions(),
    'host_allocator': host_allocator.in_use(),
    'git': git_state(),
    working_directory.KEY: directory or working_directory.first(workdir, run_config),
  }
  text = json.dumps(record, indent=2) + '\n'
  if path.exists():
    if path.read_bytes() == text.encode():
      return path
    # A copy, so that no moment is without a config.json.
    kept = atomic_files.free_name(lambda k: path.with_name(f'{path.stem}.{k}{path.suffix}'))
    atomic_files.write_bytes(kept, path.read_bytes())
  atomic_files.write_text(path, text)
  return path


def versions() -> dict[str, str | None]:
  """Versions of python, moe_jax and the packages that decide a run's numbers; None if absent."""
  found: dict[str, str | None] = {
    'python': platform.python_version(),
    'moe_jax': moe_jax.__version__,
  }
  for name in PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = None
  return found


def git_state() -> dict[str, Any] | None:
  """`commit` and `dirty` of the repository that this package is run from; None outside of one."""
  root = pathlib.Path(moe_jax.__file__).resolve().parents[1]
  top = _git(root, 'rev-parse', '--show-toplevel')
  commit = _git(root, 'rev-parse', '--verify', 'HEAD')
  # An installed copy may lie inside some other repository, whose commit says nothing about it.
  if not commit or not top or pathlib.Path(top).resolve() != root:
    return None
  return {
    'commit': commit,
    'dirty': bool(_git(root, 'status', '--porcelain', '--untracked-files=no')),
  }


def _changes(path: pathlib.Path, new_config: schema.Config, allow_change: bool) -> Differences:
  try:
    old = json.loads(path.read_text(encoding='utf-8'))['config']
    if not isinstance(old, dict):
      raise ValueError('its config is not a section')
  except (FileNotFoundError, NotADirectoryError):
    return Differences([], [])
  except (OSError, ValueError, KeyError, TypeError) as e:
    if allow_change:
      return Differences([f'config.json: unreadable ({e}) -> replaced'], [])
    raise errors.InputError(
      f'{path} is not the record of a run ({e!r}); restore it, use another --workdir, or pass '
      '--allow_config_change to replace it (it is kept beside the new one)'
    ) from e
  return differences(old, new_config)


def _git(root: pathlib.Path, *args: str) -> str | None:
  command = ['git', '--no-optional-locks', '-C', str(root), *args]
  try:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
  except (OSError, subprocess.SubprocessError):
    return None
  return done.stdout.strip()
