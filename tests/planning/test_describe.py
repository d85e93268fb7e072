"""The real model's shapes against the closed forms, and the text of the comparison."""

import json
import math

import numpy as np
import pytest

from configs import (
  base,
  deepseek_llm_67b,
  deepseek_v2,
  deepseek_v2_lite,
  deepseek_v3,
  deepseekmoe_2b,
  deepseekmoe_16b,
  deepseekmoe_145b,
  recipes,
)
from moe_jax.balance import balance_losses, router_stats
from moe_jax.config import parse, router_traits, schema
from moe_jax.planning import describe as describe_lib
from moe_jax.planning import virtual_devices


def describe(page, name='x', **model) -> describe_lib.Description:
  page.model.update(model)
  return describe_lib.describe(parse.from_dict(page.to_dict()), name)


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
    deepseek_v2_lite.get_config(),  # latent attention
    deepseek_v2.get_config(),  # latent queries
    deepseek_v3.get_config(),  # multi-token prediction
  ],
)
def test_real_shapes_add_up_to_the_closed_form(page):
  d = describe(page)
  modules = [m for m in d.modules if not m.path.startswith('mtp_layers/')]
  by_group = {
    'embedding': d.parameters.embedding,
    'head': d.parameters.head,
    'attention/': d.parameters.attention,
    'norm/scale': d.parameters.norms,
    '/mlp/': d.parameters.dense_ffn,
    '/shared/': d.parameters.shared_experts,
    'router': d.parameters.router,
    '/moe/gate_up': d.parameters.routed_experts * 2 // 3,
    '/moe/down': d.parameters.routed_experts // 3,
  }
  for pattern, expected in by_group.items():
    found = [m for m in modules if pattern in m.path]
    if pattern == 'attention/':
      found = [m for m in found if not m.path.endswith('norm/scale')]
    assert sum(m.count for m in found) == expected, pattern
  assert sum(m.count for m in modules) == d.parameters.total
  assert sum(m.count for m in d.modules) == d.parameters.total + d.parameters.mtp


@pytest.mark.parametrize('router', router_traits.LIBRARY)
def test_router_weights_are_those_of_the_real_model(router):
  page = base.get_config()
  page.model.update(num_dense_layers=0, num_heads=4)
  page.model.attention.update(num_kv_heads=2, num_experts=2)
  page.model.moe.options.update(replay_path='recorded.npz', replay_rows=4)
  page.model.moe.router = router
  d = describe(page)
  real = sum(m.count for m in d.modules if m.path.endswith('router'))
  assert real == d.parameters.router == d.activated.router
  assert sum(m.count for m in d.modules) == d.parameters.total


def test_json_has_the_stable_keys_and_whole_numbers():
  page = deepseekmoe_16b.get_config()
  page.model.moe.num_virtual_devices = 4
  d = describe(page, 'page.py')
  values = json.loads(json.dumps(d.to_json()))
  modules = values.pop('parameters_by_module')
  losses = values.pop('balance_losses')
  # 64 experts, 16 on a device, 6 of them used: a device is missed by C(48, 6) of C(64, 6) choices,
  # 3 of 4 copies travel, 27 layers, 2048 numbers of 2 bytes there and back.
  devices = 4 * (1 - math.comb(48, 6) / math.comb(64, 6))
  sent = values.pop('all_to_all_bytes_per_token')
  assert sent == pytest.approx(27 * devices * 3 / 4 * 2048 * 2 * 2)
  assert values == {
    'config': 'page.py',
    'total_params': 16_375_728_128,
    'activated_params': 2_828_650_496,
    'activated_params_without_embedding': 2_828_650_496 - 102_400 * 2048,
    'mtp_params': 0,
    'train_flops_per_sequence_paper': 74_423_193_305_088,
    'train_flops_per_sequence': 70_133_930_262_528,
    'train_flops_per_token': 17_122_541_568,
    'kv_cache_elements_per_token': 2 * 28 * 2048,
    'kv_cache_bytes_per_token': 2 * 28 * 2048 * 2,
    'kv_cache_bytes_per_token_by_bits': {'16': 229_376, '8': 114_688, '6': 86_016},
    'num_virtual_devices': 4,
  }
  assert list(losses) == list(balance_losses.LOSSES)
  assert losses['expert_level'] == {'weight': 0.001, 'scope': 'sequence', 'value_at_balance': 1.0}
  assert losses['router_z']['value_at_balance'] == pytest.approx(math.log(64) ** 2)
  assert sum(modules.values()) == 16_375_728_128
  assert modules['moe_layers/moe/router'] == 27 * 2048 * 64


