import json

import numpy as np
import pytest

from experiments.topology import __main__ as command
from experiments.topology import report, speed, study, trials
from moe_jax import errors
from moe_jax.graphs import block_model, class_losses, fit, networks
from tests import in_process

F1 = report.F1


def unit(plain, renode, **key):
  arms = {'plain': {F1: plain}, 'renode': {F1: renode}}
  for arm in arms.values():
    arm['train_accuracy'] = [1.0] * len(plain)
  key = {'graph': 'g', 'model': 'gcn', 'rate': 'constant', 'loss': 'focal', 'imbalance': 10.0} | key
  return {'key': key, 'totoro': [4.0, 3.0, 2.0, 1.0, 0.0], 'arms': arms}


def test_a_row_of_the_study_by_hand():
  # F1 falls as Totoro rises, but for one pair of ranks; the gain is the same in all splits.
  plain = [0.5, 0.6, 0.8, 0.7, 0.9]
  row = report.study_table([unit(plain, [f + 0.01 for f in plain])]).split('\n')[-1]
  assert row.startswith('| g | constant | 10 : 1 | focal | gcn | 70.0 | +1.0 [+1.0, +1.0] | conf')
  assert '| 1.00, 1.00 | -0.90 [-0.99, -0.09] |' in row


def test_verdicts_are_corrected_for_the_number_of_rows():
  # p = 0.03 by itself, and 0.07 as one of two.
  clear = unit([0.5] * 5, [0.513, 0.506, 0.52, 0.502, 0.508])
  rows = report.study_table([clear, unit([0.5] * 5, [0.51, 0.49, 0.5, 0.52, 0.48])]).split('\n')
  assert '| confirmed | not distinguishable |' in rows[2]
  assert '| confirmed | confirmed |' in report.study_table([clear])


def test_correlation_by_hand():
  # Ranks whose squared differences sum to 6: 1 - 6 * 6 / (5 * 24).
  r, low, high = trials.correlation([1, 2, 3, 4, 5], [1, 2, 5, 3, 4])
  assert r == pytest.approx(0.7)
  half = 1.959964 / np.sqrt(2)
  want = np.tanh(np.arctanh(0.7) - half), np.tanh(np.arctanh(0.7) + half)
  assert (low, high) == pytest.approx(want)
  assert report.correlation([1.0, 1.0], [1.0, 2.0]) == '-'


def test_units_of_the_study():
  found = list(study.keys(['digits', 'scipy'], ['gcn', 'gat']))
  assert len(found) == len(set(found)) == len({key.file for key in found}) == 4 + 4 + 4 + 4
  assert found[0] == study.Key('digits', 'gcn', 'constant')
  assert [key for key in found if key.imbalance > 1] == found[4:8]
  for given in ((['digit'], ['gcn']), (['digits'], ['gcm'])):
    with pytest.raises(errors.InputError, match='did you mean'):
      list(study.keys(*given))
  assert set(study.MODELS) == set(networks.NETWORKS)
  assert command.MODELS == trials.MODELS and command.LOSSES == class_losses.LOSSES


def test_the_study_reports_what_is_there_and_refuses_other_splits(tmp_path, capsys):
  workdir, out = tmp_path / 'w', tmp_path / 'out'
  for directory in (workdir, out):
    directory.mkdir()
  key = study.Key('scipy', 'gcn', 'constant')
  record = unit([0.5, 0.6, 0.7, 0.9, 0.8], [0.6, 0.6, 0.8, 0.7, 0.9], **key._asdict())
  record |= {'splits': [0, 1, 2, 3, 4], 'seeds': [0]}
  (workdir / key.file).write_text(json.dumps(record))
  readme = out / 'README.md'
  readme.write_text(f'before\n{study.START}\nold\n{study.END}\nafter\n')

  def run(splits):
    in_process.run(
      study, f'--workdir={workdir}', f'--out={out}', '--graphs=scipy', '--models=gcn',
      f'--splits={splits}', '--minutes=0.000001',
    )  # fmt: skip

  run(5)
  assert '3 of 4 units are left' in capsys.readouterr().out
  text = readme.read_text()
  assert text.startswith('before\n') and text.endswith('after\n') and 'old' not in text
  assert '| scipy | constant | even | cross entropy | gcn | 70.0 |' in text
  assert json.loads((out / 'results.json').read_text()) == [record]
  assert (out / 'gains.png').stat().st_size > 10_000
  for splits, words in ((6, 'is of 5 splits and 1 starts'), (4, '--splits=4 must be at least 5')):
    with pytest.raises(errors.InputError, match=words):
      run(splits)


