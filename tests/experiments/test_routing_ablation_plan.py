"""What the study trains: learning rates, a budget of hours, the page of progress, failures."""

import pathlib

import pytest

from experiments.common import local_jobs
from experiments.routing_ablation import (
  arms,
  budget,
  measure,
  progress,
)
from experiments.routing_ablation import study as study_lib
from moe_jax import errors


def results(**bits):
  return {
    name: {s: {arms.BITS: value, 'seconds': 100.0} for s, value in enumerate(values)}
    for name, values in bits.items()
  }


def test_a_budget_is_spent_on_claims_in_their_order():
  """One is decided, one needs more seeds, one was not looked at; the last does not fit."""
  found = results(
    gshard=[2.0, 2.0, 2.0, 2.0],
    deepseekmoe=[2.1, 1.9, 1.8, 1.9],  # -0.075 with a deviation of 0.126
    switch=[2.3, 2.31, 2.3, 2.29],
    m4=[1.9],
  )
  asked = [*found, 'hash']
  seconds = dict.fromkeys(asked, 100.0) | {'hash': 1000.0}
  plan = budget.plan(asked, found, seconds, available=5000.0, first=6)
  parts = {part.claim.name: part for part in plan.parts}
  main = parts['deepseekmoe against gshard: bits_per_byte']
  assert (main.have, main.need, main.chosen) == (4, 25, True) and main.seconds == 2 * 21 * 100
  m4 = parts['m4 against gshard: bits_per_byte']
  assert (m4.have, m4.need, m4.first_look, m4.seconds) == (1, 6, True, 500.0)  # gshard has 25
  switch = parts['gshard against switch: bits_per_byte']
  assert (switch.need, switch.seconds, switch.chosen) == (4, 0.0, True)
  planned = {'gshard': 25, 'deepseekmoe': 25, 'switch': 4, 'm4': 6, 'hash': 0}
  left_out = parts['switch against hash: bits_per_byte']
  assert (left_out.need, left_out.chosen) == (6, False)
  assert {name: list(range(n)) for name, n in planned.items()} == plan.seeds
  assert plan.seconds == 4700.0 and plan.rest == []
  said = '\n'.join(budget.lines(plan, 1.5, 1))
  assert 'decided:  gshard against switch' in said and 'left out: switch against hash' in said
  assert 'train:    deepseekmoe against gshard, bits_per_byte: 4 -> 25 seeds' in said


def test_what_no_number_of_seeds_decides_is_left_out():
  found = results(gshard=[2.0, 2.0, 2.0], deepseekmoe=[2.2, 1.8001, 2.0])
  plan = budget.plan(list(found), found, dict.fromkeys(found, 1.0), available=1e9, first=3)
  assert plan.seconds == 0 and plan.parts[0].need is None
  assert 'no 100 seeds decide it by the 3' in budget.lines(plan, 1.0, 1)[1]


def test_one_pair_asks_for_another():
  found = results(gshard=[2.0], deepseekmoe=[1.9])
  plan = budget.plan(list(found), found, dict.fromkeys(found, 1.0), available=1e9, first=1)
  assert plan.parts[0].first_look and plan.seeds == {'gshard': [0, 1], 'deepseekmoe': [0, 1]}
  assert 'no 100 seeds' not in ''.join(budget.lines(plan, 1.0, 1))


def planned(asked, found, first=5, available=1e9, **more):
  return budget.plan(asked, found, dict.fromkeys(arms.ARMS, 3600.0), available, first, **more)


