"""What the runs in a study's workdir were made with, so that no others are taken for them."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from moe_jax import atomic_files, errors


def check(workdir: pathlib.Path, given: Mapping[str, Any]):
  """Refuses a workdir whose runs were made with other flags; records those of a new one.

  Args:
    workdir: of the study.
    given: values of the flags that decide what a run comes to, by name.

  Raises:
    errors.InputError: the runs there were made with other values.
  """
  path = workdir / 'study.json'
  if path.exists():
    require_same(path, json.loads(path.read_text(encoding='utf-8')), given)
  else:
    workdir.mkdir(parents=True, exist_ok=True)
    atomic_files.write_text(path, json.dumps(dict(given), indent=2) + '\n')


def require_same(path: pathlib.Path, was: Mapping[str, Any], now: Mapping[str, Any]):
  """Refuses what was measured under other settings than those asked for now.

  Args:
    path: where it is kept, for the error.
    was: its settings by name, as JSON gave them back.
    now: those that decide what it comes to; they may be Python's own values.

  Raises:
    errors.InputError: a setting differs, or was not there.
  """
  now = json.loads(json.dumps(dict(now)))
  changed = [f'{key}={now[key]} (was {was.get(key)})' for key in now if now[key] != was.get(key)]
  errors.require(
    not changed,
    f'{path} is of other settings: {", ".join(changed)}; give the old values, or another --workdir',
  )
