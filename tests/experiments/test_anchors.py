import json
import math

import pytest

from experiments.anchors import __main__ as command
from experiments.anchors import claims, report, runs, study, tables
from moe_jax import errors
from moe_jax.api import load
from tests import in_process

CHANCE = 0.25


def compression(best_random):
  arms = {'hidden_anchor': 0.9, 'hidden_random_top': best_random}
  loyalty = {arm: {'label_loyalty': [mean, mean - 0.1, mean + 0.1]} for arm, mean in arms.items()}
  return loyalty | {arm: {'label_loyalty': [0.1] * 3} for arm in ('text_anchor', 'hidden_random')}


def record(accuracy=(0.9, 0.8, 1.0), words=0.2, best_random=0.3):
  """Figures of a run in which blocked label words keep `words`, random ones 0.8."""
  arms = {'label': words, 'random': 0.8}
  blocking = {
    f'{end}/1/{arm}': {'label_loyalty': [loyalty, loyalty + 0.02, loyalty - 0.05]}
    for end in ('first', 'last')
    for arm, loyalty in arms.items()
  }
  return {
    'accuracy': list(accuracy),
    'chance': CHANCE,
    'blocking': blocking,
    'compression': {'arms': compression(best_random)},
  }


def harder(one_shot, rate, shots):
  pairs = [['a', 'b', 0.1, 0.5, 9], ['a', 'c', 0.6, 0.9, 9], ['b', 'c', 0.8, 0.7, 9]]
  return {
    'task': 'episodes?noise=20',
    'chance': CHANCE,
    'accuracy': one_shot,
    'reweighting': {
      'rate_0.01': {'accuracy': rate},
      'more_shots': {'accuracy': shots, 'shots': 3},
    },
    'confusion': {'layer': 1, 'pairs': pairs},
  }


@pytest.mark.parametrize('place', ['gs://bucket/run', 's3://bucket/run'])
def test_the_report_on_a_run_in_a_bucket_needs_a_directory(tmp_path, monkeypatch, place):
  def loaded(*_, **__):
    raise errors.InputError('all is well')

  monkeypatch.setattr(load, 'load', loaded)
  monkeypatch.chdir(tmp_path)
  with pytest.raises(
    errors.InputError, match=f'^--out is missing: .*--workdir={place} is a bucket'
  ):
    in_process.run(command, f'--workdir={place}')
  for given in ((f'--workdir={place}', '--out=report'), ('--workdir=run',)):
    with pytest.raises(errors.InputError, match='^all is well'):
      in_process.run(command, *given)
  assert not list(tmp_path.iterdir())


def test_figures_that_are_not_defined_are_null_in_results():
  assert runs._rounded({'auc': [float('nan'), 0.123456], 'n': 3}) == {'auc': [None, 0.1235], 'n': 3}


def test_a_model_at_chance_confirms_nothing():
  """Flow and loyalties of a model that ignores its demonstrations can look like anchors."""
  flow = {'wp': [[0.9, 0.1]] * 4, 'pq': [[0.1, 0.9]] * 4, 'ww': [[0.0, 0.0]] * 4}
  record = {'accuracy': [0.9, 0.8, 1.0], 'chance': 0.25, 'flow': {'abs_of_sum': flow}}
  lines = report.lines(record)
  assert lines[0].endswith('chance 0.250') and len(lines) == 3
  assert all(line.endswith('+0.800 [+0.800, +0.800], confirmed') for line in lines[1:])
  at_chance = report.lines(record | {'accuracy': [0.2, 0.3, 0.4]})
  assert all(line.endswith('not judged: accuracy is not above chance') for line in at_chance[1:])
  assert not claims.learns([1.0], 0.25)  # a single value has no interval


@pytest.mark.parametrize(
  'changes, anchors',
  [
    ({}, True),
    ({'accuracy': (0.2, 0.3, 0.25)}, False),  # it has not learned
    ({'words': 0.8}, False),  # to blind random words costs as much
    ({'best_random': 0.9}, False),  # some random words are as good a cache
  ],
)
def test_what_makes_label_words_anchors(changes, anchors):
  assert claims.are_anchors(record(**changes)) is anchors


def test_rank_correlation_of_confusion():
  """Three pairs, the measured order of two of which is swapped: 1 - 6 * 2 / (3 * 8) = 1/2."""
  found = claims.differences(harder([0.5, 0.6], [0.6, 0.6], [0.7, 0.6]))
  assert found['confusion: rank correlation of that predicted from keys and the measured'] == [0.5]
  alike = harder([0.5, 0.6], [0.6, 0.6], [0.7, 0.6])
  for pair in alike['confusion']['pairs']:
    pair[3] = 1.0  # nothing was confused
  assert not any('confusion' in text for text in claims.differences(alike))
  assert math.isnan(claims.rank_correlation(alike).rho)


