"""What the ablation reports of a workdir that several calls have trained in."""

import json
import pathlib

import pytest

from experiments.routing_ablation import arms, earlier, finished, measure
from moe_jax import errors


def report_of(tmp_path: pathlib.Path) -> str:
  return (tmp_path / 'report' / 'report.md').read_text()


def arms_of(text: str) -> dict[str, str]:
  """The arms of a report and their numbers of seeds."""
  table = text.split('## Arms')[1].split('## Do')[0]
  rows = [row.split(' | ') for row in table.splitlines() if row.startswith('| `')]
  return {row[0].strip('| `'): row[2] for row in rows if len(row) > 8}


def test_a_report_has_the_arms_of_every_call(study, tmp_path):
  """And grades claims across them; nothing is trained again, of seeds neither."""
  assert study('--arms=gshard', '--seeds=3') == [('gshard', 0.006, seed) for seed in range(3)]
  assert study('--arms=deepseekmoe', '--seeds=5,1')[0] == ('deepseekmoe', 0.006, 5)
  assert '`deepseekmoe` against `gshard`' in report_of(tmp_path)
  assert study('--arms=hash', '--seeds=1') == [('hash', 0.006, 0)]
  assert arms_of(report_of(tmp_path)) == {'gshard': '3', 'deepseekmoe': '2', 'hash': '1'}
  assert study('--arms=gshard', '--seeds=1') == []  # its other seeds stay
  assert arms_of(report_of(tmp_path)) == {'gshard': '3', 'deepseekmoe': '2', 'hash': '1'}


def test_runs_of_other_settings_are_left_out_and_named(study, tmp_path, capsys):
  study('--arms=gshard,hash', '--seeds=2', '--steps=300')
  study('--arms=gshard', '--seeds=7,8')
  assert arms_of(report_of(tmp_path)) == {'gshard': '2'}
  said = capsys.readouterr().out
  assert 'left out of the report: gshard seed 0,1; hash seed 0,1: trained with other sett' in said
  assert 'train.num_steps: 300 -> 3000' in said
  with pytest.raises(errors.InputError, match='gshard/1 holds a run of another config'):
    study('--arms=gshard', '--seeds=2,1')
  # Nor does a budget count them.
  with pytest.raises(errors.InputError, match='hash/0 holds a run of another config'):
    study('--arms=hash,dense', '--seeds=2', '--budget_hours=9')


def test_runs_that_lack_figures_or_a_record_are_left_out(study, tmp_path, capsys, monkeypatch):
  study('--arms=gshard,hash,dense', '--seeds=1')
  done = measure.finished
  monkeypatch.setattr(
    measure, 'finished', lambda w, arm, seed: arm != 'hash' and done(w, arm, seed)
  )
  (tmp_path / 'dense/0/config.json').write_text('{')
  (tmp_path / 'switch/0').mkdir(parents=True)  # was stopped in its first steps
  (tmp_path / 'gshard/together').mkdir()
  study('--arms=gshard', '--seeds=1')
  assert arms_of(report_of(tmp_path)) == {'gshard': '1'}
  said = capsys.readouterr().out
  assert 'hash seed 0: lacks figures, which a call with this arm and seed adds' in said
  assert 'dense seed 0: trained with other settings, its config.json cannot be read' in said
  assert 'switch' not in said.split('left out')[1]


RATES = '--learning_rates=0.003,0.012,0.024'


def test_arms_of_another_call_have_the_rate_of_their_family(study, tmp_path, capsys):
  study('--arms=hash', '--seeds=2', RATES, '--rate_seeds=1')
  # GShard's seed 0 at the best rate is a run like any other.
  assert arms_of(report_of(tmp_path)) == {'gshard': '1', 'hash': '2'}
  study('--arms=m2', '--seeds=2', RATES, '--rate_seeds=1')
  text = report_of(tmp_path)
  assert arms_of(text) == {'gshard': '1', 'hash': '2', 'm4': '1', 'm2': '2'}
  assert '| `gshard` | 2.0090 | **2.0000** | 2.0120 |' in text  # its sweep is whole here
  assert 'left out' not in capsys.readouterr().out
  # At other rates, or with more seeds, its family would have to be swept again.
  study('--arms=m2', '--seeds=2', RATES, '--rate_seeds=2')
  assert arms_of(report_of(tmp_path)) == {'m4': '2', 'm2': '2'}
  said = capsys.readouterr().out
  assert 'left out of the report: hash: gshard, whose rate it has, is not swept like this' in said
  # With the rates of a report: those of the workdir that were trained at them.
  study('--arms=mla', '--seeds=1', f'--rates_from={tmp_path / "report"}')
  assert arms_of(report_of(tmp_path)) == {'m4': '2', 'm2': '2', 'mla': '1'}
  assert 'hash seed 0,1: trained with other settings, optim.peak_lr' in capsys.readouterr().out


