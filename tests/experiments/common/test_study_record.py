import pytest

from experiments.common import study_record
from moe_jax import errors


def test_runs_of_another_text_are_not_taken(tmp_path):
  given = {'scale': 'tiny', 'data_source': 'text', 'data_path': 'a.txt'}
  for _ in range(2):
    study_record.check(tmp_path / 'study', given)
  with pytest.raises(
    errors.InputError, match=r'study.json is of other settings: data_path=b.txt \(was a.txt\); give'
  ):
    study_record.check(tmp_path / 'study', {**given, 'data_path': 'b.txt'})


def test_what_json_makes_of_a_value_is_no_other_value(tmp_path):
  study_record.require_same(tmp_path, {'attacks': ['a', 'b'], 'n': 3}, {'attacks': ('a', 'b')})
  with pytest.raises(errors.InputError, match=r'settings: n=3 \(was None\), k=1 \(was 2\); give'):
    study_record.require_same(tmp_path, {'k': 2, 'left': 0}, {'n': 3, 'k': 1})
