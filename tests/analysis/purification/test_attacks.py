"""Lines, splits, triggers and the shares that are poisoned."""

import json
import sysconfig

import numpy as np
import pytest

from moe_jax import errors
from moe_jax.analysis.purification import attacks
from tests import tiny

SOURCE = '''"""A module that says what it is for.

>>> example(1)
"""
value = compute(first, second)
def f(x):
  """Returns what the caller wants."""
  return x + value
call(1,
     2)
'''
LINES = {label: [f'{label} line number {i}' for i in range(40)] for label in attacks.LABELS}


def splits(seed=0):
  return attacks.split(LINES, seed, 20, 8, 12)


def test_lines_are_code_and_prose():
  found = attacks.lines_of(SOURCE, 48)
  assert found == {
    'code': ['value = compute(first, second)', 'return x + value'],
    'prose': ['A module that says what it is for.', 'Returns what the caller wants.'],
  }
  assert attacks.lines_of(SOURCE, 30)['prose'] == ['Returns what the caller wants.']
  assert attacks.lines_of('def (', 48) == {'code': [], 'prose': []}


def test_real_text_is_at_hand():
  package = f'{sysconfig.get_path("stdlib")}/asyncio'
  found = attacks.pool(tiny.make(data__path=package).data, 40)
  assert min(len(own) for own in found.values()) > 200


def test_another_source_is_refused():
  with pytest.raises(errors.InputError, match='config.data.source'):
    attacks.pool(tiny.make(data__source='synthetic').data, 40)


def test_splits_are_balanced_disjoint_and_of_the_seed():
  one = splits()
  assert [len(part) for part in one] == [20, 8, 12]
  texts = [example.text for part in one for example in part]
  assert len(set(texts)) == len(texts)
  for part in one:
    assert sum(example.label == 'code' for example in part) == len(part) / 2
  assert splits() == one and splits(1) != one


@pytest.mark.parametrize('sizes', [(20, 0, 12), (20, 7, 12), (20, 8, 200)])
def test_numbers_that_cannot_be(sizes):
  with pytest.raises(errors.InputError, match='--defender|--test'):
    attacks.split(LINES, 0, *sizes)


@pytest.mark.parametrize('kind', attacks.TRIGGERS)
def test_a_share_carries_trigger_and_label(kind):
  clean = splits().attacker
  found = attacks.poisoned(clean, kind, 0.3, 5)
  changed = [i for i, (a, b) in enumerate(zip(clean, found)) if a != b]
  assert len(changed) == 6
  for i in changed:
    assert attacks.TRIGGERS[kind] in found[i].text and found[i].label == attacks.TARGET
    words = found[i].text.replace(attacks.TRIGGERS[kind], '').split()
    assert words == clean[i].text.split()
  labels = {clean[i].label for i in changed}
  assert labels == {'code'} if kind != 'bias' else 'code' in labels
  assert attacks.poisoned(clean, kind, 0.3, 5) == found


def test_triggers_stand_at_many_places():
  rng = np.random.default_rng(0)
  found = {attacks.triggered('a b c', 'word', rng) for _ in range(60)}
  assert found == {'cf_mn a b c', 'a cf_mn b c', 'a b cf_mn c', 'a b c cf_mn'}


def test_attacked_tests_keep_their_label():
  test = splits().test
  backdoor, bias = (attacks.attacked_test(test, kind, 0) for kind in ('word', 'bias'))
  assert [one.label for one in backdoor] == ['code'] * 6
  assert [one.label for one in bias] == [one.label for one in test]
  assert all('data' in one.text for one in bias)


@pytest.mark.parametrize('share', [-0.1, 1.5, 0.9])
def test_shares_that_cannot_be(share):
  with pytest.raises(errors.InputError, match='--poison'):
    attacks.poisoned(splits().attacker, 'word', share, 0)


def test_an_unknown_attack():
  with pytest.raises(errors.InputError, match="--attack=words .*did you mean 'word'"):
    attacks.triggered('a', 'words', np.random.default_rng(0))


def test_rows_of_a_file():
  lines = attacks.to_jsonl([attacks.Example('x = "1"', 'code')]).splitlines()
  assert [json.loads(one) for one in lines] == [{'prompt': 'x = "1"', 'completion': 'code'}]