def test_means_over_starts_stand_at_their_split(monkeypatch):
  """Runs are split by split; a start's number must not become a split's."""
  data = block_model.sample(60, 0, num_classes=3)
  labels = trials.Labels(4, 4)
  chosen = trials.split(data, labels, [0, 1])
  seen = {}

  def fitted(model, prepared, labels, num_classes, runs, settings, schedule, together):
    seen['runs'] = runs
    predicted = np.stack([np.full(60, 0), np.full(60, 0), labels, labels])
    numbers = np.arange(4.0)
    return fit.Fitted(predicted, numbers, numbers, numbers, numbers)

  monkeypatch.setattr(fit, 'fit', fitted)
  weights = np.stack([np.full(60, 2.0), np.full(60, 3.0)])
  found = trials.train(
    data, 'gcn', chosen, weights, [7, 8], fit.Settings(), fit.OFFICIAL, prepared=()
  )
  assert seen['runs'].seeds.tolist() == [7, 8, 7, 8]
  assert seen['runs'].weights[:, 0].tolist() == [2, 2, 3, 3]
  assert (seen['runs'].train == chosen.train[[0, 0, 1, 1]]).all()
  assert found['weighted_f1'][1] == 1 and found['weighted_f1'][0] < 0.5
  assert found['best_epoch'] == [0.5, 2.5]


def test_a_share_of_labels_without_imbalance():
  with pytest.raises(errors.InputError, match='--label_share=0.1 has no effect without'):
    in_process.run(command, '--graph=sbm:200', '--label_share=0.1')


def test_uneven_labels():
  data = block_model.sample(300, 0, num_classes=3)
  chosen = trials.split(data, trials.Labels(9, 5, imbalance=4, label_share=0.1), [0])
  # int(30 / (2 + 4)) = 5 per tail class, 20 in the one head class.
  assert np.bincount(data.labels[chosen.train[0]]).tolist() == [20, 5, 5]
  chosen = trials.split(data, trials.Labels(9, 5), [0])
  assert np.bincount(data.labels[chosen.train[0]]).tolist() == [9, 9, 9]


@pytest.mark.slow
@pytest.mark.parametrize('model', ['gcn', 'pprgo'])
def test_the_command_trains_both_arms(model, tmp_path, capsys):
  out = tmp_path / 'found.json'
  in_process.run(
    command, '--graph=sbm:300', f'--model={model}', '--renode', '--splits=4', '--seeds=1',
    '--epochs=30', '--hidden=8', '--learning_rate=0.03', f'--out={out}',
  )  # fmt: skip
  said, record = capsys.readouterr().out, json.loads(out.read_text())
  assert '| weighted_f1 |' in said and 'correlation of Totoro' in said
  assert record['arms']['plain'][F1] != record['arms']['renode'][F1]
  assert min(record['arms']['renode'][F1]) > 0.4  # chance is 0.2


def test_lines_and_picture_of_speed(tmp_path):
  row = {'nodes': 1000, 'edges': 2000, speed.SPARSE: 0.01, speed.POWER: 0.02, speed.PUSH: 0.1}
  with_dense = row | {speed.DENSE: 0.05, speed.EXACT: 0.2}
  found = speed.line(with_dense)
  assert found.startswith('1,000 nodes, 2,000 edges; epoch, edges 10.0 ms (dense 50.0 ms, 5.0 t')
  assert 'Totoro, pushed rows 100.0 ms (dense 200.0 ms, 2.0 times)' in found
  assert 'dense ' not in speed.line(row)
  speed.draw([with_dense, row | {'nodes': 3000}], tmp_path / 'speed.png')
  assert (tmp_path / 'speed.png').stat().st_size > 10_000
