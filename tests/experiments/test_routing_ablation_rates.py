"""Learning rates of the study: which are tried, of what length, and which is taken."""

import pytest

from experiments.routing_ablation import arms, learning_rates, report
from moe_jax import errors

Tried = learning_rates.Tried
SWEEP = {
  'gshard': Tried(
    'tiny', 3000, {0.003: {0: 2.0, 1: 2.2}, 0.006: {0: 1.9, 1: 2.2}, 0.012: {0: 2.5, 1: 1.9}}
  ),
  'deepseekmoe': Tried('tiny', 3000, {0.003: {0: 1.8}, 0.006: {0: 1.9}, 0.012: {0: 2.0}}),
}


def test_rates_are_at_least_three_positive_numbers():
  assert learning_rates.rates(['0.012', '3e-3', '0.006', '0.006']) == [0.003, 0.006, 0.012]
  for wrong in (
    ['a', '1', '2'],
    ['1', '2', '1'],
    ['0', '1', '2'],
    ['-1', '1', '2'],
    ['1', '2', 'nan'],
  ):
    with pytest.raises(errors.InputError, match='--learning_rates='):
      learning_rates.rates(wrong)


def test_the_rate_of_the_lowest_mean_is_that_of_the_family():
  chosen = learning_rates.best(SWEEP)
  assert chosen == {'gshard': 0.006, 'deepseekmoe': 0.003}
  pages = {name: arms.resolve(arms.ARMS[name], 'tiny') for name in ('gshard', 'hash', 'mha', 'm4')}
  rates = {name: cfg.optim.peak_lr for name, cfg in learning_rates.applied(pages, chosen).items()}
  assert rates == {'gshard': 0.006, 'hash': 0.006, 'mha': 0.003, 'm4': 0.006}  # m4: not swept


def test_every_family_is_that_of_its_first_arm():
  families = {arm.family for arm in arms.ARMS.values()}
  assert families == {'gshard', 'deepseekmoe', 'm4', 'loss_free', 'mla'}
  assert all(arms.ARMS[family].family == family for family in families)
  whole_models = {name: arms.resolve(arm, 'tiny').model for name, arm in arms.ARMS.items()}
  latent = {name for name, model in whole_models.items() if model.attention.kind == 'mla'}
  assert latent == {name for name, arm in arms.ARMS.items() if arm.family == 'mla'}
  models = {name: model.moe for name, model in whole_models.items()}
  raw_sigmoid = {
    name for name, moe in models.items() if moe.score_func == 'sigmoid' and not moe.norm_topk_prob
  }
  assert raw_sigmoid == {name for name, arm in arms.ARMS.items() if arm.family == 'loss_free'}
  coarse = {name for name, arm in arms.ARMS.items() if arm.family == 'gshard'}
  whole = {n for n, moe in models.items() if not (moe.num_shared_experts and moe.num_experts)}
  assert coarse == whole - {'ds_moe'}  # arms without shared experts


def test_the_table_of_rates_says_what_is_at_an_edge():
  _, table, words = learning_rates.blocks(SWEEP)
  assert table.header == ['family', '0.003', '0.006', '0.012']
  assert table.rows[0] == [
    '`gshard`',
    '2.1000 ± 0.1414',
    '**2.0500 ± 0.2121**',
    '2.2000 ± 0.4243',
  ]
  assert 'The best of `deepseekmoe` is at an edge' in words.text
  assert 'peak learning rate, after 3,000 steps at `--scale=tiny`, mean' in words.text
  assert learning_rates.blocks({}) == []


