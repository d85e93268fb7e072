import pytest

from moe_jax import errors
from moe_jax.balance import balance_losses
from moe_jax.config import moe_config, moe_rules, router_traits
from moe_jax.models import dispatch, routers
from tests import tiny
from tests.config import changes


def test_choices_are_the_entries_of_their_registries():
  assert list(router_traits.LIBRARY) == list(routers.ROUTERS)
  assert set(moe_config.DISPATCHES) == set(dispatch.DISPATCHES)
  assert set(moe_config.LOSSES) == {*balance_losses.LOSSES, 'attention_mutual_information'}
  # The adaptive coefficient replaces the weight of any loss that evens the experts' load.
  for name in ('', *(loss for loss in balance_losses.LOSSES if loss != 'router_z')):
    page = tiny.make(model__moe__balance__adaptive__loss=name, model__moe__num_virtual_devices=4)
    assert page.model.moe.balance.adaptive.loss == name
  for name in ('attention_mutual_information', 'router_z'):
    with pytest.raises(errors.InputError, match=f"adaptive.loss='{name}'"):
      tiny.make(model__moe__balance__adaptive__loss=name)


@pytest.mark.parametrize('name', ['device_level', 'communication'])
def test_losses_over_virtual_devices_need_several(name):
  weight = {f'model__moe__balance__{name}__weight': 0.1}
  changes.assert_refused(weight, (f'{name}.weight=0.1', 'num_virtual_devices=1', 'more devices'))
  assert tiny.make(**weight, model__moe__num_virtual_devices=4)
  adaptive = {'model__moe__balance__adaptive__loss': name}
  words = (f"adaptive.loss='{name}'", 'num_virtual_devices=1', 'more devices')
  changes.assert_refused(adaptive, words)
  assert tiny.make(**adaptive, model__moe__num_virtual_devices=4)


# The tiny model has E = 8 experts and K = 2 of them per token.
@pytest.mark.parametrize(
  'overrides, parts',
  [
    (
      {'num_virtual_devices': 5},  # blocks of 2: the fifth would be empty
      ('num_virtual_devices=5', 'without an expert', 'blocks of 2', 'choose a divisor of 8'),
    ),
    (
      {'num_expert_groups': 9, 'num_limited_groups': 9},
      ('num_expert_groups=9', 'without an expert', 'blocks of 1', 'choose a divisor of 8'),
    ),
    (
      {'num_expert_groups': 4, 'num_limited_groups': 5},
      ('num_limited_groups=5', 'between 1 and', 'num_expert_groups=4'),
    ),
    (
      {'num_expert_groups': 4, 'num_limited_groups': 0},
      ('num_limited_groups=0', 'between 1 and', 'num_expert_groups=4'),
    ),
    (
      {'num_expert_groups': 4, 'num_limited_groups': 1, 'num_experts_per_tok': 3},
      ('num_limited_groups=1', 'as few as 2 experts', 'num_experts_per_tok=3', 'more groups'),
    ),
    (  # blocks of 3, 3 and 2: one group may hold only 2
      {'num_expert_groups': 3, 'num_limited_groups': 1, 'num_experts_per_tok': 3},
      ('num_limited_groups=1', 'as few as 2 experts', 'num_experts_per_tok=3'),
    ),
    (
      {'num_expert_groups': 4, 'num_limited_groups': 2, 'router': 'hash'},
      ('num_expert_groups=4', 'router topk only', "'hash'", 'set it to 1'),
    ),
    ({'routed_scaling_factor': 0.0}, ('routed_scaling_factor=0.0', 'positive', '1.0')),
    ({'options.input_jitter': 1.0}, ('options.input_jitter=1.0', '[0, 1)', '0 switches it off')),
    ({'options.input_jitter': -0.1}, ('options.input_jitter=-0.1', '[0, 1)')),
    ({'options.skew': 1.1}, ('options.skew=1.1', 'between 0 and 1')),
    ({'options.skew': -0.1}, ('options.skew=-0.1', 'between 0 and 1')),
    (
      {'options.random_second_expert': True, 'num_experts_per_tok': 3},
      ('random_second_expert=True', 'two experts', 'num_experts_per_tok=3', 'False, or K to 2'),
    ),
    (
      {'options.random_second_expert': True, 'router': 'ds_moe', 'dispatch': 'dense'},
      ('random_second_expert=True', "'ds_moe'", 'best first', 'set it to False'),
    ),
    (
      {'options.random_second_expert': True, 'router': 'expert_choice'},
      ('random_second_expert=True', "'expert_choice'", 'set it to False'),
    ),
    (
      {'router': 'replay', 'options.replay_rows': 4},
      ("replay_path=''", 'replay_rows=4', 'experiments.routing --save'),
    ),
    (
      {'router': 'replay', 'options.replay_path': 'a.npz'},
      ("replay_path='a.npz'", 'replay_rows=0', 'experiments.routing --save'),
    ),
    (
      {'router': 'skewed', 'num_experts_per_tok': 8},
      ('num_experts_per_tok=8', 'below', 'num_experts=8', "'skewed'", 'choose fewer'),
    ),
    (
      {'router': 'hash', 'norm_topk_prob': True},
      ('norm_topk_prob=True', 'no effect', "'hash'", 'set it to False'),
    ),
    ({'expert_bias.update_until': 1.5}, ('update_until=1.5', 'share of the run', '0 and 1')),
    ({'expert_bias.update_until': -0.1}, ('update_until=-0.1', 'share of the run', '0 and 1')),
    (
      {'expert_bias.update_rule': 'sign', 'router': 'balanced'},
      ("update_rule='sign'", 'router topk only', "'balanced'", "set it to 'none'"),
    ),
    ({'balance.adaptive.decay': 1.0}, ('balance.adaptive.decay=1.0', '[0, 1)')),
    ({'balance.adaptive.decay': -0.1}, ('balance.adaptive.decay=-0.1', '[0, 1)')),
    ({'capacity.factor': 0.0}, ('capacity.factor=0.0', 'positive', '1.0 is average')),
    ({'capacity.exempt_fraction': 1.5}, ('exempt_fraction=1.5', 'between 0 and 1')),
    (
      {'dispatch': 'capacity'},
      ("dispatch='capacity'", "capacity.policy='none'", 'position, score', "'dropless'"),
    ),
    (
      {'dispatch': 'capacity', 'capacity.policy': 'device'},
      ("dispatch='capacity'", "capacity.policy='device'", "'dropless'"),
    ),
    (
      {
        'dispatch': 'capacity',
        'capacity.policy': 'score',
        'capacity.exempt_fraction': 0.1,
      },
      ('exempt_fraction=0.1', 'exceed the buffers', 'set it to 0', "'dropless'"),
    ),
    (
      {'router': 'expert_choice', 'capacity.policy': 'score'},
      ("capacity.policy='score'", "'expert_choice'", 'bounds itself', "'none'"),
    ),
    (
      {'capacity.policy': 'score', 'capacity.group_rows': 3},
      ('capacity.group_rows=3', 'must divide the rows', '8', 'a divisor of 8, or 0 for all'),
    ),
    (
      {'router': 'expert_choice', 'options.chunk_tokens': 3},
      (
        'options.chunk_tokens=3',
        'must divide',
        '8 rows x 16',
        'choose a divisor, or chunks of one row',
      ),
    ),
    (
      {'router': 'ds_moe', 'capacity.policy': 'score'},
      ("capacity.policy='score'", "'ds_moe'", 'every expert', "'none'"),
    ),
  ],
)
def test_rules_of_routing(overrides, parts):
  overrides = {f'model__moe__{key.replace(".", "__")}': v for key, v in overrides.items()}
  changes.assert_refused(overrides, ('config.model.moe.', *parts))


