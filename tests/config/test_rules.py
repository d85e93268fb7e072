import json

import ml_collections
import pytest

from configs import base
from moe_jax import errors
from moe_jax.balance import balance_losses
from moe_jax.config import moe_config, moe_rules, parse, router_traits, schema
from moe_jax.models import dispatch, routers
from tests import tiny


def test_round_trip():
  cfg = tiny.make(train__batch_ramp=((3, 2),))
  assert parse.from_dict(parse.to_dict(cfg)) == cfg


def test_round_trip_through_json():
  cfg = tiny.make(
    train__batch_ramp=((3, 2), (5, 4)),
    data__source='mixture',
    data__mixture=ml_collections.ConfigDict({'code': part(), 'prose': part(source='synthetic')}),
  )
  assert parse.from_dict(json.loads(json.dumps(parse.to_dict(cfg)))) == cfg
  assert isinstance(cfg.data.mixture['code'], schema.MixtureComponent)
  assert cfg.train.batch_ramp == ((3, 2), (5, 4))


def part(**overrides):
  return {'source': 'text', 'path': 'a.txt', 'weight': 1.0} | overrides


def test_a_config_is_frozen_and_holds_every_key_of_the_base_page():
  cfg = tiny.make()
  with pytest.raises(AttributeError):
    cfg.train.seed = 1

  def keys(d):
    return {k: keys(v) if isinstance(v, dict) else None for k, v in d.items()}

  assert keys(parse.to_dict(cfg)) == keys(base.get_config().to_dict())


def test_numbers_of_moe_layers():
  model = tiny.make(model__num_layers=5, model__num_dense_layers=2).model
  assert (model.is_moe, model.num_moe_layers) == (True, 3)
  dense = tiny.make(model__moe__num_experts=0, model__num_dense_layers=99).model
  assert (dense.is_moe, dense.num_moe_layers) == (False, 0)


def change(path: str, value):
  """The tiny values with one key set, whether or not it is known."""
  values = tiny.values()
  *sections, key = path.split('.')
  section = values
  for name in sections:
    section = section[name]
  section[key] = value
  return values


@pytest.mark.parametrize(
  'path, near',
  [
    ('model.num_layer', "config.model.num_layer is not a known key; did you mean 'num_layers'?"),
    ('model.moe.num_expert', "did you mean 'num_experts'?"),
    ('optim.peek_lr', "config.optim.peek_lr is not a known key; did you mean 'peak_lr'?"),
    ('modle', "config.modle is not a known key; did you mean 'model'?"),
    ('train.zzzzzz', 'config.train.zzzzzz is not a known key'),
  ],
)
def test_unknown_key_names_the_nearest(path, near):
  with pytest.raises(errors.InputError) as error:
    parse.from_dict(change(path, 1))
  assert near in str(error.value)
  assert ('did you mean' in str(error.value)) == ('did you mean' in near)


@pytest.mark.parametrize('path', ['model.moe.router', 'train.seed', 'data', 'mesh.data'])
def test_missing_key_is_named(path):
  values = tiny.values()
  *sections, key = path.split('.')
  section = values
  for name in sections:
    section = section[name]
  del section[key]
  with pytest.raises(errors.InputError, match=rf'config\.{path} is missing.*configs/base\.py'):
    parse.from_dict(values)


@pytest.mark.parametrize(
  'path, value, expected',
  [
    ('model.num_layers', 3.0, 'int, not float'),
    ('model.num_layers', '3', 'int, not str'),
    ('model.num_layers', True, 'int, not bool'),
    ('model.num_layers', None, 'int, not NoneType'),
    ('optim.peak_lr', '1e-3', 'float, not str'),
    ('optim.peak_lr', True, 'float, not bool'),
    ('model.moe.norm_topk_prob', 1, 'bool, not int'),
    ('model.moe.router', 3, 'str, not int'),
    ('optim.multi_step_boundaries', 0.8, 'tuple[float, ...], not float'),
    ('data.mixture', (), 'not tuple'),
  ],
)
def test_wrong_types(path, value, expected):
  with pytest.raises(errors.InputError) as error:
    parse.from_dict(change(path, value))
  assert str(error.value).startswith(f'config.{path}={value!r} must be of type ')
  assert str(error.value).endswith(expected)