def test_table_marks_what_differs():
  first = describe(base.get_config(), 'one.py')
  second = describe(base.get_config(), 'two.py', num_layers=12, dtype='bfloat16')
  text = describe_lib.table([first, second])
  assert text.splitlines()[:2] == ['A  one.py', 'B  two.py']
  assert row(text, 'num_layers') == ['6', '12', '+100.0', '%']
  assert row(text, 'dtype') == ['float32', 'bfloat16', 'differs']
  assert row(text, 'embed_dim') == ['256', '256', '=']
  total = row(text, 'total parameters')
  assert total[:2] == [f'{first.parameters.total:,}', f'{second.parameters.total:,}']
  assert row(text, 'embedding')[-1] == '='
  assert row(text, 'kv cache bytes per token') == ['12,288', '12,288', '=']  # twice as deep, bf16


def test_table_shows_only_settings_with_an_effect():
  moe = describe(deepseekmoe_2b.get_config(), 'moe')  # no dense layer
  dense = describe(deepseekmoe_2b.get_config('dense'), 'dense')
  text = describe_lib.table([moe, dense])
  assert row(text, 'mlp_dim') == ['-', '3413', 'differs']
  assert row(text, 'moe.num_shared_experts') == ['1', '-', 'differs']
  assert row(text, 'moe.num_experts') == ['63', '0', 'differs']
  assert row(text, 'moe_layers/moe/router') == [f'{9 * 1280 * 63:,}', '-', 'differs']
  assert row(text, 'moe.balance.expert_level.weight') == ['0.01', '-', 'differs']
  for off in ('moe.balance.switch', 'moe.capacity', 'moe.expert_bias', 'moe.num_limited_groups'):
    assert off not in text
  assert [key for key in dense.settings if key.startswith('moe.')] == ['moe.num_experts']


def test_table_shows_the_settings_of_one_kind_of_attention():
  heads, latent = deepseek_v2_lite.get_config('mha'), deepseek_v2_lite.get_config('long')
  text = describe_lib.table([describe(heads), describe(latent)])
  assert row(text, 'attention.kind') == ['gqa', 'mla', 'differs']
  assert row(text, 'attention.num_kv_heads') == ['16', '-', 'differs']
  assert row(text, 'attention.mla.kv_lora_rank') == ['-', '512', 'differs']
  assert row(text, 'attention.rope.theta') == ['10000', '10000', '=']
  assert row(text, 'attention.rope.yarn.factor') == ['-', '40', 'differs']
  assert 'attention.num_experts' not in text
  heads = describe_lib.table([describe(heads)])
  assert 'yarn' not in heads and 'attention.mla' not in heads


def test_module_of_multi_token_prediction_has_its_own_row():
  d = describe(deepseek_v3.get_config())
  label = 'multi-token prediction, not in the total'
  text = describe_lib.table([d])
  assert row(text, label) == ['11,610,067,968']
  assert row(text, 'total parameters') == ['671,026,404,352']
  assert row(text, 'without the input embedding') == ['36,625,603,584']
  assert d.to_json()['mtp_params'] == 11_610_067_968
  assert label not in describe_lib.table([describe(base.get_config())])


def test_kv_cache_of_v2_beside_67b():
  text = describe_lib.table(
    [describe(deepseek_llm_67b.get_config()), describe(deepseek_v2.get_config())]
  )
  assert row(text, 'kv cache numbers per token') == ['194,560', '34,560', '-82.2', '%']
  assert row(text, 'at 16 bits') == ['389,120', '69,120', '-82.2', '%']
  assert row(text, 'at 6 bits') == ['145,920', '25,920', '-82.2', '%']
  section = text.split('\nKV CACHE per token, vs A at 16 bits\n')[1].split('\n\n')[0]
  assert section.splitlines() == [
    'A  16 bits  389,120 bytes  equal',
    'A   8 bits  194,560 bytes  -50.0 %',
    'A   6 bits  145,920 bytes  -62.5 %',
    'B  16 bits   69,120 bytes  -82.2 %',  # the architecture
    'B   8 bits   34,560 bytes  -91.1 %',
    'B   6 bits   25,920 bytes  -93.3 %',  # as deployed
  ]


def test_table_of_one_config_shows_shapes():
  text = describe_lib.table([describe(base.get_config(), 'one.py')])
  assert row(text, 'moe_layers/moe/down [5, 63, 176, 256]') == [f'{5 * 63 * 176 * 256:,}']
  assert 'vs A' not in text and 'MATCHED' not in text and 'KV CACHE' not in text


def test_small_differences_do_not_read_as_none():
  gshard = describe(deepseekmoe_2b.get_config('gshard'))
  text = describe_lib.table([describe(deepseekmoe_2b.get_config()), gshard])
  assert row(text, 'total parameters')[-2:] == ['+0.0006', '%']