def test_an_arm_is_planned_with_the_runs_that_it_starts_from():
  asked = ['gshard', 'dense', 'upcycled']
  plan = planned(asked, {})
  assert plan.seeds == dict.fromkeys(asked, [0, 1, 2, 3, 4]) and plan.seconds == 15 * 3600
  assert planned(asked, {}, available=14.5 * 3600).seconds == 0.0  # with `dense` it does not fit
  # Runs of an earlier report have no checkpoints here: other seeds of `dense` are trained.
  found = results(gshard=[2.0] * 8, dense=[2.5] * 3)
  plan = planned(asked, found, elsewhere={'dense': {0, 1, 2}})
  assert plan.seeds['upcycled'] == [3, 4, 5, 6, 7] and plan.seeds['dense'] == [*range(8)]
  plan = planned(asked, found)  # here they have, so that only two are to be trained
  assert plan.seeds['upcycled'] == [*range(5)] == plan.seeds['dense'] and plan.seconds == 7 * 3600


def test_an_arm_without_the_arm_that_it_starts_from_is_left_out():
  plan = planned(['gshard', 'upcycled'], {})
  assert plan.seeds == {'gshard': [], 'upcycled': []}
  (line,) = budget.lines(plan, 1.0, 1)[1:]
  assert '0 -> 5 seeds: upcycled starts from runs of dense, which is not among --arms' in line


def test_a_plan_is_over_seed_numbers():
  """A gap is filled, nothing that is there is left, and what one arm has is not trained again."""
  runs = results(gshard=[2.0, 2.1, 0, 2.0, 2.1], deepseekmoe=[2.1, 2.0, 0, 2.1, 2.2])
  for one in runs.values():
    del one[2]
  plan = planned(list(runs), runs, first=7)
  assert plan.parts[0].have == 4 and 4 < plan.parts[0].need <= 100
  assert plan.seeds['gshard'] == list(range(plan.parts[0].need))
  assert plan.seconds == 2 * 3600 * (plan.parts[0].need - 4)
  late = {'gshard': {seed: runs['gshard'][0] for seed in (5, 6, 300)}}
  plan = planned(['gshard', 'deepseekmoe'], late, first=4)
  assert plan.seeds == {'gshard': [0, 5, 6, 300], 'deepseekmoe': [0, 5, 6, 300]}
  assert plan.seconds == 5 * 3600


def test_an_arm_that_is_there_counts_though_it_is_not_asked_for():
  runs = results(switch=[2.0, 2.1])
  plan = planned(['hash'], runs, first=2)
  assert plan.seeds == {'hash': [0, 1]} and plan.seconds == 2 * 3600
  plan = planned(['hash'], runs, first=3)
  assert plan.seeds == {'hash': []}
  assert '0 -> 3 seeds: switch is not among --arms and has 2' in budget.lines(plan, 1.0, 1)[1]


def test_sweeps_are_planned_as_claims_are():
  asked = ['m2', 'm4', 'm8', 'm16']
  plan = planned(asked, {}, first=3)
  assert plan.seeds == dict.fromkeys(asked, [0, 1, 2]) and plan.seconds == 12 * 3600
  assert 'granularity, slope through m2, m4, m8, m16: 0 -> 3 seeds' in budget.lines(plan, 1, 1)[1]
  found = results(m2=[2.0, 2.1, 2.2], m4=[1.9, 2.0, 2.1], m8=[1.8, 1.9, 2.0001])
  plan = planned(['m2', 'm8'], found, first=3)  # -0.1 per doubling in every seed
  assert budget.lines(plan, 1, 1)[1].endswith('slope through m2, m4, m8: by 3 seeds')
  found = results(m2=[2.0, 2.0, 2.0], m4=[2.0, 2.1, 2.0], m8=[2.1, 1.9, 1.9])
  plan = planned(['m2', 'm4', 'm8'], found, first=3)
  (part,) = plan.parts  # slopes 0.05, -0.05, -0.05
  assert part.have == 3 and 80 < part.need <= 100 and part.chosen
  assert plan.seconds == part.seconds == 3 * (part.need - 3) * 3600
  plan = planned(asked, found, first=3)  # m16 has no run yet
  assert plan.parts[0].first_look and plan.seeds['m16'] == [0, 1, 2] and plan.seconds == 3 * 3600