def test_cells():
  """Verdicts over seeds; where there is none, how many seeds would give one."""
  assert tables.cell([0.3, 0.31, 0.29], True) == '+0.300 [+0.275, +0.325] confirmed'
  assert tables.cell([-0.3, -0.31, -0.29], True).endswith('contradicted')
  # Mean 0.1, deviation 0.1: the reach of n seeds is (t_0.975 + t_0.8) / sqrt(n) deviations.
  assert tables.cell([0.0, 0.1, 0.2], True).endswith('not yet decided, some 10 seeds would')
  assert tables.cell([0.0, 0.0], True).endswith('no difference in any run')
  assert tables.cell([-0.1, 0.1], True).endswith('not yet decided')
  assert tables.cell([0.3, 0.31], False).endswith('not judged: accuracy is not above chance')


def test_harder_episodes_have_a_table_of_their_own():
  """Re-weighting is judged by them alone, the rest by episodes as trained on."""
  one = record() | {'harder': harder([0.5, 0.7], [0.6, 0.8], [0.5, 0.5])}
  two = record(words=0.9) | {'harder': harder([0.6, 0.6], [0.7, 0.9], [0.5, 0.5])}
  for run in (one, two):  # of an older measurement
    run['reweighting'] = {'rate_0.3': {'accuracy': [1.0, 1.0, 1.0]}}
  values = tables.by_seed([one, two])
  assert values['accuracy: re-weighting at rate 0.01, less plain'] == pytest.approx([0.1, 0.2])
  assert values['accuracy: re-weighting at rate 0.01, less 3 shots per class'] == pytest.approx(
    [0.2, 0.3]
  )
  lost = record(accuracy=(0.2, 0.3, 0.25)) | {'harder': harder([0.2, 0.3], [0.9, 0.9], [0.1, 0.2])}
  found = {('fine', 0): one, ('fine', 1): two, ('fine', 2): lost, ('dense', 0): lost}
  plain, second = tables.write(['fine'], found).split('\n\n')
  assert '| *runs that learn from their context* | 2 of 3 [0.21, 0.94] |' in plain
  assert '| *runs whose label words are anchors* | 1 of 2 [0.09, 0.91] |' in plain
  assert 're-weighting' not in plain and 'label loyalty' not in second
  assert second.startswith('| harder episodes, `--task=episodes?noise=20` | fine |')
  rows = dict(line.strip('| ').split(' | ') for line in second.splitlines())
  assert rows['*accuracy, one shot per class*'].startswith('0.600')
  assert rows['*accuracy, re-weighting at rate 0.01*'].startswith('0.750')
  assert rows['*accuracy, 3 shots per class*'].startswith('0.500')
  both = tables.write(['dense', 'fine'], found)
  assert '| *runs that learn from their context* | 0 of 1 [0.00, 0.79] | 2 of 3' in both
  assert '| *accuracy, one shot per class* | - | 0.600' in both
  assert '1 [0.00, 0.79] |' in tables.write(['dense'], {('dense', 0): lost})


@pytest.mark.parametrize(
  'word, words',
  [
    ('--sets=1', '^--sets=1 must be at least 2'),
    ('--queries=0', '^--queries=0 must be at least 1'),
    ('--steps=-1', '^--steps=-1 must be at least 0'),
    ('--sets=12', r'is of other settings: sets=12 \(was 24\)'),
    ('--steps=100', r'is of other settings: steps=100 \(was 400\)'),
    ('', 'all is well'),
  ],
)
def test_bad_input_and_other_settings_train_nothing(tmp_path, monkeypatch, word, words):
  def trained(*_):
    raise errors.InputError('all is well')

  monkeypatch.setattr(runs, '_one', trained)
  (tmp_path / 'dense' / '0').mkdir(parents=True)
  measured = {'settings': {'sets': 24, 'queries': 16, 'seed': 0}, 'step': 400}
  (tmp_path / 'dense' / '0' / 'anchors.json').write_text(json.dumps(measured))
  given = (f'--workdir={tmp_path}', '--variants=dense', '--seeds=2', *filter(None, [word]))
  with pytest.raises(errors.InputError, match=words):
    in_process.run(study, *given)
