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
]


@pytest.mark.parametrize('message, changes', NOT_EXPORTED)
def test_models_that_no_family_can_run(message, changes):
  cfg = tiny.make(**{f'model__{key}': value for key, value in changes.items()})
  with pytest.raises(errors.InputError, match=message):
    hf_config_export.from_config(cfg)