def test_arms_that_nothing_is_planned_for_are_named():
  plan = planned(['m8', 'm16', 'e15', 'e127', 'v3', 'mla'], results(m8=[2.0]), first=3)
  assert plan.seconds == 0.0
  said = budget.lines(plan, 1.0, 1)
  assert said[1:] == [
    f'  left out: {arm}: {why}; without --budget_hours {more} seeds take {more}.0 hours'
    for arm, why, more in (
      ('m8', 'the sweep granularity needs 3 of m2, m4, m8, m16', 2),
      ('m16', 'the sweep granularity needs 3 of m2, m4, m8, m16', 3),
      ('e15', 'the sweep experts needs 3 of e15, e31, m4, e127', 3),
      ('e127', 'the sweep experts needs 3 of e15, e31, m4, e127', 3),
      ('v3', 'no claim or sweep has it', 3),
      ('mla', 'its claims need mha', 3),
    )
  ]


def test_the_time_of_a_run_is_its_own_or_taken_from_its_flops():
  configs = {name: arms.resolve(arms.ARMS[name], 'tiny') for name in ('dense', 'dense_x16')}
  seconds = budget.seconds_per_run(configs, results(dense=[1.0, 2.0]))
  assert seconds['dense'] == 100.0 and seconds['dense_x16'] > 200.0
  assert budget.seconds_per_run(configs, {})['dense'] > 10.0


def report_of(tmp_path: pathlib.Path) -> str:
  return (tmp_path / 'report' / 'report.md').read_text()


def test_rates_are_tried_first_and_the_best_is_trained_with_all_seeds(study, tmp_path):
  words = ('--arms=gshard,hash', '--seeds=2', '--learning_rates=0.003,0.012,0.024')
  trained = study(*words, '--rate_seeds=1')
  swept = [('gshard', rate, 0) for rate in (0.003, 0.012, 0.024)]
  rest = [('hash', 0.012, 0), ('gshard', 0.012, 1), ('hash', 0.012, 1)]
  assert trained == swept + rest  # gshard's seed 0 at the best rate is there already
  assert '| `gshard` | 2.0090 | **2.0000** | 2.0120 |' in report_of(tmp_path)
  assert '| `hash` | 0 shared + 1 of 16 by token id: Hash Layer | 2 | 0.012 |' in report_of(
    tmp_path
  )
  assert study(*words, '--rate_seeds=1') == []


def test_runs_of_an_earlier_report_are_tried_rates_too(study, tmp_path):
  study('--arms=gshard,hash', '--seeds=3', f'--out={tmp_path / "first"}')  # both at 0.006
  trained = study(
    *('--arms=gshard', '--seeds=3', '--learning_rates=0.003,0.006,0.012', '--rate_seeds=2'),
    *(f'--earlier={tmp_path / "first"}', f'--workdir={tmp_path / "other"}'),
  )
  # The report has 0.006. The best is another one, so that its runs stand in the table alone.
  swept = [('gshard', rate, seed) for seed in (0, 1) for rate in (0.003, 0.012)]
  assert trained == [*swept, ('gshard', 0.012, 2)]
  text = report_of(tmp_path / 'other')
  assert '| `gshard` | 2.0590 ± 0.0707 | 2.0560 ± 0.0707 | **2.0500 ± 0.0707** |' in text
  assert '| 3 | 0.012 | 2.1000 ± 0.1000 |' in text and '`hash`' not in text
  # That report again gives its sweep, of which the runs at the other rates are no more.
  again = (f'--earlier={tmp_path / "other" / "report"}', f'--workdir={tmp_path / "third"}')
  words = ('--arms=gshard', '--seeds=4', '--learning_rates=0.003,0.006,0.012', '--rate_seeds=2')
  assert study(*words, *again) == [('gshard', 0.012, 3)]
  # Other rates beside it leave those that were tried in the table.
  more = [word.replace('0.003,0.006,0.012', '0.012,0.024,0.048') for word in words]
  study(*more, *again)
  assert '| family | 0.003 | 0.006 | 0.012 | 0.024 | 0.048 |' in report_of(tmp_path / 'third')
  study(*words, *again)
  assert text.split('## Learning rates')[1].split('## Do')[0] in report_of(tmp_path / 'third')


