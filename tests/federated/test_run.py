import dataclasses

import numpy as np
import pytest

from moe_jax import errors
from moe_jax.federated import datasets, run, settings

CFG = settings.resolve(
  settings.Settings(method='fedavg', clients=3, rounds=4, epochs=1, imbalance=8, batch_size=64)
)


@pytest.fixture(autouse=True)
def fake(monkeypatch, images):
  monkeypatch.setattr(datasets, 'load', lambda name, data_dir, seed: images)


def train(path, cfg=CFG, seeds=(3, 5), **more):
  return run.run(cfg, seeds, path, every=2, quiet=True, **more)


def test_a_run_with_more_rounds_is_measured_where_it_ended_and_then_as_ever(tmp_path):
  assert train(tmp_path, dataclasses.replace(CFG, rounds=3)).rounds.tolist() == [2, 3]
  assert train(tmp_path, dataclasses.replace(CFG, rounds=6)).rounds.tolist() == [2, 3, 4, 6]


def test_a_run_goes_on_where_it_was_cut_off(tmp_path):
  whole = train(tmp_path / 'whole')
  assert whole.rounds.tolist() == [2, 4] and whole.right.shape == (2, 2, 10)
  assert whole.totals.tolist() == [4] * 10
  train(tmp_path / 'cut', dataclasses.replace(CFG, rounds=2))
  resumed = train(tmp_path / 'cut')
  np.testing.assert_array_equal(resumed.right, whole.right)
  a, b = (np.load(tmp_path / name / run.SAVED) for name in ('whole', 'cut'))
  assert sorted(a.files) == sorted(b.files)
  for name in a.files:
    np.testing.assert_array_equal(a[name], b[name])
  again = train(tmp_path / 'cut')  # nothing is left to do
  np.testing.assert_array_equal(again.right, whole.right)
  with pytest.raises(errors.InputError, match='has done 4 rounds, more than --rounds=3'):
    train(tmp_path / 'cut', dataclasses.replace(CFG, rounds=3))
  other = dataclasses.replace(CFG, alpha=0.5)
  with pytest.raises(errors.InputError, match='holds a run with alpha=1.0; give another'):
    train(tmp_path / 'cut', other)
  with pytest.raises(errors.InputError, match=r'holds a run with seeds=\[3, 5\]'):
    train(tmp_path / 'cut', seeds=(3,))
  saved = tmp_path / 'cut' / run.SAVED
  data = saved.read_bytes()
  for broken in (data[: len(data) // 2], b''):
    saved.write_bytes(broken)
    with pytest.raises(errors.InputError, match='cannot be read .*; delete it to begin again'):
      train(tmp_path / 'cut')


def test_devices_have_to_divide_the_clients(tmp_path):
  for devices, words in ((2, '--devices=2 must divide 3'), (9, '--devices=9 must be from 1 to 8')):
    with pytest.raises(errors.InputError, match=words):
      train(tmp_path / 'new', devices=devices)
  with pytest.raises(errors.InputError, match='--every=0 must be at least 1'):
    run.run(CFG, [0], tmp_path / 'new', every=0)
  assert not (tmp_path / 'new').exists()


def test_seeds_have_data_of_their_own():
  data = run.federations(CFG, (3, 5))
  assert data.clients.x.shape[:2] == (2, 3) and data.test_y.shape == (2, 40)
  assert (data.clients.x[0] != data.clients.x[1]).any()
