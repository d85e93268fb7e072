"""Verdicts on held-out figures of written runs."""

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