def test_wrong_type_inside_a_tuple_or_a_mapping_is_named_with_its_place():
  with pytest.raises(errors.InputError, match=r"config\.optim\.multi_step_boundaries\[1\]='x'"):
    parse.from_dict(change('optim.multi_step_boundaries', (0.8, 'x')))
  with pytest.raises(errors.InputError, match=r'config\.train\.batch_ramp\[0\]=\(1, 2, 3\)'):
    parse.from_dict(change('train.batch_ramp', ((1, 2, 3),)))
  with pytest.raises(errors.InputError, match=r"config\.data\.mixture\.code\.weight='heavy'"):
    parse.from_dict(change('data.mixture', {'code': part(weight='heavy')}))
  with pytest.raises(errors.InputError, match=r'config\.model\.moe=8 must be a section'):
    parse.from_dict(change('model.moe', 8))


def test_ints_become_floats_and_lists_tuples():
  cfg = tiny.make(optim__peak_lr=1, optim__weight_decay=0)
  assert type(cfg.optim.peak_lr) is float and type(cfg.optim.weight_decay) is float
  cfg = parse.from_dict(change('optim.multi_step_boundaries', [0.5, 0.7]))
  assert cfg.optim.multi_step_boundaries == (0.5, 0.7)


# (overrides, what the message must hold: the field with its value, the rule, a way out).
AT_LEAST_1 = [
  *(f'model.{n}' for n in ('vocab_size', 'max_seq_len', 'embed_dim', 'mlp_dim', 'num_layers')),
  *('model.num_heads', 'model.attention.num_kv_heads', 'model.attention.head_dim'),
  *('model.moe.num_experts_per_tok', 'model.moe.moe_mlp_dim'),
  *('model.moe.num_expert_groups', 'model.moe.num_virtual_devices'),
  *('data.prefetch', 'data.synthetic_documents'),
  *('train.num_steps', 'train.batch_size', 'train.log_every'),
  *('checkpoint.save_every', 'checkpoint.keep_last'),
]
AT_LEAST_0 = [
  *('model.num_dense_layers', 'model.norm_eps', 'model.init_std'),
  *('model.moe.num_shared_experts', 'model.moe.num_limited_groups'),
  *(f'model.moe.options.{n}' for n in ('logit_norm_scale', 'chunk_tokens', 'replay_rows')),
  *('model.moe.options.inference_threshold', 'model.moe.expert_bias.update_rate'),
  *(f'model.moe.balance.{name}.weight' for name in moe_config.LOSSES),
  *(f'model.moe.balance.adaptive.{n}' for n in ('slope', 'max_coefficient', 'capacity_factor')),
  *('model.moe.capacity.group_rows', 'train.routing_every'),
  *(f'optim.{n}' for n in ('warmup_steps', 'final_lr_fraction', 'weight_decay', 'clip_norm')),
  *('optim.beta1', 'optim.beta2'),
  *('train.micro_batch_size', 'train.seed', 'train.z_loss_weight', 'train.eval_every'),
  *('train.sample_tokens', 'checkpoint.keep_every', 'paper.mlp_dim', 'paper.moe_mlp_dim'),
]


@pytest.mark.parametrize(
  'minimum, path', [(1, p) for p in AT_LEAST_1] + [(0, p) for p in AT_LEAST_0]
)
def test_minima(minimum, path):
  now = tiny.values()
  for key in path.split('.'):
    now = now[key]
  value = -0.5 if isinstance(now, float) else minimum - 1
  with pytest.raises(errors.InputError) as error:
    parse.from_dict(change(path, value))
  assert f'config.{path}={value}' in str(error.value)
  assert f'at least {minimum}' in str(error.value)


