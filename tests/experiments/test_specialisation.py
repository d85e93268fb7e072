import pytest

from experiments.specialisation import study
from moe_jax import errors
from moe_jax.config import schema


def result(share, general, **others):
  return {'share': share, study.GENERAL: general, 'seconds': 60.0} | others


def test_table_pairs_the_arms_by_seed():
  size = {'trained': 1000, 'optimizer_bytes': 8 * 2**20}
  results = {
    'full/0': result(0.5, 2.0, **size),
    'full/1': result(0.7, 2.5, **size),
    'token/0': result(0.4, 1.8, trained=100, optimizer_bytes=2**20),
    'token/1': result(0.6, 1.8, trained=120, optimizer_bytes=2**20),
  }
  before = result(0.0, 1.7)
  *_, full, token, _, last = study.table(['full', 'token'], [0, 1], results, before).split('\n')
  assert full.startswith('| full | 60.0 |  | +0.550 [')
  # Ten points less in both seeds: an interval without width; a tenth of a bit more in both.
  assert token == (
    '| token | 50.0 | -10.0 [-10.0, -10.0] | +0.100 [+0.100, +0.100] | -0.450 [-3.627, +2.727] | '
    '110 | 1.00 | 60 |'
  )
  assert last == 'Before: 0.0 % right, 1.700 bits per byte. Seeds: 2.'


def test_arms_and_their_rates():
  found = study._arms(['token', 'full'], ['token=1e-4'])
  assert list(found) == ['token', 'full']
  assert found['token'] == study.Arm('experts', 1e-4, 'token') and found['full'].rate == 2e-3
  assert {arm.kind for arm in study.ARMS.values()} == {*schema.TRAINABLE}
  for names, rates, words in (
    (['toke'], [], "did you mean 'token'"),
    (['token'], ['full=1'], '--rates=full=1 must be ARM=RATE with an arm of --arms=token'),
    (['token'], ['token=fast'], '--rates=token=fast must be'),
  ):
    with pytest.raises(errors.InputError, match=words):
      study._arms(names, rates)
