"""The real model's shapes against the closed forms, and the text of the comparison."""

import json

import pytest

from configs import base, deepseekmoe_2b, deepseekmoe_16b, deepseekmoe_145b
from moe_jax import config
from moe_jax.analysis import accounting


def describe(page, name='x', **model) -> accounting.Description:
  page.model.update(model)
  return accounting.describe(config.from_dict(page.to_dict()), name)


def row(text: str, label: str) -> list[str]:
  """The cells of the first row that starts with `label`."""
  line = next(line for line in text.splitlines() if line.strip().startswith(label))
  return line.strip().removeprefix(label).split()


@pytest.mark.parametrize(
  'page',
  [
    deepseekmoe_2b.get_config('1_31'),
    deepseekmoe_16b.get_config(),
    deepseekmoe_145b.get_config('gshard_137b'),  # no shared experts
    deepseekmoe_145b.get_config('dense_67b'),  # no experts, grouped key-value heads
  ],
)
def test_real_shapes_add_up_to_the_closed_form(page):
  d = describe(page)
  by_group = {
    'embedding': d.parameters.embedding,
    'head': d.parameters.head,
    'attention/': d.parameters.attention,
    'norm/': d.parameters.norms,
    '/mlp/': d.parameters.dense_ffn,
    '/shared/': d.parameters.shared_experts,
    'router': d.parameters.router,
    '/moe/gate_up': d.parameters.routed_experts * 2 // 3,
    '/moe/down': d.parameters.routed_experts // 3,
  }
  for pattern, expected in by_group.items():
    assert sum(m.count for m in d.modules if pattern in m.path) == expected, pattern
  assert sum(m.count for m in d.modules) == d.parameters.total


def test_json_has_the_stable_keys_and_whole_numbers():
  values = json.loads(json.dumps(describe(deepseekmoe_16b.get_config(), 'page.py').to_json()))
  modules = values.pop('parameters_by_module')
  assert values == {
    'config': 'page.py',
    'total_params': 16_375_728_128,
    'activated_params': 2_828_650_496,
    'train_flops_per_sequence_paper': 74_423_193_305_088,
    'train_flops_per_sequence': 70_133_930_262_528,
    'train_flops_per_token': 17_122_541_568,
    'kv_cache_elements_per_token': 2 * 28 * 2048,
  }
  assert sum(modules.values()) == 16_375_728_128
  assert modules['moe_layers/moe/router'] == 27 * 2048 * 64


def test_table_marks_what_differs():
  first = describe(base.get_config(), 'one.py')
  second = describe(base.get_config(), 'two.py', num_layers=12, dtype='bfloat16')
  text = accounting.table([first, second])
  assert text.splitlines()[:2] == ['A  one.py', 'B  two.py']
  assert row(text, 'num_layers') == ['6', '12', '+100.0', '%']
  assert row(text, 'dtype') == ['float32', 'bfloat16', 'differs']
  assert row(text, 'embed_dim') == ['256', '256', '=']
  total = row(text, 'total parameters')
  assert total[:2] == [f'{first.parameters.total:,}', f'{second.parameters.total:,}']
  assert row(text, 'embedding')[-1] == '='
  assert 'kv cache' in text and 'router included' in text.replace('routers', 'router')


def test_table_shows_only_settings_with_an_effect():
  moe = describe(deepseekmoe_2b.get_config(), 'moe')  # no dense layer
  dense = describe(deepseekmoe_2b.get_config('dense'), 'dense')
  text = accounting.table([moe, dense])
  assert row(text, 'mlp_dim') == ['-', '3413', 'differs']
  assert row(text, 'moe.num_shared_experts') == ['1', '-', 'differs']
  assert row(text, 'moe.num_experts') == ['63', '0', 'differs']
  assert row(text, 'moe_layers/moe/router') == [f'{9 * 1280 * 63:,}', '-', 'differs']


def test_table_of_one_config_shows_shapes():
  text = accounting.table([describe(base.get_config(), 'one.py')])
  assert row(text, 'moe_layers/moe/down [5, 63, 176, 256]') == [f'{5 * 63 * 176 * 256:,}']
  assert '=' not in text


def test_small_differences_do_not_read_as_none():
  gshard = describe(deepseekmoe_2b.get_config('gshard'))
  text = accounting.table([describe(deepseekmoe_2b.get_config()), gshard])
  assert row(text, 'total parameters')[-2:] == ['+0.0006', '%']
