"""Closed forms against hand arithmetic and against every reproducible figure of the paper."""

import dataclasses
import importlib

import pytest

from configs import base, recipes
from moe_jax.config import parse, schema
from moe_jax.planning import flops


def load(spec: str) -> schema.Config:
  """A page and its variant; one that starts with a digit is a size of DeepSeekMoE."""
  page, _, variant = spec.partition(':')
  name = f'deepseekmoe_{page}' if page[0].isdigit() else f'deepseek_{page}'
  get_config = importlib.import_module(f'configs.{name}').get_config
  return parse.from_dict((get_config(variant) if variant else get_config()).to_dict())


def tiny(**moe) -> schema.Config:
  c = base.get_config()
  c.model.update(vocab_size=11, max_seq_len=3, embed_dim=4, mlp_dim=5, num_layers=3, num_heads=2)
  c.model.update(num_dense_layers=1)
  c.model.attention.update(num_kv_heads=1, head_dim=6)
  c.model.moe.update(num_experts=7, num_shared_experts=2, num_experts_per_tok=3, moe_mlp_dim=2)
  c.model.moe.update(moe)
  return parse.from_dict(c.to_dict())


def test_parameters_by_hand():
  count = flops.count_parameters(tiny().model)
  assert count == flops.ParameterCount(
    embedding=11 * 4,
    attention=3 * (4 * 2 * 6 + 2 * 4 * 1 * 6 + 2 * 6 * 4),  # q, k and v, o
    norms=3 * 2 * 4 + 4,
    dense_ffn=4 * 2 * 5 + 5 * 4,
    shared_experts=2 * 2 * (4 * 2 * 2 + 2 * 4),  # 2 layers, 2 experts
    routed_experts=2 * 7 * (4 * 2 * 2 + 2 * 4),
    router=2 * 4 * 7,
    head=4 * 11,
    mtp=0,
  )
  assert count.total == 44 + 432 + 28 + 60 + 96 + 336 + 56 + 44


def test_activated_leaves_out_only_the_experts_not_visited():
  model = tiny().model
  total, activated = flops.count_parameters(model), flops.count_activated(model)
  assert activated == dataclasses.replace(total, routed_experts=2 * 3 * 24)


def test_hash_layers_have_no_router():
  total = flops.count_parameters(tiny().model)
  hashed = flops.count_parameters(tiny(router='hash').model)
  assert hashed == dataclasses.replace(total, router=0)


def test_a_mixture_of_attention_heads_has_a_router_per_layer():
  c = base.get_config()
  c.model.update(vocab_size=11, embed_dim=4, num_layers=3, num_dense_layers=0, num_heads=6)
  c.model.attention.update(num_kv_heads=2, head_dim=6, num_experts=3)
  c.model.moe.update(num_experts=7, num_experts_per_tok=3, moe_mlp_dim=2)
  model = parse.from_dict(c.to_dict()).model
  assert flops.count_parameters(model).router == 3 * 4 * (7 + 3)
  assert flops.count_activated(model).router == 3 * 4 * (7 + 3)
  c.model.moe.router = 'hash'
  assert flops.count_parameters(parse.from_dict(c.to_dict()).model).router == 3 * 4 * 3


def test_ds_moe_trains_all_experts():
  sparse, dense = tiny(), tiny(router='ds_moe')
  assert flops.count_activated(dense.model) == flops.count_parameters(dense.model)
  # 7 - 3 more experts of 24 weights in 2 layers, 6 FLOPs each.
  more = 2 * 4 * 24 * 6
  found = [flops.train_flops_per_token(c.model) for c in (sparse, dense)]
  assert found[1] - found[0] == more
  paper = [flops.train_flops_per_sequence_paper(c.model, c.paper) for c in (sparse, dense)]
  assert paper[1] - paper[0] == 3 * more
  # K is for inference only.
  other = tiny(router='ds_moe', num_experts_per_tok=2)
  assert flops.count_activated(other.model) == flops.count_activated(dense.model)


