"""Reading overrides and refusing those that a checkpoint cannot follow; nothing is compiled here.

What they do to a trained model is tested in test_checkpoint_commands.py.
"""

import pytest

from moe_jax import errors
from moe_jax.runs import overrides
from tests import tiny

CFG = tiny.make()


def test_values_are_read_by_the_type_of_their_field():
  found = overrides.parse(
    CFG,
    [
      'model.moe.num_experts_per_tok=3',
      'model.moe.capacity.factor=1',
      'model.moe.capacity.at_eval=True',
      'config.model.moe.capacity.policy=position',
      'model.moe.norm_topk_prob=false',
    ],
  )
  assert found == {
    'model.moe.num_experts_per_tok': 3,
    'model.moe.capacity.factor': 1.0,
    'model.moe.capacity.at_eval': True,
    'model.moe.capacity.policy': 'position',
    'model.moe.norm_topk_prob': False,
  }
  assert isinstance(found['model.moe.capacity.factor'], float)
  moe = overrides.changed(CFG, found).model.moe
  assert moe.num_experts_per_tok == 3 and moe.capacity.at_eval


@pytest.mark.parametrize(
  'text, message',
  [
    ('model.moe.num_expert_per_tok=3', "not a known key; did you mean 'num_experts_per_tok'"),
    ('modle.moe.router=hash', "config.modle is not a known key; did you mean 'model'"),
    ('model.moe.router.kind=hash', 'config.model.moe.router.kind is not a known key'),
    ('model.moe=1', 'config.model.moe is not a single value'),
    ('train.batch_ramp=1', 'config.train.batch_ramp is not a single value'),
    ('model.moe.num_experts_per_tok', 'must be KEY=VALUE, for example'),
    ('model.moe.num_experts_per_tok=2.5', 'num_experts_per_tok=2.5 must be of type int'),
    ('model.moe.capacity.factor=big', 'factor=big must be of type float'),
    ('model.moe.norm_topk_prob=1', 'norm_topk_prob=1 must be true or false'),
  ],
)
def test_what_cannot_be_read(text, message):
  with pytest.raises(errors.InputError, match=message):
    overrides.parse(CFG, [text])


def test_a_key_given_twice():
  with pytest.raises(errors.InputError, match='router is given twice'):
    overrides.parse(CFG, ['model.moe.router=topk', 'config.model.moe.router=hash'])


@pytest.mark.parametrize(
  'values, message',
  [
    (
      {'model.moe.num_experts': 16},
      r'num_experts=16 needs params/moe_layers/moe/down float32\[2, 16, 8, 16\], but the '
      r'checkpoint has it float32\[2, 8, 8, 16\]; only settings that keep the weights',
    ),
    ({'model.moe.router': 'hash'}, 'needs params/moe_layers/moe/router absent'),
    (
      {'model.moe.expert_bias.update_rule': 'sign'},
      'needs router_state/moe_layers/moe/expert_bias .*, but the checkpoint has it absent',
    ),
    ({'model.param_dtype': 'bfloat16'}, 'bfloat16'),
    ({'model.moe.num_experts_per_tok': 9}, 'num_experts_per_tok=9 must not exceed'),
    ({'optim.peak_lr': 1.0}, 'config.optim.peak_lr has no part in what a checkpoint computes'),
    ({'model.moe.unknown': 1}, 'config.model.moe.unknown is not a known key'),
  ],
)
def test_what_a_checkpoint_cannot_follow(values, message):
  with pytest.raises(errors.InputError, match=message):
    overrides.changed(CFG, values)


def test_nothing_changed_is_the_same_config():
  assert overrides.changed(CFG, {}) == CFG
