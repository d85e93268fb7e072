"""Verdicts on held-out figures of written runs."""

import numpy as np
import pytest

from moe_jax.analysis import difference_curves, paired
from moe_jax.analysis.comparison import comparison, verdicts
from tests.analysis.comparison import written


def claims(tmp_path, num_seeds=3, **second):
  paths = written.two_groups(tmp_path, num_seeds, **second)
  return {claim.figure: claim for claim in comparison.compare(paths).claims()}


def test_a_paired_difference_is_seen_through_the_seeds(tmp_path):
  found = claims(tmp_path)
  bits, vio = found['bits_per_byte'], found['max_vio']
  # -0.2, -0.199, -0.198: the seeds themselves differ by 0.1.
  assert bits.verdict == verdicts.LOWER and bits.difference.mean == pytest.approx(-0.199)
  assert bits.p_value < 1e-4 and bits.holm == verdicts.LOWER
  assert vio.verdict == paired.UNDECIDED  # equal in all runs
  assert verdicts.sentence(bits).startswith(
    '**Lower**: `bias` against `plain`, held-out bits per byte: -0.1990 [-0.2'
  )
  assert verdicts.sentence(bits).endswith(', 3 pairs')


def test_higher(tmp_path):
  assert claims(tmp_path, loss=1.2)['bits_per_byte'].verdict == verdicts.HIGHER


def test_one_seed_decides_nothing(tmp_path):
  found = claims(tmp_path, num_seeds=1)['bits_per_byte']
  assert found.verdict == paired.UNDECIDED and found.p_value == 1.0
  assert 'one seed has no interval' in verdicts.sentence(found)


def test_no_difference_is_real_without_pairs(tmp_path):
  found = claims(tmp_path, tokenizer='{"other": 1}')['bits_per_byte']
  assert found.verdict == found.holm == verdicts.NOT_COMPARABLE and found.difference is None
  text = verdicts.sentence(found)
  assert text.startswith('**Not comparable**: `bias` against `plain`') and text.endswith(
    'the tokenizers differ. No difference between them is called real'
  )


def test_figures_of_different_lengths_are_no_pair(tmp_path):
  found = claims(tmp_path, steps=20)['bits_per_byte']
  assert found.verdict == verdicts.NOT_COMPARABLE
  assert found.reasons == ['they were evaluated after different numbers of steps (20, 24)']


def test_a_difference_that_moves_is_not_yet_decided(tmp_path):
  # 0.05 below, but rising by 0.2 per doubling of the tokens.
  found = claims(tmp_path, loss=0.95, slope=0.2)['bits_per_byte']
  assert found.verdict == difference_curves.NOT_YET and found.plain == verdicts.LOWER
  assert '(at this length lower)' in verdicts.sentence(found)
  again = claims(tmp_path / 'away', loss=0.95, slope=-0.2)['bits_per_byte']
  assert again.verdict == verdicts.LOWER
  # With another learning rate the slope is one of the schedule, and nothing waits for it.
  faster = claims(tmp_path / 'faster', loss=0.95, slope=0.2, optim__peak_lr=0.5)['bits_per_byte']
  assert faster.verdict == verdicts.LOWER


@pytest.mark.parametrize('steps', [6, 0])
def test_a_pair_that_has_just_begun_says_nothing_of_finished_ones(tmp_path, steps):
  # Up to step 12 the difference rises by 0.5 per doubling, and then stays: -0.2 in four pairs.
  paths = written.two_groups(tmp_path, 4)
  for path in paths[4:]:
    written.rewritten(path, rise=0.5)
  begun = {'seed': 4, 'steps': steps, 'held_out': False}
  paths.append(written.run(tmp_path / 'plain4', **begun))
  paths.append(written.run(tmp_path / 'bias4', loss=0.8, **begun, **written.BIAS))
  written.rewritten(paths[-1], rise=0.5)
  found = comparison.compare(paths)
  bits, _ = found.claims()
  assert bits.verdict == verdicts.LOWER and bits.seeds == [0, 1, 2, 3]
  curve = found.curve('bias')
  assert curve.end == 24 * 8 * 16 and np.shape(curve.differences) == (4, 12)
  assert ', training loss: lower at 0.003M tokens: -0.19' in found.curve_sentences()[0]
  behind = f'at step {steps}' if steps else 'without a logged step'
  assert f'bias: its curves leave out seed 4 {behind}' in found.remarks()


@pytest.mark.parametrize('logged, evaluated', [(6, 24), (24, 6)])
def test_a_slope_from_elsewhere_holds_no_figure_back(tmp_path, logged, evaluated):
  paths = written.two_groups(tmp_path, 3, loss=0.95, slope=0.2)
  for path in paths:
    written.rewritten(path, logged)
    file = path / 'evaluation.json'
    file.write_text(file.read_text().replace('"step": 24', f'"step": {evaluated}'))
  found = comparison.compare(paths)
  bits, _ = found.claims()
  assert bits.verdict == verdicts.LOWER and not bits.ends_curve
  # The curve has a verdict of its own, where it ends.
  own = {6: 'lower at 0.001M', 24: 'not yet decided at 0.003M'}[logged]
  assert f', training loss: {own} tokens' in found.curve_sentences()[0]


def test_graded_seeds_without_a_log_are_left_out_of_the_curve(tmp_path):
  paths = written.two_groups(tmp_path, 3)
  (paths[1] / 'metrics.jsonl').write_text('')
  found = comparison.compare(paths)
  bits, _ = found.claims()
  assert bits.verdict == verdicts.LOWER and bits.seeds == [0, 1, 2]
  assert len(found.curve('bias').differences) == 2


def test_holm_reads_both_figures_together(tmp_path, monkeypatch):
  monkeypatch.setattr(paired, 'LEVEL', 1e-9)
  found = claims(tmp_path)['bits_per_byte']
  assert found.verdict == verdicts.LOWER and found.holm == paired.UNDECIDED
  assert 'not distinguishable when all claims are read together' in verdicts.sentence(found)


def test_a_dense_arm_has_no_balance(tmp_path):
  paths = written.two_groups(tmp_path, 2)
  for path in paths[2:]:
    file = path / 'evaluation.json'
    file.write_text(file.read_text().replace('"max_vio": 0.5', '"max_vio": null'))
  found = comparison.compare(paths).claims()
  assert [claim.figure for claim in found] == ['bits_per_byte']