def test_experts_that_choose_are_visited_k_times_on_average():
  assert flops.count_activated(tiny(router='expert_choice').model) == flops.count_activated(
    tiny().model
  )


def test_exact_flops_by_hand():
  model = tiny().model
  weights = 432 + 60 + 96 + 2 * 3 * 24 + 56 + 44
  # 3 tokens: 1 + 2 + 3 = 6 pairs; per pair, layer and head 2 * 6 for q.k and 2 * 6 for the values.
  attention = 6 * 3 * 2 * (2 * 6 + 2 * 6)
  per_sequence = 3 * (3 * 2 * weights + attention)
  assert flops.train_flops_per_sequence(model) == per_sequence
  assert flops.train_flops_per_token(model) * 3 == per_sequence


def test_paper_flops_by_hand():
  values = tiny()
  weights = 3 * 4 * 16 + 60 + 2 * (2 + 3) * 24 + 44
  expected = 3 * (6 * weights + 12 * 3 * 4 * 3)
  assert flops.train_flops_per_sequence_paper(values.model, values.paper) == expected
  wide = schema.PaperConfig(mlp_dim=5.5, moe_mlp_dim=2.5)
  extra = 3 * 6 * (3 * 4 * 0.5 + 2 * 5 * 3 * 4 * 0.5)
  assert flops.train_flops_per_sequence_paper(values.model, wide) == expected + extra


def latent(q_lora_rank: int = 0, **model) -> schema.ModelConfig:
  """`tiny` with MLA: 2 heads, R 5, Hn 3, Hr 2, Hv 4."""
  c = base.get_config()
  c.update(parse.to_dict(tiny()))
  c.model.update(model)
  c.model.attention.kind = 'mla'
  sizes = dict(kv_lora_rank=5, qk_nope_head_dim=3, qk_rope_head_dim=2, v_head_dim=4)
  c.model.attention.mla.update(q_lora_rank=q_lora_rank, **sizes)
  return parse.from_dict(c.to_dict()).model


# D 4: latent and rotated key 4 * (5 + 2), keys and values 5 * 2 * (3 + 4), output 2 * 4 * 4.
BESIDES_QUERIES = 4 * 7 + 5 * 14 + 32


@pytest.mark.parametrize(
  'rank, queries',  # straight from D to 2 heads of 3 + 2, or through a latent of 6
  [(0, 4 * 10), (6, 4 * 6 + 6 * 10)],
)
def test_latent_attention_by_hand(rank, queries):
  count, heads = flops.count_parameters(latent(rank)), flops.count_parameters(tiny().model)
  assert count.attention == 3 * (queries + BESIDES_QUERIES)
  # Norms of the latents.
  assert count.norms == heads.norms + 3 * (5 + rank)
  same = dict(attention=0, norms=0)
  assert dataclasses.replace(count, **same) == dataclasses.replace(heads, **same)


def test_latent_attention_flops_by_hand():
  model, heads = latent(), tiny()
  # 6 pairs of 3 tokens, 3 layers, 2 heads: 2 * (3 + 2) for the score and 2 * 4 for the value.
  pairs = 6 * 3 * 2 * (2 * 5 + 2 * 4)
  others = 60 + 96 + 2 * 3 * 24 + 56 + 44
  weights = 3 * (40 + BESIDES_QUERIES) + others
  assert flops.train_flops_per_sequence(model) == 3 * (3 * 2 * weights + pairs)
  # Paper: no router, and 9 = 3^2 pairs.
  paper = 3 * (3 * 2 * (weights - 56) + 9 * 3 * 2 * (2 * 5 + 2 * 4))
  assert flops.train_flops_per_sequence_paper(model, heads.paper) == paper


