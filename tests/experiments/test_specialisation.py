import json
import pathlib
import re

import pytest

from experiments.common import study_record
from experiments.specialisation import __main__ as command
from experiments.specialisation import study
from moe_jax import errors
from moe_jax.config import schema
from tests import in_process


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


def test_arms_with_settings_of_their_own():
  found = study.arms_of(['token', 'full', 'token:p=0.4:rate=1e-2'])
  assert list(found) == ['token', 'full', 'token:p=0.4:rate=1e-2']
  assert found['token'] == study.Arm('experts', found['token'].rate, 'token', 0.2)
  assert found['token:p=0.4:rate=1e-2'] == study.Arm('experts', 1e-2, 'token', 0.4)
  assert {arm.kind for arm in study.ARMS.values()} == {*schema.TRAINABLE}
  for word, words in (
    ('toke', "did you mean 'token'"),
    ('token:rate=fast', "'rate=fast' must be one of rate=NUMBER, p=NUMBER"),
    ('token:p=1.5', r'p in \(0, 1\]'),
    ('token:rate=0', 'a rate above 0'),
    ('full:p=0.5', "'p=0.5' must be one of rate=NUMBER, a rate"),
  ):
    with pytest.raises(errors.InputError, match=words):
      study.arms_of([word])


def test_an_arm_keeps_up_by_its_difference_to_the_first_of_its_own_base():
  here = {
    'full/0': result(0.9, 3.0),
    'full/1': result(0.8, 3.0),
    'token/0': result(0.8, 2.0),
    'token/1': result(0.7, 2.0),
  }
  there = {
    'settings': {'base': 'runs/other'},
    'runs': {
      'full/0': result(0.9, 3.0),
      'full/1': result(0.9, 3.0),
      'token/0': result(0.6, 2.5),
      'token/1': result(0.6, 2.5),
    },
  }
  # -10 points here, -30 there; one bit less lost here, half a bit there.
  *_, row = study.beside(['full', 'token'], [0, 1], here, there).split('\n')
  assert row == '| token | +20.0 [+20.0, +20.0] | -0.500 [-0.500, -0.500] |'
  with pytest.raises(errors.InputError, match='--beside has no full/2, token/2'):
    study.beside(['full', 'token'], [0, 2], here | {'full/2': {}, 'token/2': {}}, there)


def test_what_is_chosen_follows_from_scores_p_and_seed(tmp_path):
  table = {'1': {str(e): score for e, score in enumerate((0.1, 0.4, 0.2, 0.3))}}
  path = tmp_path / 'summary.json'
  path.write_text(json.dumps({'token_scores': table, 'gate_scores': table}))

  def chosen(word, seed=0):
    return study.experts_of(study.arms_of([word])[word], path, 4, seed)

  assert chosen('token') == [[1]] and chosen('token:p=0.5') == [[1, 3]]
  drawn = [chosen('random:p=0.5', seed) for seed in range(8)]
  assert {len(set(layer)) for layers in drawn for layer in layers} == {2}
  assert len({str(sorted(layers[0])) for layers in drawn}) > 1


def test_runs_that_were_asked_or_scored_otherwise_are_not_taken(tmp_path, monkeypatch):
  monkeypatch.setattr(study.load, 'load', lambda *_, **__: None)
  old = {'base': 'runs/base', 'task': 'sums', 'tokens': 16_384, 'n': 512}
  study_record.check(tmp_path, old)
  given = ('--base=runs/base', '--task=sums', f'--workdir={tmp_path}', f'--out={tmp_path}')
  for word, words in (('--n=64', r'n=64 \(was 512\)'), ('--tokens=9', r'\(was 16384\)')):
    with pytest.raises(errors.InputError, match=words):
      in_process.run(command, *given, word)


@pytest.mark.parametrize('word', ['--n=0', '--tokens=-1'])
def test_numbers_below_one_are_refused_before_the_base_is_read(tmp_path, word):
  given = ('--base=nowhere', '--task=sums', f'--workdir={tmp_path}', f'--out={tmp_path}')
  with pytest.raises(errors.InputError, match=f'^{word} must be at least 1'):
    in_process.run(command, *given, word)


def test_the_study_has_a_place_for_every_table_that_its_page_names():
  readme = (pathlib.Path(study.__file__).parent / 'README.md').read_text()
  for name in ('main', *re.findall(r'--table=(\w+)', readme)):
    assert (
      f'<!-- {name}: written by the command -->' in readme and f'<!-- end of {name} -->' in readme
    )
