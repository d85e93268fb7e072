import pytest

from tests import tiny
from tests.config import changes


@pytest.mark.parametrize(
  'overrides',
  [
    {'num_kv_heads': 1, 'num_experts': 1},  # 1 x 1 of 2 heads
    {'num_kv_heads': 2, 'num_experts': 2},
    {'num_experts': 2, 'num_dense_layers': 1},
    {'num_experts': 2, 'moe': 0},
  ],
)
def test_rules_of_the_mixture_of_attention_heads(overrides):
  paths = {'num_dense_layers': 'model__num_dense_layers', 'moe': 'model__moe__num_experts'}
  good = {'model__num_dense_layers': 0, 'model__attention__num_experts': 2}
  tiny.make(**good)
  bad = {paths.get(key, f'model__attention__{key}'): v for key, v in overrides.items()}
  experts, kv = overrides['num_experts'], overrides.get('num_kv_heads', 1)
  parts = (f'model.attention.num_experts={experts}', f'num_kv_heads={kv}', 'num_heads=2')
  changes.assert_refused(good | bad, (*parts, 'num_dense_layers=', 'or set it to 0'))


@pytest.mark.parametrize(
  'name', ['kv_lora_rank', 'qk_nope_head_dim', 'qk_rope_head_dim', 'v_head_dim', 'q_lora_rank']
)
def test_sizes_of_latent_attention(name):
  good = {'model__attention__kind': 'mla'}
  tiny.make(**good)
  least = 0 if name == 'q_lora_rank' else 1
  bad = good | {f'model__attention__mla__{name}': least - 1}
  changes.assert_refused(bad, (f'model.attention.mla.{name}={least - 1}', f'at least {least}'))
