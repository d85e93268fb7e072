"""What a comparison reads of a workdir: its config, metrics, held-out figures and loads.

No checkpoint is opened and no model built, so a run may still be training.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from moe_jax import errors
from moe_jax.balance import routing_figures
from moe_jax.config import parse, paths, schema
from moe_jax.runs import metric_log, upcycle_run

# Held-out figures under the keys of `evaluate --json`: of a run of its own, and of a study's.
HELD_OUT = ('evaluation.json', 'result.json')
DEPTH = 3  # levels below a given directory at which runs are looked for


@dataclasses.dataclass(frozen=True)
class RunFiles:
  """One run."""

  path: pathlib.Path
  cfg: schema.Config
  data_fingerprint: Any  # of what it was trained on; None where the record has none
  tokenizer: str  # digest of the file; '' where there is none
  metrics: list[dict[str, Any]]  # objects of metrics.jsonl
  held_out: dict[str, Any]  # empty where the run was not evaluated
  upcycled: dict[str, Any]  # of `upcycle_run.RECORD`; empty where the run began anew

  @property
  def seed(self) -> int:
    return self.cfg.train.seed

  @property
  def step(self) -> int:
    """The last one that was logged."""
    return self.metrics[-1]['step'] if self.metrics else 0

  @property
  def is_finished(self) -> bool:
    return self.step >= self.cfg.train.num_steps

  @functools.cached_property
  def losses(self) -> dict[int, float]:
    """Training loss by logged step; NaN where it was not finite."""
    logged = {line['step']: line.get('loss') for line in self.metrics}
    return {step: float('nan') if loss is None else loss for step, loss in logged.items()}

  def routing(self) -> list[tuple[int, dict[str, Any]]]:
    """(step, figures) of its `routing/<step>.npz`, see `routing_figures`."""
    return routing_figures.read_history(self.path / 'routing')


def find(directories: Sequence[str | os.PathLike[str]]) -> list[pathlib.Path]:
  """The workdirs among and below some directories, each once, in the order in which they are named.

  Args:
    directories: workdirs, or directories that hold some.

  Raises:
    errors.InputError: a directory is missing, or holds no run.
  """
  found: dict[pathlib.Path, pathlib.Path] = {}
  for given in directories:
    top = paths.local(given, 'workdir')
    errors.require(top.is_dir(), f'workdir {given} is no directory; name the directory of a run')
    below = [top] if _is_run(top) else _below(top, DEPTH)
    errors.require(
      bool(below),
      f'workdir {given} holds no run (no config.json with metrics.jsonl, {DEPTH} levels deep); '
      f'train one: python -m experiments.train --config=quickstart --workdir={given}',
    )
    found |= {path.resolve(): path for path in below if path.resolve() not in found}
  return list(found.values())


def _is_run(path: pathlib.Path) -> bool:
  return (path / 'config.json').is_file() and (path / 'metrics.jsonl').is_file()


def _below(top: pathlib.Path, depth: int) -> list[pathlib.Path]:
  """Runs below a directory, by name, numbers first and by size. A run holds no others."""
  found = []
  children = [path for path in top.iterdir() if path.is_dir()] if depth else []
  for path in sorted(children, key=_by_number):
    found += [path] if _is_run(path) else _below(path, depth - 1)
  return found


def _by_number(path: pathlib.Path) -> tuple[int, int, str]:
  name = path.name
  return (0, int(name), name) if name.isdecimal() else (1, 0, name)


def read(path: pathlib.Path) -> RunFiles:
  """Reads what is compared of a run.

  Raises:
    errors.InputError: its record is not one, or of a version that knows other fields.
  """
  record = _json(path / 'config.json')
  errors.require(
    isinstance(record.get('config'), dict),
    f'{path / "config.json"} is not the record of a run; restore it, or leave the workdir out',
  )
  tokenizer = path / 'tokenizer.json'
  return RunFiles(
    path,
    parse.from_record(record['config']),
    record.get('data_fingerprint'),
    hashlib.sha256(tokenizer.read_bytes()).hexdigest() if tokenizer.is_file() else '',
    metric_log.read_metrics(path),
    next((_json(path / name) for name in HELD_OUT if (path / name).is_file()), {}),
    _json(path / upcycle_run.RECORD) if (path / upcycle_run.RECORD).is_file() else {},
  )


def _json(path: pathlib.Path) -> dict[str, Any]:
  try:
    found = json.loads(path.read_text(encoding='utf-8'))
  except (OSError, ValueError) as e:
    raise errors.InputError(
      f'{path} cannot be read ({e}); restore it, or leave the workdir out'
    ) from e
  errors.require(
    isinstance(found, dict), f'{path} must hold a JSON object; restore it, or leave the workdir out'
  )
  return found