def test_kv_cache_bytes_follow_the_compute_dtype():
  # 6 layers, keys and values, 4 heads of 64.
  for dtype, size in (('float32', 4), ('bfloat16', 2)):
    d = describe(base.get_config(), dtype=dtype)
    assert d.kv_cache_bytes_per_token == 6 * 2 * 4 * 64 * size


def model_of(**moe) -> schema.ModelConfig:
  page = base.get_config()
  page.model.moe.update(moe)
  return parse.from_dict(page.to_dict()).model


def devices(d: int, **moe) -> describe_lib.Description:
  page = base.get_config()
  page.model.moe.update({'num_virtual_devices': d} | moe)
  return describe(page)


def test_all_to_all_row_names_its_devices():
  eight, one = devices(8), devices(1)
  moe = model_of(num_virtual_devices=8).moe
  per_layer = virtual_devices.expected_bytes_per_token(moe, embed_dim=256, bytes_per_number=4)
  assert eight.all_to_all_bytes_per_token == pytest.approx(5 * per_layer)  # 5 of 6 layers are MoE
  assert one.all_to_all_bytes_per_token == 0
  text = describe_lib.table([eight, eight])
  assert row(text, 'all-to-all bytes per token, 8 virtual device(s)')[-1] == '='
  text = describe_lib.table([eight, one])
  assert row(text, 'all-to-all bytes per token, 8 / 1 virtual device(s)')[1] == '0'
  dense = describe(recipes.make_dense(base.get_config(), 704))
  assert (dense.all_to_all_bytes_per_token, dense.num_virtual_devices) == (0, 1)


def test_balance_losses_show_weight_and_value():
  text = describe_lib.table([devices(8), describe(recipes.make_dense(base.get_config(), 704))])
  assert row(text, 'expert_level') == ['0.01', 'x', '1', '-', 'differs']
  # 63 experts: 1 / 63^2, -ln 63 and (ln 63)^2.
  assert row(text, 'gshard') == ['0', 'x', '0.00025195', '-', 'differs']
  assert row(text, 'mutual_information')[:3] == ['0', 'x', '-4.1431']
  assert row(text, 'router_z')[:3] == ['0', 'x', '17.166']
  sigmoid = describe_lib.table([devices(8, score_func='sigmoid')])
  assert row(sigmoid, 'expert_level') == ['0.01', 'x', '31.5']


def test_attention_loss_only_with_a_mixture_of_attention_heads():
  page = base.get_config()
  page.model.update(num_dense_layers=0, num_heads=4)
  page.model.attention.update(num_kv_heads=1, num_experts=4)
  page.model.moe.balance.attention_mutual_information.weight = 3.5e-4
  loss = describe(page).to_json()['balance_losses']['attention_mutual_information']
  assert loss == {'weight': 3.5e-4, 'scope': 'micro_batch', 'value_at_balance': -math.log(4)}
  assert 'attention_mutual_information' not in devices(8).balance_losses


def test_dense_models_have_no_balance_losses():
  d = describe(recipes.make_dense(base.get_config(), 704))
  assert d.to_json()['balance_losses'] == {}
  text = describe_lib.table([d])
  assert 'BALANCE' not in text and 'transformers' not in text


def layers_of_routing(alike: bool):
  """3 layers of 8 tokens, 4 experts, K = 2: scores [3, 8, 4] and choices [3, 8, 4] bool."""
  rng = np.random.default_rng(0)
  scores = rng.dirichlet(np.ones(4), size=(3, 8))
  if alike:
    scores[:] = scores[0]
  return scores, scores >= np.sort(scores, axis=-1)[..., -2:-1]


def deepseek(scores, chosen):
  """DeepSeekMoE, Eq. 12-14: E / (K T) load_i, summed over layers."""
  _, t, e = scores.shape
  frequency = e / (2 * t) * chosen.sum(axis=1)
  return (frequency * scores.mean(axis=1)).sum()


def megatron(scores, chosen):
  """Megatron-LM's switch_load_balancing_loss_func: E / (K T^2), one term per layer."""
  _, t, e = scores.shape
  return (scores.sum(axis=1) * chosen.sum(axis=1)).sum() * e / (2 * t * t)


def transformers(scores, chosen):
  """load_balancing_loss_func: all layers in one pool, tokens per expert not divided by K."""
  e = scores.shape[-1]
  return e * (chosen.reshape(-1, e).mean(axis=0) * scores.reshape(-1, e).mean(axis=0)).sum()


def slope(convention, scores, chosen):
  """Its gradient; all of them are linear in the scores, counts being constants."""
  unit = np.eye(scores.size).reshape(-1, *scores.shape)
  return np.array([convention(one, chosen) for one in unit]).reshape(scores.shape)