def test_the_best_rates_of_another_report_are_used(study, tmp_path, capsys):
  study('--arms=gshard', '--seeds=1', '--learning_rates=0.003,0.012,0.024', '--rate_seeds=1')
  given = (f'--rates_from={tmp_path / "report"}', f'--workdir={tmp_path / "other"}')
  trained = study('--arms=gshard,hash,m4', '--seeds=1', '--steps=600', *given)
  assert trained == [('gshard', 0.012, 0), ('hash', 0.012, 0), ('m4', 0.006, 0)]
  said = (
    'The peak rates are the best after 3,000 steps at `--scale=tiny`, where these runs are of 600'
  )
  assert said in capsys.readouterr().out
  assert said in (tmp_path / 'other' / 'report' / 'report.md').read_text()
  assert 'The peak rates' not in (tmp_path / 'report' / 'report.md').read_text()
  with pytest.raises(errors.InputError, match='--rates_from=.*has no rates.csv'):
    study('--arms=gshard', '--seeds=1', f'--rates_from={tmp_path / "rates"}')
  with pytest.raises(errors.InputError, match='cannot both be given'):
    study('--arms=gshard', '--learning_rates=1,2,3', f'--rates_from={tmp_path / "report"}')


def test_a_dry_run_counts_the_runs_of_the_rates(study, capsys):
  trained = study('--arms=gshard,hash,m4', '--learning_rates=0.003,0.006,0.012', '--dry_run')
  assert trained == [] and '12 runs of gshard, m4 come first' in capsys.readouterr().out


def test_an_arm_that_fails_does_not_stop_the_others_and_is_named(study, tmp_path):
  words = ('--arms=gshard,switch,hash', '--seeds=2')
  with pytest.raises(errors.InputError, match='2 of 6 did not end.*switch seed 0; switch seed 1'):
    study(*words, failing={'switch': FloatingPointError('the loss is nan')})
  assert 'the loss is nan' in (tmp_path / 'switch/0' / progress.FAILURE).read_text()
  text = report_of(tmp_path)
  assert '| `gshard` |' in text and '`switch` |' not in text
  page = (tmp_path / 'progress' / 'report.md').read_text()
  assert page.startswith('# 4 of 6 runs done') and '| `switch` | 0.006 |  |  | 0 |' not in page
  assert '| `switch` | 0.006 |  |  | 0, 1 |  |' in page
  assert study(*words) == [('switch', 0.006, 0), ('switch', 0.006, 1)]
  assert '| `switch` |' in report_of(tmp_path)


def test_an_arm_that_starts_from_another_one_follows_it_in_one_process(study, tmp_path):
  trained = study('--arms=upcycled,gshard,dense', '--seeds=2')
  starts = [(arm, seed) for arm, _, seed in trained if arm != 'gshard']
  assert starts == [('dense', 0), ('upcycled', 0), ('dense', 1), ('upcycled', 1)]
  page = arms.resolve(arms.ARMS['upcycled'], 'tiny')

  def unit(arm, *seeds, workdir=tmp_path):
    return study_lib.Unit(arm, page, workdir, seeds)

  dense, other = unit('dense', 0, 1), unit('upcycled', 2)
  rate = unit('upcycled', 1, workdir=tmp_path / 'rates')
  found = study_lib._chains([unit('upcycled', 1), other, rate, dense, unit('gshard', 1)])
  assert found == [[dense, unit('upcycled', 1)], [unit('gshard', 1)], [other], [rate]]


