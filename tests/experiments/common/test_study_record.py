import pytest

from experiments.common import study_record
from moe_jax import errors


def test_runs_of_another_text_are_not_taken(tmp_path):
  given = {'scale': 'tiny', 'data_source': 'text', 'data_path': 'a.txt'}
  for _ in range(2):
    study_record.check(tmp_path / 'study', given)
  with pytest.raises(errors.InputError, match=r'--data_path=b.txt \(was a.txt\)'):
    study_record.check(tmp_path / 'study', {**given, 'data_path': 'b.txt'})