def test_modules_of_multi_token_prediction_are_counted_apart():
  plain, ahead = latent(), latent(num_mtp_layers=2)
  count = flops.count_parameters(ahead)
  attention, ffn = 40 + BESIDES_QUERIES, 2 * 24 + 7 * 24 + 4 * 7
  norms = 2 * 4 + 5 + 3 * 4  # of the block, its latent, and the module
  assert count.mtp == 2 * (4 * 8 + attention + ffn + norms)
  assert count.total == flops.count_parameters(plain).total
  assert flops.count_activated(ahead).mtp == count.mtp - 2 * (7 - 3) * 24
  assert flops.kv_cache_elements_per_token(ahead) == flops.kv_cache_elements_per_token(plain)


def test_modules_of_multi_token_prediction_are_trained():
  found = [flops.train_flops_per_sequence(latent(num_mtp_layers=n)) for n in (0, 2)]
  # Projection, attention, 2 + 3 experts, router and the shared head, for 3 tokens and 6 pairs.
  weights = 4 * 8 + 40 + BESIDES_QUERIES + 5 * 24 + 4 * 7 + 44
  assert found[1] - found[0] == 2 * 3 * (3 * 2 * weights + 6 * 2 * (2 * 5 + 2 * 4))


def test_dense_model_predicts_ahead_with_a_dense_block():
  c = recipes.make_dense(base.get_config(), 704)
  c.model.num_mtp_layers = 1
  model = parse.from_dict(c.to_dict()).model
  count, d = flops.count_parameters(model), model.embed_dim
  assert count.mtp == (count.attention + count.dense_ffn) // 6 + 2 * d**2 + 5 * d


def test_dense_model_activates_everything():
  model = tiny(num_experts=0).model
  assert flops.count_parameters(model) == flops.count_activated(model)
  assert flops.count_parameters(model).dense_ffn == 3 * 60
  assert flops.count_parameters(model).router == 0


def test_kv_cache_counts_key_value_heads_only():
  assert flops.kv_cache_elements_per_token(tiny().model) == 2 * 3 * 1 * 6
  # DeepSeek 67B: 8 of 64 heads, 95 layers.
  assert flops.kv_cache_elements_per_token(load('145b:dense_67b').model) == 2 * 95 * 8 * 128


def v2_with(num_kv_heads: int) -> schema.ModelConfig:
  """DeepSeek-V2 without latent attention."""
  model = load('v2').model
  change = dict(kind='gqa', num_kv_heads=num_kv_heads, head_dim=128)
  return dataclasses.replace(model, attention=dataclasses.replace(model.attention, **change))


@pytest.mark.parametrize(
  'model, elements',  # sheet papers/deepseek_v2.md, sections 1 (Table 1) and 7
  [
    (v2_with(num_kv_heads=128), 1_966_080),
    (v2_with(num_kv_heads=1), 15_360),
    (load('v2').model, 34_560),
    (load('v2:long').model, 34_560),
    (load('v2_lite').model, 15_552),
    (load('v2_lite:mha').model, 110_592),
    (load('llm_67b').model, 194_560),
    (load('v3').model, 576 * 61),
  ],
)
def test_kv_cache_of_the_sheet(model, elements):
  assert flops.kv_cache_elements_per_token(model) == elements


@pytest.mark.parametrize(
  'elements, bits, expected', [(34_560, 6, 25_920), (194_560, 16, 389_120), (3, 6, 3), (4, 6, 3)]
)
def test_bytes_of_a_quantised_cache(elements, bits, expected):
  assert flops.bytes_at(elements, bits) == expected  # 18 bits are 3 bytes