def test_an_arm_without_the_runs_that_it_starts_from_is_refused_first(study, tmp_path):
  with pytest.raises(
    errors.InputError,
    match='--seeds=0,1 are not in .*dense; name both, as in --arms=dense,upcycled, or leave',
  ):
    study('--arms=gshard,upcycled', '--seeds=2')
  assert not list(tmp_path.glob('*/*/result.json'))
  study('--arms=dense', '--seeds=2')  # enough, whichever call trained it
  assert study('--arms=upcycled', '--seeds=2') == [('upcycled', 0.006, seed) for seed in (0, 1)]
  # In the report there are figures, but nothing to start from.
  words = (f'--earlier={tmp_path / "report"}', f'--workdir={tmp_path / "other"}', '--seeds=3')
  (tmp_path / 'report/results.csv').write_text(
    ''.join(
      line
      for line in (tmp_path / 'report/results.csv').read_text().splitlines(keepends=True)
      if not line.startswith('upcycled')
    )
  )
  with pytest.raises(errors.InputError, match='--seeds=0,1 are in --earlier alone, without ch'):
    study('--arms=dense,upcycled', *words)
  assert study('--arms=dense', '--seeds=2', words[1])
  assert ('upcycled', 0.006, 1) in study('--arms=dense,upcycled', *words)


def test_an_arm_whose_start_failed_says_so(tmp_path):
  cfg = arms.resolve(arms.ARMS['upcycled'], 'tiny')
  with pytest.raises(errors.InputError, match='dense/0, which has not ended; failure.txt there'):
    study_lib._make_of_start(study_lib.Unit('upcycled', cfg, tmp_path, (0,)), cfg)


def test_a_budget_trains_what_an_arm_starts_from(study, tmp_path):
  trained = study('--arms=gshard,dense,upcycled', '--seeds=2', '--budget_hours=9')
  starts = [(arm, seed) for arm, _, seed in trained if arm != 'gshard']
  assert starts == [('dense', 0), ('upcycled', 0), ('dense', 1), ('upcycled', 1)]


def test_the_time_that_is_left_is_that_of_the_steps_that_are_left():
  done = progress._Run('gshard', 0.006, 0, 'done', 1.0, 2.0, 7200.0)
  half = progress._Run('gshard', 0.006, 1, 'running', 0.25)
  other = progress._Run('hash', 0.006, 0, 'left')
  assert progress._time_left([done, half, other], 1).startswith('About 3.5 hours are left')
  assert progress._time_left([done, half, other], 2).startswith('About 1.8 hours are left')
  assert 'once a run has ended' in progress._time_left([half], 1)
  # Of an arm without any the family's: hash takes what gshard takes, m4 the mean.
  slow = progress._Run('loss_free', 0.006, 0, 'done', 1.0, 2.0, 3 * 7200.0)
  m4 = progress._Run('m4', None, 0, 'left')
  assert progress._time_left([done, slow, other], 1).startswith('About 2.0 hours are left')
  assert progress._time_left([done, slow, m4], 1).startswith('About 4.0 hours are left')


def test_the_page_of_a_sweep_counts_the_runs_that_follow(study, tmp_path):
  words = ('--arms=gshard,hash,m4', '--seeds=3', '--learning_rates=0.003,0.006,0.012')
  words += ('--rate_seeds=1',)
  with pytest.raises(errors.InputError, match='--learning_rates: m4 at 0.003.*did not end'):
    study(*words, failing={'m4': FloatingPointError('nan')})
  page = (tmp_path / 'progress' / 'report.md').read_text()
  # Six of the sweep; then three of hash, and two of each arm that was swept with seed 0.
  assert page.startswith('# 3 of 13 runs done')
  assert '| `hash` | best |  |  |  | 0, 1, 2 |' in page
  assert '| `gshard` | best |  |  |  | 1, 2 |' in page and '| `gshard` | 0.006 | 0: 2.0' in page
  assert 'About 0.2 hours are left' in page and '7 of these runs follow at the best' in page
  with pytest.raises(errors.InputError, match='did not end'):
    study(*words, '--budget_hours=9', failing={'m4': FloatingPointError('nan')})
  page = (tmp_path / 'progress' / 'report.md').read_text()
  assert page.startswith('# 3 of 6 runs') and 'Then follows what --budget_hours=9 plans' in page


