import json

import pytest

from moe_jax import errors
from moe_jax.config import parse, schema
from moe_jax.post_training import expert_config
from tests import tiny


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