@pytest.mark.parametrize(
  'path',
  [
    *('model.dtype', 'model.param_dtype', 'model.remat', 'model.moe.router', 'model.moe.dispatch'),
    *('model.moe.grouped_matmul', 'model.moe.score_func', 'model.moe.group_score'),
    *('model.moe.options.hash_table', 'model.moe.options.inference'),
    *('model.moe.expert_bias.update_rule', 'model.moe.expert_bias.form'),
    *(f'model.moe.balance.{name}.scope' for name in moe_config.LOSSES),
    *('model.moe.balance.adaptive.loss', 'model.moe.capacity.policy'),
    *('data.source', 'optim.schedule'),
  ],
)
def test_choices_list_what_there_is(path):
  with pytest.raises(errors.InputError) as error:
    parse.from_dict(change(path, 'zzz'))
  assert f"config.{path}='zzz' must be one of " in str(error.value)


def test_a_mistyped_choice_names_the_nearest():
  with pytest.raises(errors.InputError, match="did you mean 'cosine'"):
    parse.from_dict(change('optim.schedule', 'cosin'))


def test_choices_are_the_entries_of_their_registries():
  assert list(router_traits.LIBRARY) == list(routers.ROUTERS)
  assert set(moe_config.DISPATCHES) == set(dispatch.DISPATCHES)
  assert set(moe_config.LOSSES) == {*balance_losses.LOSSES, 'attention_mutual_information'}
  # The adaptive coefficient replaces the weight of any loss of the experts' routers.
  for name in ('', *balance_losses.LOSSES):
    assert (
      tiny.make(model__moe__balance__adaptive__loss=name).model.moe.balance.adaptive.loss == name
    )
  with pytest.raises(errors.InputError, match="adaptive.loss='attention_mutual_information'"):
    tiny.make(model__moe__balance__adaptive__loss='attention_mutual_information')


MIXTURE = {'data__source': 'mixture'}


@pytest.mark.parametrize(
  'overrides, parts',
  [
    (
      {'model__attention__num_kv_heads': 3},
      ('model.attention.num_kv_heads=3', 'must divide', 'num_heads=2', 'choose a divisor of 2'),
    ),
    (
      {'model__attention__head_dim': 7},
      ('model.attention.head_dim=7', 'must be even', 'choose 8'),
    ),
    ({'model__attention__rope__theta': 1.0}, ('model.attention.rope.theta=1.0', 'above 1')),
    (
      {'model__moe__num_experts_per_tok': 9},
      ('num_experts_per_tok=9', 'must not exceed', 'num_experts=8', 'choose at most 8'),
    ),
    (
      {'model__num_dense_layers': 3},
      ('num_dense_layers=3', 'num_layers=3', 'lower it', 'num_experts=0'),
    ),
    ({'model__moe__num_experts': -1}, ('num_experts=-1', 'must be 0', 'or positive')),
    ({'mesh__data': 0}, ('mesh.data=0', 'number of devices', '-1')),
    ({'mesh__data': -2}, ('mesh.data=-2', 'number of devices', '-1')),
    ({'data__heldout_fraction': 1.5}, ('data.heldout_fraction=1.5', 'between 0 and 1')),
    ({'data__heldout_fraction': 0.0}, ('data.heldout_fraction=0.0', 'between 0 and 1')),
    ({'data__heldout_fraction': 1.0}, ('data.heldout_fraction=1.0', 'strictly between')),
    ({'data__fim_rate': -0.1}, ('data.fim_rate=-0.1', 'between 0 and 1')),
    ({'data__source': 'text'}, ("data.path=''", "data.source='text'", 'must name a file')),
    (MIXTURE, ('data.mixture={}', 'must name at least one component')),
    (
      {'data__mixture': {'code': part()}},
      ('data.mixture is set', "data.source='python_source'", "set data.source='mixture'"),
    ),
    (
      MIXTURE | {'data__mixture': {'code': part(source='mixture')}},
      ("data.mixture.code.source='mixture'", 'must be one of'),
    ),
    (
      MIXTURE | {'data__mixture': {'code': part(weight=0.0)}},
      ('data.mixture.code.weight=0.0', 'positive', 'drop the component'),
    ),
    (
      MIXTURE | {'data__mixture': {'code': part(path='')}},
      ("data.mixture.code.path=''", 'must name a file', "'text'"),
    ),
    ({'optim__schedule': 'stages'}, ('optim.stages=()', 'set both')),
    ({'optim__stages': ((1.0, 1.0, 'cosine'),)}, ('optim.stages=', 'set both')),
    (
      {'optim__schedule': 'stages', 'optim__stages': ((0.9, 1.0, 'cosine'),)},
      ('optim.stages=', 'rise to 1.0'),
    ),
    (
      {'optim__schedule': 'stages', 'optim__stages': ((1.0, 1.0, 'step'),)},
      ('optim.stages', "'step'"),
    ),
    ({'optim__peak_lr': 0.0}, ('optim.peak_lr=0.0', 'positive')),
    ({'optim__peak_lr': float('nan')}, ('optim.peak_lr=nan', 'finite')),
    ({'optim__eps': 0.0}, ('optim.eps=0.0', 'positive')),
    ({'optim__beta2': 1.0}, ('optim.beta2=1.0', '[0, 1)')),
    (
      {'optim__multi_step_boundaries': (0.9, 0.8)},
      ('optim.multi_step_boundaries=(0.9, 0.8)', 'rising shares'),
    ),
    ({'optim__multi_step_boundaries': (0.5, 1.0)}, ('(0.5, 1.0)', 'between 0 and 1')),
    (
      {'optim__warmup_steps': 20},
      ('optim.warmup_steps=20', 'train.num_steps=20', 'lower it, or train longer'),
    ),
    (
      {'train__batch_ramp': ((5, 2), (3, 4))},
      ('train.batch_ramp=((5, 2), (3, 4))', '(until step, batch size)', 'rise'),
    ),
    ({'train__batch_ramp': ((0, 2),)}, ('train.batch_ramp=((0, 2),)', 'positive')),
    ({'train__batch_ramp': ((3, 0),)}, ('train.batch_ramp=((3, 0),)', 'positive batch sizes')),
    (
      {'train__micro_batch_size': 3},
      ('train.micro_batch_size=3', 'must divide', '8', 'choose a divisor of 8, or 0'),
    ),
    (
      {'train__micro_batch_size': 4, 'train__batch_ramp': ((3, 6),)},
      ('train.micro_batch_size=4', '6', 'choose a divisor of 6, or 0'),
    ),
  ],
)
def test_rules(overrides, parts):
  assert_refused(overrides, parts)


