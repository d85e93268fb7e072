import json
import pathlib

import numpy as np
import pytest

from moe_jax import errors
from moe_jax.config import parse, schema
from moe_jax.post_training import expert_config
from tests import tiny

# Of results/ of deepseek-ai/ESFT (DeepSeek-V2-Lite, layers 1 to 26, 64 routed experts): token
# scores times 10^4, and the experts of the released configs in their order, -1 behind the last one.
RELEASED = np.load(pathlib.Path(__file__).with_name('esft_released.npz'))


@pytest.mark.parametrize('task', ['intent', 'law', 'summary', 'translation'])
def test_released_configs_come_out_of_released_scores(task):
  found = expert_config.select(RELEASED[f'{task}_token'] / 1e4, 1, 0.2)
  want = {i: [e for e in row if e >= 0] for i, row in enumerate(RELEASED[f'{task}_experts'], 1)}
  assert found == expert_config.ExpertConfig(want, False, False)


@pytest.mark.parametrize(
  'task, mean, fewest, most',
  [
    ('intent', 4.77, 4, 6),
    ('summary', 4.92, 2, 8),
    ('law', 5.88, 3, 9),
    ('translation', 3.19, 2, 4),
  ],
)
def test_experts_per_layer_are_those_of_the_releases(task, mean, fewest, most):
  total, *ends = expert_config.count(expert_config.select(RELEASED[f'{task}_token'] / 1e4, 1, 0.2))
  assert total / 26 == pytest.approx(mean, abs=0.005) and ends == [fewest, most]


def test_the_fewest_that_reach_p():
  scores = np.array([[0.1, 0.5, 0.0, 0.4], [0.25, 0.25, 0.25, 0.25]])

  def chosen(share):
    return expert_config.select(scores, 3, share).experts

  assert chosen(0.5) == {3: [1], 4: [0, 1]}  # reached exactly: no further one
  assert chosen(0.51) == {3: [1, 3], 4: [0, 1, 2]}
  assert chosen(1e-9) == {3: [1], 4: [0]}  # one at least
  assert chosen(1.0) == {3: [1, 3, 0], 4: [0, 1, 2, 3]}  # none that no token visits
  sizes = [expert_config.count(expert_config.select(scores, 0, p))[0] for p in (0.1, 0.4, 0.7, 1)]
  assert sizes == sorted(sizes)
  for share in (0, 1.5, float('nan')):
    with pytest.raises(errors.InputError, match='--p=.* must lie in'):
      chosen(share)


def test_files_and_back(tmp_path):
  config = expert_config.ExpertConfig({1: [8, 3], 2: [], 10: [0]}, False, True)
  path = tmp_path / 'expert_cfg.json'
  expert_config.write(path, config)
  assert json.loads(path.read_text()) == {
    'experts': {'1': [8, 3], '2': [], '10': [0]},
    'shared_experts': False,
    'non_expert_modules': True,
  }
  assert expert_config.read(path, [1, 2, 10], 9) == config
  token = np.array([[0.12344, 0.87656], [0.5, 0.5]])
  scores = expert_config.ExpertScores(token, token / 2, 7, 1)
  expert_config.write_scores(tmp_path / 'summary.json', scores)
  found, first = expert_config.read_scores(tmp_path / 'summary.json', 'token')
  assert first == 1 and found.tolist() == [[0.1234, 0.8766], [0.5, 0.5]]
  assert expert_config.read_scores(tmp_path / 'summary.json', 'gate')[0][1, 0] == 0.25


@pytest.mark.parametrize(
  'content, words',
  [
    ({}, 'must have every MoE layer of the model, 1 to 2'),
    ({'experts': {'1': []}}, 'must have every MoE layer'),
    ({'experts': {'1': [], '2': [], '3': []}}, 'and no other'),
    ({'experts': {'1': [4], '2': []}}, r'layer 1 must have .* below 4.* not \[4\]'),
    ({'experts': {'1': [1, 1], '2': []}}, 'different experts'),
    ({'experts': {'1': [True], '2': []}}, 'layer 1'),
    (
      {'experts': {'1': [], '2': []}, 'shared_experts': 1},
      'shared_experts=1 must be true or false',
    ),
  ],
)
def test_another_models_config_is_refused(tmp_path, content, words):
  path = tmp_path / 'expert_cfg.json'
  path.write_text(json.dumps(content))
  with pytest.raises(errors.InputError, match=words):
    expert_config.read(path, [1, 2], 4)


@pytest.mark.parametrize(
  'content, words',
  [
    ({}, 'it has no "token_scores"'),
    ({'token_scores': {'1': {'0': 0.5}, '3': {'0': 0.5}}}, 'not all there'),
    ({'token_scores': {'1': {'0': -0.5}}}, 'negative'),
    ({'token_scores': {'1': {'1': 0.5}}}, "'0'"),
    ({'token_scores': {}}, 'not all there'),
  ],
)
def test_what_is_no_table_of_scores_is_refused(tmp_path, content, words):
  path = tmp_path / 'summary.json'
  path.write_text(json.dumps(content))
  with pytest.raises(errors.InputError, match=f'must be a table of scores .*{words}'):
    expert_config.read_scores(path, 'token')


def test_a_config_without_switches_has_none(tmp_path):
  path = tmp_path / 'expert_cfg.json'
  path.write_text(json.dumps({'experts': {'1': [0]}}))
  assert expert_config.read(path, [1], 4) == ({1: [0]}, False, False)


def test_a_page_gets_the_content_of_the_file(tmp_path):
  path = tmp_path / 'expert_cfg.json'
  expert_config.write(path, expert_config.ExpertConfig({2: [0], 1: [5, 3]}, True, False))
  values = tiny.values(init_from='base', trainable__kind='experts')
  assert expert_config.applied(values) is values
  content = json.loads(path.read_text())
  content['experts'] = dict(reversed(content['experts'].items()))  # of another writer
  path.write_text(json.dumps(content))
  values['trainable']['expert_config'] = str(path)
  got = parse.from_dict(expert_config.applied(values)).trainable
  assert got == schema.TrainableConfig('experts', '', ((5, 3), (0,)), True, False, 8, 16.0)
  values['model']['num_layers'] = 4
  with pytest.raises(errors.InputError, match='every MoE layer of the model, 1 to 3'):
    expert_config.applied(values)
