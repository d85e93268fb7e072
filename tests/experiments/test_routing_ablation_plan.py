"""What the study trains: learning rates, a budget of hours, the page of progress, failures."""

import pathlib

import pytest

from experiments.routing_ablation import __main__ as command
from experiments.routing_ablation import (
  arms,
  budget,
  measure,
  pictures,
  progress,
)
from experiments.routing_ablation import study as study_lib
from moe_jax import errors
from tests import in_process


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
  left_out = parts['switch against hash: bits_per_byte']
  assert (left_out.need, left_out.chosen) == (6, False)
  assert plan.seeds == {'gshard': 25, 'deepseekmoe': 25, 'switch': 4, 'm4': 6, 'hash': 0}
  assert plan.seconds == 4700.0
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
  assert plan.parts[0].first_look and plan.seeds == {'gshard': 2, 'deepseekmoe': 2}
  assert 'no 100 seeds' not in ''.join(budget.lines(plan, 1.0, 1))


def test_the_time_of_a_run_is_its_own_or_taken_from_its_flops():
  configs = {name: arms.resolve(arms.ARMS[name], 'tiny') for name in ('dense', 'dense_x16')}
  seconds = budget.seconds_per_run(configs, results(dense=[1.0, 2.0]))
  assert seconds['dense'] == 100.0 and seconds['dense_x16'] > 200.0
  assert budget.seconds_per_run(configs, {})['dense'] > 10.0


@pytest.fixture
def study(tmp_path, monkeypatch):
  """Calls the command with a training that writes figures at once; returns what was trained."""
  trained = []

  def train(unit, unused_page):
    seed = unit.seeds[0]
    trained.append((unit.arm, unit.cfg.optim.peak_lr, seed))
    if unit.arm in broken:
      raise broken[unit.arm]
    where = unit.workdir / unit.arm / str(seed)
    where.mkdir(parents=True, exist_ok=True)
    rate = unit.cfg.optim.peak_lr
    (where / 'done').write_text(f'{2.0 + abs(rate - 0.012) + 0.1 * seed} {rate}')

  def read(workdirs, seeds):
    found = {}
    for name, workdir in workdirs.items():
      done = {seed: workdir / name / str(seed) / 'done' for seed in seeds}
      found[name] = {
        seed: {
          **dict(zip((arms.BITS, 'peak_lr'), map(float, path.read_text().split()))),
          **{'loss': 3.0, 'step': 3000, 'max_vio': 0.1, 'train_drop_rate': 0.0},
          **{'seconds': 60.0, 'commit': 'c'},
          'curve': {'step': [1, 2], 'loss': [3.0, 2.0], 'max_vio': [1, 1], 'drop_rate': [0, 0]},
        }
        for seed, path in done.items()
        if path.exists()
      }
    return found

  broken = {}
  monkeypatch.setattr(study_lib, '_train', train)
  monkeypatch.setattr(measure, 'read', read)
  monkeypatch.setattr(
    measure, 'finished', lambda workdir, arm, seed: bool(read({arm: workdir}, [seed])[arm])
  )
  monkeypatch.setattr(measure, 'rates', lambda _, configs: dict.fromkeys(configs, 1.0))
  monkeypatch.setattr(pictures, 'draw', lambda *_: [])  # test_routing_ablation.py draws them

  def call(*words, failing=None):
    trained.clear()
    broken.clear()
    broken.update(failing or {})
    in_process.run(command, f'--workdir={tmp_path}', '--together=1', *words)
    return list(trained)

  return call


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


def test_the_best_rates_of_another_report_are_used(study, tmp_path):
  study('--arms=gshard', '--seeds=1', '--learning_rates=0.003,0.012,0.024', '--rate_seeds=1')
  given = (f'--rates_from={tmp_path / "report"}', f'--workdir={tmp_path / "other"}')
  trained = study('--arms=gshard,hash,m4', '--seeds=1', '--steps=600', *given)
  assert trained == [('gshard', 0.012, 0), ('hash', 0.012, 0), ('m4', 0.006, 0)]
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


def test_an_arm_without_the_run_that_it_starts_from_says_what_to_name(tmp_path):
  cfg = arms.resolve(arms.ARMS['upcycled'], 'tiny')
  with pytest.raises(
    errors.InputError, match='seed 0 is not in .*; name both, as in --arms=dense,upcy'
  ):
    study_lib._make_of_start(study_lib.Unit('upcycled', cfg, tmp_path, (0,)), cfg)


def test_the_time_that_is_left_is_that_of_the_steps_that_are_left():
  done = progress._Run('gshard', 0.006, 0, 'done', 1.0, 2.0, 7200.0)
  half = progress._Run('gshard', 0.006, 1, 'running', 0.25)
  other = progress._Run('hash', 0.006, 0, 'left')
  assert progress._time_left([done, half, other], 1).startswith('About 3.5 hours are left')
  assert progress._time_left([done, half, other], 2).startswith('About 1.8 hours are left')
  assert 'once a run has ended' in progress._time_left([half], 1)


def test_input_that_no_arm_can_use_stops_at_the_first(study):
  with pytest.raises(errors.InputError, match='no such text'):
    study('--arms=gshard,hash', '--seeds=2', failing={'gshard': errors.InputError('no such text')})


def test_a_budget_trains_what_it_plans(study, capsys):
  study('--arms=gshard,switch,hash', '--seeds=3')
  # gshard = switch in every run, so no number of seeds decides these; hash and dense are new.
  trained = study('--arms=gshard,switch,hash,dense', '--seeds=3', '--budget_hours=0.06')
  assert trained == [('dense', 0.006, seed) for seed in range(3)]
  said = capsys.readouterr().out
  assert 'train:    hash against dense, bits_per_byte: 0 -> 3 seeds, a first look' in said
  assert 'left out: gshard against switch, bits_per_byte: no 100 seeds' in said
