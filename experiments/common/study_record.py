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
    old = json.loads(path.read_text(encoding='utf-8'))
    changed = [
      f'--{key}={given[key]} (was {old.get(key)})' for key in given if given[key] != old.get(key)
    ]
    errors.require(
      not changed,
      f'--workdir={workdir} holds runs of another study: {", ".join(changed)}; give the old '
      'values, or another --workdir',
    )
  else:
    workdir.mkdir(parents=True, exist_ok=True)
    atomic_files.write_text(path, json.dumps(dict(given), indent=2) + '\n')