def test_input_that_no_arm_can_use_stops_at_the_second(study, tmp_path):
  wrong = errors.InputError('no such text')
  with pytest.raises(errors.InputError, match='no such text'):
    study('--arms=gshard,hash,switch', '--seeds=2', failing={'gshard': wrong, 'hash': wrong})
  assert not (tmp_path / 'switch').exists()
  with pytest.raises(errors.InputError, match='no such text'):
    study('--arms=gshard', '--seeds=2', failing={'gshard': wrong})


def test_input_that_one_arm_cannot_use_stops_no_other(study, tmp_path, monkeypatch):
  wrong = {'gshard': errors.InputError('its page is wrong')}
  with pytest.raises(errors.InputError, match='2 of 4 did not end.*gshard seed 0; gshard seed 1'):
    study('--arms=gshard,hash', '--seeds=2', failing=wrong)
  assert '`hash`' in report_of(tmp_path)
  # Nor does it end a process of --jobs, which has every second run of both.
  monkeypatch.setattr(local_jobs, '_wait_for_the_others', lambda: None)
  words = ('--arms=gshard,switch,hash', '--seeds=3', '--jobs=2', '--shard=0')
  assert study(*words, failing=wrong) == [
    ('gshard', 0.006, 0),
    ('gshard', 0.006, 1),
    ('gshard', 0.006, 2),
    ('hash', 0.006, 2),
  ]


def test_a_process_that_fails_costs_no_report(study, tmp_path, monkeypatch):
  study('--arms=gshard', '--seeds=2')
  (tmp_path / 'report/report.md').unlink()

  def run(unused_module, pending, train, more):
    for one in pending[::2]:
      train(one)
    raise local_jobs.ShardError('a shard failed')

  monkeypatch.setattr(local_jobs, 'run', run)
  words = ('--arms=gshard,hash', '--seeds=2', '--jobs=2')
  with pytest.raises(errors.InputError, match='1 of 4 did not end.*hash seed 1'):
    study(*words)
  assert '`hash` | 0 shared + 1 of 16 by token id: Hash Layer | 1 |' in report_of(tmp_path)
  with pytest.raises(errors.InputError, match='a shard failed'):
    study(*words)  # all has ended, and yet a process said that it had not


def test_a_budget_trains_seeds_that_are_not_there(study, tmp_path):
  study('--arms=gshard,hash', '--seeds=5,6')
  trained = study('--arms=gshard,hash,switch', '--seeds=3', '--budget_hours=9')
  seeds = {'gshard': [0], 'hash': [0], 'switch': [0, 5, 6]}
  assert sorted(trained) == [(arm, 0.006, seed) for arm, own in seeds.items() for seed in own]
  text = report_of(tmp_path)
  assert text.count(' | 3 | 0.006 |') == 3  # 0, 5 and 6 of each


def test_seeds_that_are_trained_join_no_group(tmp_path):
  path = measure.path(tmp_path, 'gshard', 1)
  path.parent.mkdir(parents=True)
  path.write_text('{}')
  assert study_lib._groups('gshard', tmp_path, [0, 1, 2]) == [[1], [0, 2]]
  assert study_lib._groups('hash', tmp_path, [0, 1, 2]) == [[0, 1, 2]]
  assert study_lib._groups('upcycled', tmp_path, [0, 1]) == [[0], [1]]


def test_a_budget_trains_what_it_plans(study, capsys):
  study('--arms=gshard,switch,hash', '--seeds=3')
  # gshard = switch in every run, so no number of seeds decides these; hash and dense are new.
  trained = study('--arms=gshard,switch,hash,dense', '--seeds=3', '--budget_hours=0.06')
  assert trained == [('dense', 0.006, seed) for seed in range(3)]
  said = capsys.readouterr().out
  assert 'train:    hash against dense, bits_per_byte: 0 -> 3 seeds, a first look' in said
  assert 'left out: gshard against switch, bits_per_byte: no 100 seeds' in said