@pytest.mark.parametrize(
  'overrides',
  [
    {'num_expert_groups': 3, 'num_limited_groups': 2},  # blocks of 3, 3, 2
    {'num_virtual_devices': 3},
    {'options__random_second_expert': True},
    {'router': 'expert_choice', 'dispatch': 'capacity'},
    {'router': 'ds_moe', 'dispatch': 'dropless'},
    {'router': 'skewed', 'num_experts_per_tok': 7, 'options__skew': 1.0},
    {'capacity__policy': 'device', 'capacity__exempt_fraction': 1.0},
    {'capacity__policy': 'position', 'dispatch': 'capacity'},
    {'options__logit_norm_scale': 1.0, 'options__input_jitter': 0.99},
  ],
)
def test_what_the_rules_of_routing_leave(overrides):
  tiny.make(**{f'model__moe__{key}': value for key, value in overrides.items()})


def test_groups_and_chunks_fit_every_forward_pass():
  """Micro-batches and the batches of a ramp; where nothing competes any number will do."""
  groups = {'model__moe__capacity__policy': 'score', 'model__moe__capacity__group_rows': 4}
  tiny.make(**groups)
  parts = ('capacity.group_rows=4', 'rows of a forward pass, 2')
  changes.assert_refused(groups | {'train__micro_batch_size': 2}, parts)
  parts = ('capacity.group_rows=4', 'rows of a forward pass, 6')
  changes.assert_refused(groups | {'train__batch_ramp': ((3, 6),)}, parts)
  chunks = {'model__moe__router': 'expert_choice', 'model__moe__options__chunk_tokens': 64}
  tiny.make(**chunks)
  parts = ('options.chunk_tokens=64', '2 rows x 16')
  changes.assert_refused(chunks | {'train__micro_batch_size': 2}, parts)
  tiny.make(model__moe__capacity__group_rows=3, model__moe__options__chunk_tokens=3)


def test_settings_without_what_is_off():
  def flat(**overrides):
    return moe_rules.effective_settings(
      tiny.make(**{f'model__moe__{key}': v for key, v in overrides.items()}).model.moe
    )

  plain = flat()
  assert plain['router'] == 'topk' and plain['balance.expert_level.weight'] == 1.0
  assert not [key for key in plain if key.startswith(('expert_bias', 'capacity', 'balance.switch'))]
  assert 'group_score' not in plain and 'balance.adaptive.slope' not in plain
  assert 'options.input_jitter' not in plain
  full = flat(
    expert_bias__update_rule='sign',
    capacity__policy='score',
    balance__switch__weight=0.5,
    balance__adaptive__loss='gshard',
    num_expert_groups=4,
    num_limited_groups=2,
    options__input_jitter=0.1,
  )
  assert full['expert_bias.update_rate'] == 1e-3 and full['capacity.factor'] == 1.25
  assert full['balance.switch.scope'] == 'micro_batch' and full['balance.adaptive.slope'] == 0.2
  assert full['group_score'] == 'max' and full['options.input_jitter'] == 0.1
