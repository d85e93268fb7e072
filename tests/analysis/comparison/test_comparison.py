"""A comparison as a whole: baseline, remarks, text."""

import pytest

from moe_jax import errors
from moe_jax.analysis import paired
from moe_jax.analysis.comparison import comparison
from tests.analysis.comparison import written


def test_the_baseline_is_a_name_or_a_directory(tmp_path):
  paths = written.two_groups(tmp_path)
  assert comparison.compare(paths).baseline == 'plain'
  assert comparison.compare(paths, 'bias').baseline == 'bias'
  assert comparison.compare(paths, str(tmp_path / 'bias1')).baseline == 'bias'
  with pytest.raises(
    errors.InputError, match="none of the groups plain, bias; did you mean 'bias'"
  ):
    comparison.compare(paths, 'bia')
  with pytest.raises(errors.InputError, match='no workdir is given'):
    comparison.compare([])


def test_in_text(tmp_path):
  text = str(comparison.compare(written.two_groups(tmp_path)))
  lines = text.splitlines()
  assert lines[:2] == [f'{name}: 3 run(s), seeds 0, 1, 2' for name in ('plain', 'bias')]
  assert 'model.moe.expert_bias.update_rule  none   sign' in lines
  assert any(line.startswith('Lower: bias against plain, held-out') for line in lines)
  assert any(
    line.startswith('bias against plain, training loss: lower at 0.003M') for line in lines
  )


def test_remarks(tmp_path):
  runs = [written.run(tmp_path / 'a'), written.run(tmp_path / 'b', steps=10, model__embed_dim=32)]
  found = comparison.compare(runs).remarks()
  assert found[0] == 'b: 1 of 1 runs at step 10 of 24'
  assert found[1].startswith('not matched to 0.5 %: total parameters')
  assert found[2] == 'one seed proves nothing: a, b'


def test_the_loss_alone_is_graded_where_nothing_was_evaluated(tmp_path):
  paths = written.two_groups(tmp_path, held_out=False)
  found = comparison.compare(paths)
  assert found.claims() == [] and 'lower at' in found.curve_sentences()[0]
  few = written.two_groups(tmp_path / 'few', held_out=False, steps=4)
  assert paired.UNDECIDED in comparison.compare(few).curve_sentences()[0]


def test_no_curve_without_pairs(tmp_path):
  found = comparison.compare(written.two_groups(tmp_path, train__batch_size=4))
  assert found.curve('bias') is None and found.curve_sentences() == []  # a claim says it
  found = comparison.compare(
    written.two_groups(tmp_path / 'b', held_out=False, tokenizer='{"a": 1}')
  )
  (line,) = found.curve_sentences()
  assert line.startswith(
    '**Not comparable**: `bias` against `plain`, training loss: the tokenizers'
  )