def assert_refused(overrides, parts):
  """`overrides` are refused in one message that holds all of `parts`."""
  values = tiny.values()
  for path, value in overrides.items():
    *sections, key = path.split('__')
    section = values
    for name in sections:
      section = section[name]
    section[key] = value
  with pytest.raises(errors.InputError) as error:
    parse.from_dict(values)
  for words in parts:
    assert words in str(error.value)
  assert str(error.value).startswith('config.')


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
  assert_refused(overrides, ('config.model.moe.', *parts))


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
  assert_refused(good | bad, (*parts, 'num_dense_layers=', 'or set it to 0'))


def test_groups_and_chunks_fit_every_forward_pass():
  """Micro-batches and the batches of a ramp; where nothing competes any number will do."""
  groups = {'model__moe__capacity__policy': 'score', 'model__moe__capacity__group_rows': 4}
  tiny.make(**groups)
  parts = ('capacity.group_rows=4', 'rows of a forward pass, 2')
  assert_refused(groups | {'train__micro_batch_size': 2}, parts)
  parts = ('capacity.group_rows=4', 'rows of a forward pass, 6')
  assert_refused(groups | {'train__batch_ramp': ((3, 6),)}, parts)
  chunks = {'model__moe__router': 'expert_choice', 'model__moe__options__chunk_tokens': 64}
  tiny.make(**chunks)
  parts = ('options.chunk_tokens=64', '2 rows x 16')
  assert_refused(chunks | {'train__micro_batch_size': 2}, parts)
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


def test_diff_lists_leaves_that_differ():
  old = {'a': 1, 'b': {'c': 2, 'd': (1, 2)}, 'same': {'x': 0}, 'gone': 3}
  new = {'a': 1, 'b': {'c': 5, 'd': (1, 3)}, 'same': {'x': 0}, 'come': 'y'}
  assert parse.diff(old, new) == [
    'b.c: 2 -> 5',
    'b.d: (1, 2) -> (1, 3)',
    "come: '<absent>' -> 'y'",
    "gone: 3 -> '<absent>'",
  ]
  assert parse.diff(new, new) == []
