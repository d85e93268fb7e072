import pytest

from moe_jax import errors
from moe_jax.config import parse, schema
from moe_jax.interop import hf_config, hf_config_export
from tests import tiny
from tests.interop import published


def from_hf(hf: dict, **overrides) -> schema.Config:
  modules = hf_config.declared_mtp_layers(hf)
  return parse.from_dict(hf_config.to_values(hf, tiny.values(**overrides), modules))


@pytest.mark.parametrize('name', published.CONFIGS)
def test_there_and_back(name):
  """The config.json that is made of an imported model describes the same model."""
  cfg = from_hf(published.CONFIGS[name])
  made = hf_config_export.from_config(cfg)
  assert made['architectures'] == [hf_config.ARCHITECTURES[made['model_type']]]
  assert made['model_type'] == published.CONFIGS[name]['model_type']
  assert from_hf(made) == cfg


MLA = {key.removeprefix('model__'): value for key, value in tiny.MLA.items()}
MLA |= {'attention__rope__layout': 'interleaved'}
V3 = MLA | {'moe__score_func': 'sigmoid', 'moe__expert_bias__update_rule': 'sign'}
V3 |= {'moe__group_score': 'top2_sum', 'moe__norm_topk_prob': True}
GROUPS = {'moe__num_expert_groups': 4, 'moe__num_limited_groups': 2}
ONE_GATE = {'moe__norm_topk_prob': True, 'moe__num_experts_per_tok': 1}


def make(**changes) -> schema.Config:
  return tiny.make(**{f'model__{key}': value for key, value in changes.items()})


@pytest.mark.parametrize(
  'changes', [V3 | GROUPS, V3 | GROUPS | ONE_GATE, MLA | GROUPS | {'moe__num_expert_groups': 8}]
)
def test_groups_that_the_readers_can_cut(changes):
  cfg = make(**changes)
  back = from_hf(hf_config_export.from_config(cfg)).model.moe
  for name in ('num_expert_groups', 'num_limited_groups', 'group_score', 'norm_topk_prob'):
    assert getattr(back, name) == getattr(cfg.model.moe, name), name


@pytest.mark.parametrize('changes', [MLA, V3])
def test_no_shared_expert_is_none_of_them_and_not_null(changes):
  made = hf_config_export.from_config(make(**changes, moe__num_shared_experts=0))
  assert made['n_shared_experts'] == 0
  assert from_hf(made).model.moe.num_shared_experts == 0


def test_a_dense_model_with_latent_attention_has_no_layer_of_experts():
  cfg = make(**MLA, moe__num_experts=0)
  made = hf_config_export.from_config(cfg)
  assert made['model_type'] == 'deepseek_v2'
  assert made['first_k_dense_replace'] == cfg.model.num_layers
  assert None not in [value for key, value in made.items() if 'expert' in key]
  assert not from_hf(made).model.is_moe


def test_what_transformers_reads_otherwise_is_said():
  assert hf_config_export.caveats(make().model) == []
  assert hf_config_export.caveats(make(**V3).model) == []
  (line,) = hf_config_export.caveats(make(**MLA, moe__norm_topk_prob=True).model)
  assert 'norm_topk_prob=true' in line and 'transformers ignores' in line
  (line,) = hf_config_export.caveats(make(**MLA, moe__num_shared_experts=0).model)
  assert 'n_shared_experts=0' in line
  (line,) = hf_config_export.caveats(make(**MLA, num_heads=3, attention__num_kv_heads=3).model)
  assert 'no multiple of num_attention_heads=3' in line


def test_a_single_gate_is_never_divided():
  hf = hf_config_export.from_config(make(moe__num_experts_per_tok=1))
  assert not from_hf(hf | {'norm_topk_prob': True}).model.moe.norm_topk_prob
  hf = hf_config_export.from_config(make())
  assert from_hf(hf | {'norm_topk_prob': True}).model.moe.norm_topk_prob


NOT_EXPORTED = [
  ('model.attention.num_experts=2', {'attention__num_experts': 2, 'num_dense_layers': 0}),
  ("model.moe.router='hash'", {'moe__router': 'hash'}),
  ("model.moe.score_func='sigmoid'", {'moe__score_func': 'sigmoid'}),
  ('model.moe.num_expert_groups=4', {'moe__num_expert_groups': 4, 'moe__num_limited_groups': 4}),
  ('model.moe.routed_scaling_factor=2.0', {'moe__routed_scaling_factor': 2.0}),
  ("model.moe.expert_bias.update_rule='sign'", {'moe__expert_bias__update_rule': 'sign'}),
  ('model.moe.options.logit_norm_scale=1.0', {'moe__options__logit_norm_scale': 1.0}),
  ("model.attention.rope.layout='half'", {'attention__kind': 'mla'}),
  ("model.attention.rope.layout='interleaved'", {'attention__rope__layout': 'interleaved'}),
  ('model.attention.head_dim=4', {'attention__head_dim': 4}),
  ('model.num_mtp_layers=1', {'num_mtp_layers': 1}),
  (
    'model.moe.capacity.at_eval=True',
    {'moe__capacity__at_eval': True, 'moe__capacity__policy': 'score'},
  ),
  # Groups are a view of all experts' scores.
  ('model.moe.num_expert_groups=4', MLA | GROUPS | {'moe__num_experts': 7}),
  ('model.moe.num_expert_groups=4', V3 | GROUPS | {'moe__num_experts': 7}),
  # V3 adds up the best two of a group.
  ('model.moe.num_expert_groups=8', V3 | GROUPS | {'moe__num_expert_groups': 8}),
  # The released code does not make a single gate 1.
  ('model.moe.norm_topk_prob=True', ONE_GATE),
  ('model.moe.norm_topk_prob=True', MLA | ONE_GATE),
]


@pytest.mark.parametrize('message, changes', NOT_EXPORTED)
def test_models_that_no_family_can_run(message, changes):
  cfg = make(**changes)
  with pytest.raises(errors.InputError, match=message):
    hf_config_export.from_config(cfg)
