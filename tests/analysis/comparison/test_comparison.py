"""A comparison as a whole: baseline, remarks, text."""

import json

import pytest

from moe_jax import errors
from moe_jax.analysis import paired
from moe_jax.analysis.comparison import comparison, files, page_data, verdicts
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


def test_a_curve_waits_for_its_slope_only_at_one_learning_rate(tmp_path):
  def sentence(name, **second):
    found = written.two_groups(tmp_path / name, held_out=False, loss=0.95, slope=0.2, **second)
    found = comparison.compare(found)
    (said,) = page_data.data(found)['against']['plain']['differences'].values()
    assert said['text'] in (line := found.curve_sentences()[0])
    return line

  assert ': not yet decided at' in sentence('same')
  assert ': lower at' in sentence('rate', optim__peak_lr=0.5)


@pytest.mark.parametrize('held_out', [True, False])
@pytest.mark.parametrize('steps', [24, 48])
def test_runs_of_different_lengths_are_not_graded_at_equal_steps(tmp_path, held_out, steps):
  # At step 24 the runs of 24 are at the end of their schedule, those of 48 in the middle of theirs.
  paths = written.two_groups(tmp_path, train__num_steps=48, steps=steps, held_out=held_out)
  if not held_out:
    for path in paths[:3]:
      (path / 'evaluation.json').unlink()
  found = comparison.compare(paths)
  text = str(found)
  assert 'Not comparable: bias against plain' in text
  assert 'the schedules differ in length (train.num_steps: 48 and 24)' in text
  against = page_data.data(found)['against']['plain']
  assert list(against['differences']['bias']) == ['reasons']
  graded = [text, found.curve_verdict('bias'), json.dumps(against)]
  made = files.write(found, tmp_path / 'out', with_page=False)
  graded += [path.read_text() for path in made.tables]
  assert not any('lower' in one.lower() or 'higher' in one.lower() for one in graded)
  assert 'differences.png' not in {path.name for path, _ in made.pictures}


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


def whole(found, out):
  """Everything that is written of it, the page's data included."""
  json.dumps(page_data.data(found), allow_nan=False)
  return files.write(found, out, with_page=False)


def test_a_skipped_step_is_left_out(tmp_path):
  paths = written.two_groups(tmp_path)
  written.diverged(paths[1], 8)
  found = comparison.compare(paths)
  text = str(found)
  assert 'Lower: bias against plain, held-out bits per byte: -0.1990 [' in text
  assert 'plain: curves leave out logged steps without a finite loss, 1 of 12 in seed 1' in text
  assert found.curve('bias').tokens.tolist() == [128.0 * n for n in range(2, 25, 2) if n != 8]
  assert len(whole(found, tmp_path / 'out').tables) == 4


def test_a_diverged_run_is_named(tmp_path):
  paths = written.two_groups(tmp_path)
  written.diverged(paths[4])
  found = comparison.compare(paths)
  bits, vio = found.claims()
  assert bits.verdict == verdicts.NOT_COMPARABLE and vio.verdict == paired.UNDECIDED
  text = str(found)
  assert (
    'Not comparable: bias against plain, held-out bits per byte: it is not finite in bias with '
    'seed 1. No difference between them is called real' in text
  )
  assert 'bias: curves leave out logged steps without a finite loss, 12 of 12 in seed 1' in text
  assert found.curve('bias') is None and found.curve_sentences() == []
  whole(found, tmp_path / 'out')
  without = written.two_groups(tmp_path / 'without', held_out=False)
  written.diverged(without[0], *range(25))
  (line,) = comparison.compare(without).curve_sentences()
  assert 'no step was logged with a finite loss in every run of both' in line


def test_a_curve_has_a_verdict_of_its_own_where_the_figures_have_none(tmp_path):
  found = comparison.compare(written.two_groups(tmp_path, steps=20))
  assert found.claims()[0].verdict == verdicts.NOT_COMPARABLE  # evaluated after 20 and 24 steps
  (line,) = found.curve_sentences()
  assert line.startswith('`bias` against `plain`, training loss: lower at 0.003M tokens')
  whole(found, tmp_path / 'out')