def test_a_sweep_of_other_settings_gives_no_rate(study, tmp_path, capsys):
  study('--arms=hash', '--seeds=1', RATES, '--rate_seeds=1', '--steps=300')
  study('--arms=m4', '--seeds=1', RATES, '--rate_seeds=1')
  assert arms_of(report_of(tmp_path)) == {'m4': '1'}
  said = capsys.readouterr().out
  assert 'hash: gshard, whose rate it has, is not swept like this' in said


def test_runs_with_and_without_rates_are_not_mixed(study, tmp_path, capsys):
  study('--arms=hash', '--seeds=2')
  study('--arms=gshard', '--seeds=1', '--learning_rates=0.003,0.006,0.0061', '--rate_seeds=1')
  text, said = report_of(tmp_path), capsys.readouterr().out
  assert arms_of(text) == {'gshard': '1'}
  assert 'hash seed 0,1: trained with other settings, optim.peak_lr: 0.006 -> 0.0061' in said
  page = {'hash': arms.resolve(arms.ARMS['hash'], 'tiny')}
  found, lines = finished.read(tmp_path, page, {'hash': tmp_path / 'rates/0.006'})
  assert found == {} and f'hash seed 0,1: lies in {tmp_path}, where runs with' in lines[0]


def test_an_earlier_report_stands_beside_the_workdir(study, tmp_path):
  study('--arms=gshard', '--seeds=3', f'--workdir={tmp_path / "there"}')
  study('--arms=hash', '--seeds=2')
  before = f'--earlier={tmp_path / "there" / "report"}'
  assert study('--arms=gshard', '--seeds=4', before) == [('gshard', 0.006, 3)]
  assert arms_of(report_of(tmp_path)) == {'gshard': '4', 'hash': '2'}


def test_arms_that_come_later_are_timed_beside_one_of_before(tmp_path, monkeypatch):
  calls, speed = [], {'gshard': 100.0, 'hash': 200.0}

  def timed(configs):
    calls.append(list(configs))
    return {name: speed[name] for name in configs}

  monkeypatch.setattr(measure.step_rates, 'tokens_per_second', timed)
  assert measure.rates(tmp_path, {'hash': None}, {}) == {'hash': 200.0}
  both = {'gshard': None, 'hash': None}
  assert measure.rates(tmp_path, both, {}) == {'gshard': 100.0, 'hash': 200.0}
  speed |= {'gshard': 50.0, 'm4': 30.0}  # the machine is busy now
  both = {'hash': None, 'gshard': None, 'm4': None}
  assert measure.rates(tmp_path, both, {}) == {'hash': 200.0, 'gshard': 100.0, 'm4': 60.0}
  assert calls == [['hash'], ['hash', 'gshard'], ['gshard', 'm4']]
  assert measure.rates(tmp_path, {'hash': None}, {}) == {'hash': 200.0} and len(calls) == 3
  assert set(json.loads((tmp_path / 'speed.json').read_text())) == {'hash', 'gshard', 'm4'}
  # A report from a machine four times as fast: nothing of it is timed again.
  known = {'hash': 800.0, 'm2': 500.0}
  three = {'hash': None, 'm4': None, 'm2': None}
  assert measure.rates(tmp_path, three, known) == {'hash': 800.0, 'm4': 240.0, 'm2': 500.0}
  assert len(calls) == 3
  # Without a common arm, what was timed here is timed again beside one of the report's.
  speed |= {'m2': 10.0}
  found = measure.rates(tmp_path, {'m4': None, 'm2': None}, {'m2': 500.0})
  assert found == {'m4': 1500.0, 'm2': 500.0} and calls[3:] == [['m2', 'm4']]


def test_speeds_of_an_earlier_report(tmp_path):
  (tmp_path / 'results.csv').write_text(
    'arm,seed,tokens_per_second\ngshard,0,100\ngshard,1,100\nhash,0,250\n'
  )
  assert earlier.speeds(tmp_path) == {'gshard': 100.0, 'hash': 250.0}
  (tmp_path / 'results.csv').write_text('arm,seed\ngshard,0\n')  # of an older report
  assert earlier.speeds(tmp_path) == {}
