"""The tutorial of the first run: what it shows of the train command is what is said."""

import pathlib
import re
import shlex

import pytest

from experiments.common import config_overrides
from moe_jax import errors
from moe_jax.config import parse
from moe_jax.runs import run_record

PAGE = pathlib.Path(__file__).parents[2] / 'docs/tutorials/first_run.md'


def configs():
  """The config of every train command of the smoke page, in order."""
  for command in re.findall(
    r'^    python -m experiments\.(train .*smoke\.py.*)$', PAGE.read_text(), re.M
  ):
    (spec,), overrides, _ = config_overrides.split(shlex.split(command))
    yield parse.from_dict(config_overrides.read(spec, overrides).to_dict())


def test_a_longer_run_and_another_config(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  workdir = pathlib.Path('runs/smoke')
  first, longer, other = configs()
  for step in (first.train.num_steps, longer.train.num_steps):
    (workdir / 'checkpoints' / str(step)).mkdir(parents=True)
  run_record.write(workdir, first, argv=[], data_fingerprint='')
  (line,) = run_record.check_workdir(workdir, longer, allow_change=False).changes
  assert f'\nconfig changed: {line}\n' in PAGE.read_text()
  run_record.write(workdir, longer, argv=[], data_fingerprint='')
  with pytest.raises(errors.InputError) as refused:
    run_record.check_workdir(workdir, other, allow_change=False)
  assert f'\nerror: {refused.value}\n' in PAGE.read_text()