def test_conventions_of_the_expert_level_loss():
  page = base.get_config()
  page.model.update(num_layers=4, num_dense_layers=1)
  page.model.moe.update(num_experts=4, num_experts_per_tok=2)
  page.model.moe.balance.expert_level.weight = 0.01
  model = parse.from_dict(page.to_dict()).model
  scores, chosen = layers_of_routing(alike=True)
  idx = np.stack([np.argsort(-layer, axis=-1)[:, :2] for layer in scores]).astype(np.int32)
  mask, size = np.ones((1, 8), bool), scores.astype(np.float32)
  sums = [
    router_stats.add_up(router_stats.sequence_sums(i[None], s[None], None, mask, 1))
    for i, s in zip(idx, size)
  ]
  ours = sum(float(balance_losses.expert_level(s, model.moe)) for s in sums)
  assert deepseek(scores, chosen) == pytest.approx(ours, rel=1e-5)
  assert megatron(scores, chosen) == pytest.approx(ours, rel=1e-5)  # factor 1
  coefficient = describe_lib.transformers_coefficient(model)
  assert coefficient == pytest.approx(0.01 * 3 / 2)
  pulls = [slope(f, scores, chosen) for f in (deepseek, megatron, transformers)]
  np.testing.assert_allclose(pulls[1], pulls[0], rtol=1e-12)
  np.testing.assert_allclose(coefficient * pulls[2], 0.01 * pulls[0], rtol=1e-12)
  assert coefficient * transformers(scores, chosen) == pytest.approx(0.01 * ours, rel=1e-5)


def test_conventions_of_unequal_layers():
  scores, chosen = layers_of_routing(alike=False)
  pulls = [slope(f, scores, chosen) for f in (deepseek, megatron, transformers)]
  np.testing.assert_allclose(pulls[1], pulls[0], rtol=1e-12)  # whatever the layers
  assert not np.allclose(3 / 2 * pulls[2], pulls[0], rtol=0.1)  # the pool mixes the layers' loads


def test_conventions_at_perfect_balance():
  scores = np.full((3, 8, 4), 0.25)
  chosen = np.tile(np.array([[True, True, False, False], [False, False, True, True]]), (3, 4, 1))
  # Summed over 3 layers, or once for the model and K = 2.
  found = [f(scores, chosen) for f in (deepseek, megatron, transformers)]
  np.testing.assert_allclose(found, [3, 3, 2])


def test_gshard_is_switch_over_the_experts_squared():
  scores, _ = layers_of_routing(alike=False)
  first = np.eye(4)[scores[0].argmax(axis=-1)].sum(axis=0)  # c_e of 8 tokens
  gshard = (first / 8 * scores[0].mean(axis=0)).sum() / 4
  switch = 4 * (first / 8 * scores[0].mean(axis=0)).sum()
  assert gshard == pytest.approx(switch / 4**2)
  idx = np.argsort(-scores[:1], axis=-1)[..., :2].astype(np.int32)
  mask = np.ones((1, 8), bool)
  rows = router_stats.sequence_sums(idx, scores[:1].astype(np.float32), None, mask, 1)
  moe = model_of(num_experts=4, num_experts_per_tok=2).moe
  assert float(balance_losses.gshard(rows, moe)[0]) == pytest.approx(gshard, rel=1e-5)
  assert float(balance_losses.switch(rows, moe)[0]) == pytest.approx(switch, rel=1e-5)


def test_matched_says_what_is_equal_and_by_how_much_the_rest_is_not():
  first = describe(base.get_config(), 'one.py')
  # One more expert: 5 layers of 3 x 256 x 176 weights and 256 of the router; it is activated only
  # by its router: 6 FLOPs for each of 5 x 256 weights.
  page = base.get_config()
  page.model.moe.num_experts = 64
  text = describe_lib.table([first, describe(page, 'two.py'), first])
  section = text.split('\nMATCHED with A\n')[1].split('\n\n')[0].splitlines()
  assert len(section) == 2 * 5
  lines = {(line[0], line[3:31].strip()): line[31:] for line in section}
  more = 5 * (3 * 256 * 176 + 256)
  percent = 100 * more / first.parameters.total
  assert lines['B', 'total parameters'] == f'+{more:,} (+{percent:.1f} %)'
  assert lines['B', 'activated parameters'].startswith('+1,280 (+0.01 %')
  assert lines['B', 'training FLOPs per token'].startswith('+7,680 (')
  assert lines['B', 'all-to-all bytes per token'] == 'equal'
  assert lines['B', 'kv cache bytes per token'] == 'equal'
  assert all(lines['C', name] == 'equal' for _, name in lines)
