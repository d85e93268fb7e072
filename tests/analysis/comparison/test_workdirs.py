"""Which directories are runs, and what is read of them."""

import json

import pytest

from moe_jax import errors
from moe_jax.analysis.comparison import workdirs
from tests.analysis.comparison import written


def test_runs_below_a_directory_by_number_and_each_once(tmp_path):
  made = [written.run(tmp_path / 'study' / 'arm' / str(seed), seed=seed) for seed in (10, 2, 0)]
  other = written.run(tmp_path / 'other', seed=1)
  found = workdirs.find([other, tmp_path / 'study', made[0]])
  assert found == [other, made[2], made[1], made[0]]


def test_what_is_no_run_is_refused(tmp_path):
  with pytest.raises(errors.InputError, match='is no directory'):
    workdirs.find([tmp_path / 'nowhere'])
  (tmp_path / 'empty').mkdir()
  with pytest.raises(errors.InputError, match='empty holds no run'):
    workdirs.find([tmp_path / 'empty'])


def test_an_unfinished_run_is_read(tmp_path):
  run = workdirs.read(written.run(tmp_path / 'a', seed=3, steps=10, held_out=False))
  assert (run.seed, run.step, run.is_finished, run.held_out) == (3, 10, False, {})
  assert run.data_fingerprint == 'text' and len(run.tokenizer) == 64
  assert [step for step, _ in run.routing()] == [8, 16, 24]


def test_a_study_keeps_its_figures_elsewhere(tmp_path):
  path = written.run(tmp_path / 'a', held_out=False)
  (path / 'result.json').write_text(json.dumps({'bits_per_byte': 2.5, 'step': 24}))
  assert workdirs.read(path).held_out['bits_per_byte'] == 2.5


def test_damaged_records_are_named(tmp_path):
  path = written.run(tmp_path / 'a')
  (path / 'evaluation.json').write_text('{')
  with pytest.raises(errors.InputError, match='evaluation.json cannot be read'):
    workdirs.read(path)
  (path / 'config.json').write_text('{"config": 1}')
  with pytest.raises(errors.InputError, match='config.json is not the record of a run'):
    workdirs.read(path)