@pytest.mark.parametrize(
  'spec, total',
  [
    ('16b', 16_375_728_128),
    ('16b:dense_7b', 6_910_365_696),
    ('16b:llama2_7b', 6_738_415_616),  # the released checkpoint's size
    ('145b:dense_67b', 67_425_001_472),
    ('llm_7b', 6_910_365_696),
    ('llm_67b', 67_425_001_472),
    ('v2_lite', 15_706_484_224),
    ('v2_lite:long', 15_706_484_224),
    ('coder_v2_lite', 15_706_484_224),
    ('v2', 235_741_434_880),
    ('v3', 671_026_404_352),
  ],
)
def test_exact_totals(spec, total):
  assert flops.count_parameters(load(spec).model).total == total


@pytest.mark.parametrize(
  'spec, activated, printed',  # with both vocabulary matrices, and with one as in the papers
  [
    ('v2_lite', 2_661_150_208, '2.45'),
    ('v2', 21_375_800_320, '20.85'),
    ('v3', 37_552_282_624, '36.63'),
  ],
)
def test_activated_with_one_or_both_vocabulary_matrices(spec, activated, printed):
  count = flops.count_activated(load(spec).model)
  assert count.total == activated
  assert f'{count.without_embedding / 1e9:.2f}' == printed


def test_mha_of_the_v2_ablation():
  model = load('v2_lite:mha').model
  assert f'{flops.count_parameters(model).total / 1e9:.1f}' == '15.8'
  assert f'{flops.count_activated(model).without_embedding / 1e9:.1f}' == '2.5'


def test_v3_with_its_module_has_the_bytes_of_the_released_files():
  # Sheet papers/hf_checkpoints.md: 688,574,839,360 bytes. Files hold embedding and head once more.
  model = load('v3').model
  count = flops.count_parameters(model)
  assert count.mtp == 11_610_067_968
  weights = count.total + count.mtp + count.embedding + count.head
  # One byte each in float8, but for two: both pairs of vocabulary matrices, norms, routers and the
  # module's projection; its layer has two norms of D and those of its latents.
  d, num_moe = model.embed_dim, model.num_moe_layers + 1
  norms = count.norms + (2 * d + 1536 + 512) + 3 * d
  router = count.router // model.num_moe_layers
  wide = 2 * (count.embedding + count.head) + norms + num_moe * router + 2 * d * d
  # Four bytes per block of 128 x 128 of a float8 matrix (576 rows are 5 blocks) and per bias.
  attention = 12 * 56 + 192 * 12 + 5 * 56 + 256 * 4 + 56 * 128
  blocks = 62 * attention + 3 * 3 * 144 * 56 + num_moe * 257 * 3 * 16 * 56
  assert weights + wide + 4 * (blocks + num_moe * 256) == 688_574_839_360


# Sheet papers/deepseekmoe.md, sections 5-7: as printed, '' = not printed, or the paper contradicts
# itself (the sheet's section 9). Activated: 13.6B for `half` is what its own FLOPs imply.
PRINTED = [
  # spec, total B, activated B, paper TFLOPs per sequence
  ('2b', '2.0', '0.3', '4.3'),
  ('2b:gshard', '2.0', '0.3', '4.3'),
  ('2b:switch', '2.0', '0.2', '2.9'),
  ('2b:hash', '2.0', '0.2', '2.9'),
  ('2b:dense', '0.2', '0.2', '2.9'),
  ('2b:gshard_x1.2', '', '', '4.9'),
  ('2b:gshard_x1.5', '', '', '5.8'),
  ('2b:dense_x4', '', '', '7.2'),
  ('2b:dense_x16', '', '', '24.6'),
  ('2b:1_15', '2.0', '0.3', '4.3'),
  ('2b:1_31', '2.0', '0.3', '4.3'),
  ('2b:shared_2', '2.0', '0.3', '4.3'),
  ('2b:shared_4', '2.0', '0.3', '4.3'),
  ('16b', '16.4', '2.8', '74.4'),
  ('16b:dense_7b', '6.9', '6.9', '183.5'),
  ('16b:llama2_7b', '6.7', '6.7', '187.9'),
  ('145b', '144.6', '22.2', '585.6'),
  ('145b:half', '', '13.6', '374.6'),
  ('145b:gshard_137b', '136.5', '21.6', '572.7'),
  ('145b:dense_67b', '67.4', '67.4', '2057.5'),
]


