"""The data of the page: valid JSON, every group against every other."""

import json

import numpy as np

from moe_jax.analysis.comparison import comparison, page_data
from tests.analysis.comparison import written


def made(tmp_path, **second):
  found = page_data.data(comparison.compare(written.two_groups(tmp_path, **second)))
  return json.loads(json.dumps(found, allow_nan=False))


def test_groups_and_what_they_say_of_each_other(tmp_path):
  found = made(tmp_path)
  plain, bias = found['groups']
  assert (found['baseline'], plain['name'], bias['seeds']) == ('plain', 'plain', [0, 1, 2])
  assert np.shape(bias['curves']['loss']['seeds']) == (3, 12)
  assert bias['curves']['tokens'][:2] == [256, 512]  # 2 and 4 steps of 8 x 16
  assert bias['held_out']['bits_per_byte']['seeds'] == [0.8, 0.901, 1.002]
  assert np.shape(bias['load']['relative']) == (3, 2, 8) and bias['balance']['layers'] == [1, 2]
  assert set(found['against']) == {'plain', 'bias'}
  claim = found['against']['plain']['claims'][0]
  other = found['against']['bias']['claims'][0]
  assert claim['mean'] == -other['mean'] and (claim['verdict'], other['verdict']) == (
    *('lower', 'higher'),
  )
  curve = found['against']['plain']['differences']['bias']
  assert len(curve['mean']) == len(curve['tokens']) == 12 and curve['crossover'] is None
  assert found['settings'] == [['model.moe.expert_bias.update_rule', 'none', 'sign']]


def test_curves_name_the_seeds_that_they_are_of(tmp_path):
  paths = [
    written.run(tmp_path / f'a{seed}', seed=seed, steps=24 * (seed > 0)) for seed in range(3)
  ]
  (group,) = page_data.data(comparison.compare(paths))['groups']
  assert group['seeds'] == [0, 1, 2] and group['curves']['seeds'] == [1, 2]
  assert np.shape(group['curves']['loss']['seeds']) == (2, 12)


def test_what_is_no_pair_has_reasons_and_no_curve(tmp_path):
  found = made(tmp_path, tokenizer='{"other": 1}')
  assert found['against']['plain']['differences']['bias'] == {'reasons': ['the tokenizers differ']}
  assert 'mean' not in found['against']['plain']['claims'][0]


def test_one_seed_has_no_interval_and_one_group_no_verdict(tmp_path):
  found = made(tmp_path, num_seeds=1)
  assert found['groups'][0]['curves']['loss']['low'] == [None] * 12
  alone = page_data.data(comparison.compare([tmp_path / 'plain0']))
  assert alone['against'] == {} and len(alone['groups']) == 1