def test_a_sweep_of_another_length_or_size_is_none_of_this_one(tmp_path):
  """What 3,000 steps of a tiny model say of a rate is no figure of 10,000 or of a larger one."""
  known = {'gshard': {0: {arms.BITS: 1.3, 'peak_lr': 0.006}, 7: {arms.BITS: 1.0, 'peak_lr': 0.006}}}
  tried, seeds = [0.003, 0.006], [0, 1]
  found = learning_rates.read(tmp_path, 'tiny', {'gshard': 10_000}, tried, seeds, known, SWEEP)
  assert found == {'gshard': Tried('tiny', 10_000, {0.006: {0: 1.3}})}
  found = learning_rates.read(tmp_path, 'mini', {'gshard': 3000}, tried, seeds, {}, SWEEP)
  assert found == {}
  # Of the same length, what was swept is kept, and a run that is there counts before it.
  found = learning_rates.read(tmp_path, 'tiny', {'gshard': 3000}, tried, seeds, known, SWEEP)
  bits = {0.003: {0: 2.0, 1: 2.2}, 0.006: {0: 1.3, 1: 2.2}, 0.012: {0: 2.5, 1: 1.9}}
  assert found == {'gshard': Tried('tiny', 3000, bits)}
  assert learning_rates.of_runs_like(SWEEP, 'm4', 'tiny', 3000) == {}


def test_the_table_says_the_size_and_length_of_each_family(tmp_path):
  mixed = {**SWEEP, 'm4': Tried('mini', 10_000, {0.003: {0: 1.2}})}
  mixed['mla'] = Tried('', 0, {0.003: {0: 1.2}})
  words = learning_rates.blocks(mixed)[-1].text
  assert 'after 3,000 steps at `--scale=tiny` of `gshard` and `deepseekmoe`, ' in words
  assert 'after 10,000 steps at `--scale=mini` of `m4`, ' in words
  assert 'at an unknown length at an unknown scale of `mla`' in words
  path = tmp_path / learning_rates.FILE
  path.write_text(learning_rates.csv_text(mixed))
  assert learning_rates.from_csv(path) == mixed
  path.write_text('family,peak_lr,seed,bits_per_byte\ngshard,0.003,1,2.5\n')  # of an older report
  assert learning_rates.from_csv(path) == {'gshard': Tried('', 0, {0.003: {1: 2.5}})}


def test_rates_of_runs_of_another_size_or_length_are_said_to_be():
  pages = {name: arms.resolve(arms.ARMS[name], 'tiny') for name in ('gshard', 'hash', 'm4')}
  assert learning_rates.from_elsewhere(SWEEP, pages, 'tiny') == ''  # m4 has none
  words = learning_rates.from_elsewhere(SWEEP, pages, 'mini')
  assert words.startswith(
    'The peak rates are the best after 3,000 steps at `--scale=tiny`, where these runs are of '
    '3,000 steps at `--scale=mini`.'
  )
  longer = {'hash': arms.resolve(arms.ARMS['hash'], 'tiny', 10_000)}
  assert 'these runs are of 10,000 steps' in learning_rates.from_elsewhere(SWEEP, longer, 'tiny')
  assert learning_rates.from_elsewhere(SWEEP, {'m4': pages['m4']}, 'mini') == ''


def test_the_commands_train_all_runs_and_hide_the_machine():
  results = {
    'gshard': dict.fromkeys(range(5)),
    'hash': {3: None, 7: None},
    'dense': dict.fromkeys(range(5)),
    'm4': {7: None},
  }
  given = ['--scale', 'tiny', '-workdir=/some/where', '--out', '/else', '--earlier=there']
  given.append('--seeds=9')
  common = 'python -m experiments.routing_ablation --workdir=W --scale=tiny'
  assert report.commands_of(given, results, {}) == [
    f'{common} --arms=gshard,dense --seeds=5',
    f'{common} --arms=hash --seeds=3,7',
    f'{common} --arms=m4 --seeds=7,7',  # a single number says how many
  ]
  # Without their names those aside would not be trained.
  (line,) = report.commands_of(given, dict.fromkeys(arms.ARMS, {0: None}), {})
  assert line == f'{common} --arms={",".join(arms.ARMS)} --seeds=1'
  # Rates that came with earlier runs are in the report's own table; others are as they were given.
  (line,) = report.commands_of(given, {'m4': {0: None}}, SWEEP)
  assert line == f'{common} --rates_from=REPORT --arms=m4 --seeds=1'
  for flag in ('--rates_from=there', '--learning_rates=1,2,3'):
    (line,) = report.commands_of([*given, flag], {'m4': {0: None}}, SWEEP)
    assert line == f'{common} {flag} --arms=m4 --seeds=1'
