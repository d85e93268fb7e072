"""The commands of federated training: report, comparison, timing."""

import json

import numpy as np
import pytest

from experiments.federated import __main__ as command
from experiments.federated import comparison, pictures, report, study, timing
from moe_jax import errors
from moe_jax.federated import run, settings
from tests import in_process


def test_the_report_has_groups_and_classes(tmp_path):
  right = np.stack([np.full((2, 10), 5), np.tile([10] * 7 + [4] * 3, (2, 1))])
  curve = run.Curve(np.array([10, 20]), right, np.full(10, 20))
  said = report.write(settings.resolve(settings.Settings()), [0, 1], curve, tmp_path)
  # Half of seven classes, a fifth of three: 0.41.
  assert 'balanced 41.0 ± 0.0 %, head 50.0 ± 0.0 %, middle 50.0' in said and 'tail 20.0' in said
  text = (tmp_path / 'report.md').read_text()
  assert 'redgrape on digits' in text and '| 9 | 20 | 20.0 |' in text
  assert json.loads((tmp_path / 'results.json').read_text())['right'] == right.tolist()
  assert (tmp_path / 'curve.png').stat().st_size > 5000


def made(shift: float) -> dict:
  """Accuracies of two seeds after 10 and 20 rounds."""
  return {
    group: {'10': [10.0, 20.0], '20': [50.0 + shift, 60.0 + shift + (group == 'tail')]}
    for group in ('balanced', 'head', 'middle', 'tail')
  }


def results() -> dict:
  easy, hard = comparison.Setting(10, 1), comparison.Setting(100, 0.1)
  return {
    ('fedavg', easy): made(0), ('redgrape', easy): made(4),
    ('fedavg', hard): made(-20), ('redgrape', hard): made(-18),
  }  # fmt: skip


def test_tables_pair_by_seed_and_setting():
  text = comparison.tables(results())
  assert '| balanced / tail accuracy, % | IR, alpha 10 / 1 | IR, alpha 100 / 0.1 |' in text
  assert '| redgrape | 59.0 / 59.5 | 37.0 / 37.5 |' in text
  # By setting 4 and 2 points in both seeds; 3 on the mean over settings.
  assert '| fedavg | +4.0 [+4.0, +4.0] | +2.0 [+2.0, +2.0] |' in text
  assert '| RedGrape beats FedAvg | balanced | +3.0 [+3.0, +3.0] | confirmed |' in text
  assert 'creff' not in text.lower()


def test_pictures(tmp_path):
  pictures.draw(tmp_path, results())
  assert (tmp_path / 'comparison.png').stat().st_size > 5000
  assert (tmp_path / 'curves.png').stat().st_size > 5000


def test_what_is_asked_for_wrongly():
  for module, arguments, words in (
    (study, ['--workdir=x', '--methods=fedavg,redgrap'], "did you mean 'redgrape'"),
    (study, ['--workdir=x', '--alphas=high'], '--alphas=high must be numbers'),
    (study, ['--methods=fedavg'], '--workdir is missing'),
    (command, ['--workdir=x', '--clients_per_round=11'], 'must be at most --clients=10'),
    (command, ['--workdir=x', '--dataset=mnist'], '--data_dir is missing'),
  ):
    with pytest.raises(errors.InputError, match=words):
      in_process.run(module, *arguments)


def test_the_table_of_speed():
  seconds = {
    name: {'clock': 0.1 / n, 'processor': 0.2 / n} for n, name in enumerate(timing.NAMES, 1)
  }
  text = timing.table({'seconds': seconds, 'seeds': 5})
  assert '| loop over clients | 50.0 | 2.0 | 100.0 | 2.0 |' in text
  assert '| one program, 5 seeds | 25.0 | 4.0 | 50.0 | 4.0 |' in text


@pytest.mark.slow
def test_all_commands_on_digits(tmp_path, capsys):
  small = ['--rounds=2', '--epochs=1', '--imbalance=10', '--seeds=2', '--every=1']
  for _ in range(2):  # the second call finds everything done
    in_process.run(command, f'--workdir={tmp_path / "one"}', '--method=fedavg', *small)
    assert 'balanced' in capsys.readouterr().out
  small = ['--rounds=2', '--epochs=1', '--seeds=2', '--imbalances=10', '--alphas=1', '--every=2']
  out = f'--out={tmp_path / "out"}'
  in_process.run(study, f'--workdir={tmp_path / "many"}', '--methods=fedavg,redgrape', out, *small)
  assert '| RedGrape beats FedAvg | balanced |' in capsys.readouterr().out
  record = json.loads((tmp_path / 'out/results.json').read_text())
  assert set(record['runs']) == {'fedavg 10_1', 'redgrape 10_1'}
  found = timing.measure(settings.resolve(settings.Settings(epochs=1)), 2, 1)
  assert set(found['seconds']) == set(timing.NAMES)
  assert all(s['clock'] > 0 for s in found['seconds'].values())