@pytest.mark.parametrize('spec, total, activated, tera_flops', PRINTED)
def test_printed_figures(spec, total, activated, tera_flops):
  values = load(spec)
  ours = (
    flops.count_parameters(values.model).total / 1e9,
    flops.count_activated(values.model).total / 1e9,
    flops.train_flops_per_sequence_paper(values.model, values.paper) / 1e12,
  )
  for number, printed in zip(ours, (total, activated, tera_flops)):
    if printed:
      assert f'{number:.1f}' == printed


@pytest.mark.parametrize(
  'spec, tera_flops',
  [
    ('2b', 4.33),
    ('2b:dense', 2.88),
    ('2b:gshard_x1.2', 4.91),
    ('2b:gshard_x1.5', 5.78),
    ('2b:dense_x4', 7.23),
    ('2b:dense_x16', 24.63),
    ('16b', 74.42),
    ('16b:dense_7b', 183.48),
    ('16b:llama2_7b', 187.94),
    ('145b:dense_67b', 2057.46),
  ],
)
def test_flops_to_the_digits_of_the_sheet(spec, tera_flops):
  values = load(spec)
  ours = flops.train_flops_per_sequence_paper(values.model, values.paper) / 1e12
  assert round(ours, 2) == tera_flops


def test_half_activated_total_is_the_printed_one_without_its_routers():
  count = flops.count_parameters(load('145b:half').model)
  assert f'{(count.total - count.router) / 1e9:.1f}' == '142.3'


@pytest.mark.parametrize(
  'spec, total, active',  # section 7: parameters of the experts, in billions, to the printed digits
  [
    ('2b', '1.89', '0.24'),
    ('2b:gshard', '1.89', '0.24'),
    ('2b:switch', '1.89', '0.118'),
    ('2b:hash', '1.89', '0.118'),
    ('2b:gshard_x1.2', '2.3', '0.28'),
    ('2b:gshard_x1.5', '2.83', '0.35'),
    ('2b:dense', '0.118', '0.118'),
    ('2b:dense_x4', '0.47', '0.47'),
    ('2b:dense_x16', '1.89', '1.89'),
  ],
)
def test_expert_parameters_of_the_2b_table(spec, total, active):
  model = load(spec).model
  for count, printed in ((flops.count_parameters, total), (flops.count_activated, active)):
    parts = count(model)
    experts = (parts.dense_ffn + parts.shared_experts + parts.routed_experts) / 1e9
    assert f'{experts:.{len(printed.partition(".")[2])}f}' == printed


def test_exact_integers_of_the_2b_model():
  values = load('2b')
  model, paper = values.model, values.paper
  assert flops.count_parameters(model).attention == 58_982_400
  assert flops.count_activated(model).total == pytest.approx(0.316e9, abs=1e6)
  # With the paper's unaligned width: 64 experts of 3 * 1280 * 853.33 weights in 9 layers.
  assert round(64 * 3 * 1280 * paper.moe_mlp_dim * 9) == 16 * 8 * 1280**2 * 9 == 1_887_436_800


@pytest.mark.parametrize(
  'spec, baseline, percent',
  [
    ('16b', '16b:dense_7b', '40.6'),  # 74.42 / 183.48; the sheet divides the rounded 74.4 / 183.5
    ('16b', '16b:llama2_7b', '39.6'),
    ('145b', '145b:dense_67b', '28.5'),
    ('145b:half', '145b:dense_67b', '18.2'),
  ],
)
def test_headline_ratios(spec, baseline, percent):
  ours, theirs = (
    flops.train_flops_per_sequence_paper(values.model, values.paper)
    for values in (load(spec), load(baseline))
  )
  assert f'{100 * ours / theirs:.1f}' == percent
