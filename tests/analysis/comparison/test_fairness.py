"""When no difference is called real, and what the groups cost."""

import pytest

from moe_jax.analysis.comparison import comparison, fairness, groups, verdicts, workdirs
from tests.analysis.comparison import written


def pair(tmp_path, **second):
  """A run, and another with a bias and what `second` says."""
  paths = [written.run(tmp_path / 'a'), written.run(tmp_path / 'b', **(written.BIAS | second))]
  return groups.group([workdirs.read(path) for path in paths])


def test_pairs_are_pairs(tmp_path):
  assert fairness.reasons(*pair(tmp_path)) == []


@pytest.mark.parametrize(
  'second, why',
  [
    ({'tokenizer': '{"other": 1}'}, 'the tokenizers differ'),
    ({'fingerprint': 'other'}, 'the text differs (data_fingerprint)'),
    (
      {'train__batch_size': 4},
      'the data order differs (train.batch_size: 8 and 4)',
    ),
    (
      {'model__max_seq_len': 8},
      'the data order differs (model.max_seq_len: 16 and 8)',
    ),
    (
      {'train__num_steps': 48},
      'the schedules differ in length (train.num_steps: 24 and 48), so they are not comparable at '
      'equal steps',
    ),
    ({'seed': 1}, 'they have no seed in common'),
  ],
)
def test_why_they_are_none(tmp_path, second, why):
  assert fairness.reasons(*pair(tmp_path, **second)) == [why]


def test_a_lost_tokenizer_is_no_equal_one(tmp_path):
  paths = [written.run(tmp_path / 'a'), written.run(tmp_path / 'b', **written.BIAS)]
  for path in paths:
    (path / 'tokenizer.json').unlink()
  (why,) = fairness.reasons(*groups.group([workdirs.read(path) for path in paths]))
  assert 'tokenizer.json is missing' in why


@pytest.mark.parametrize('first', [None, '', 'imported', 'text'])
def test_a_text_that_is_not_known_is_no_equal_one(tmp_path, first):
  second = 'imported' if first == 'text' else first
  found = [
    written.run(tmp_path / 'a', fingerprint=first),
    written.run(tmp_path / 'b', fingerprint=second, **written.BIAS),
  ]
  (why,) = fairness.reasons(*groups.group([workdirs.read(path) for path in found]))
  assert why.startswith('the text of a run is not known (data_fingerprint')
  (claim, *_) = comparison.compare(found).claims()
  assert claim.verdict == verdicts.NOT_COMPARABLE and claim.difference is None


def test_budgets_against_the_first(tmp_path):
  found = pair(tmp_path, model__moe__moe_mlp_dim=12)
  columns = fairness.budgets(found)
  rows = {row[0]: row[1:] for row in fairness.budget_rows(columns)}
  # Two MoE layers of 8 routed and one shared expert, three matrices of 16 x 4 more in each.
  assert columns[1]['total parameters'] - columns[0]['total parameters'] == 2 * 9 * 3 * 16 * 4
  assert rows['kv cache bytes per token'] == ['192', '192 =']
  assert rows['total parameters'][1].endswith(' %)')
  assert fairness.budget_rows(columns, 1)[0] == ['total parameters', '11,760 (-22.7 %)', '15,216']
  assert 'total parameters' in fairness.unmatched(columns)
  assert 'kv cache bytes per token' not in fairness.unmatched(columns)
