import json

import ml_collections
import pytest
import tiny

from configs import base
from moe_jax import config, errors


def test_round_trip():
  cfg = tiny.make(train__batch_ramp=((3, 2),))
  assert config.from_dict(config.to_dict(cfg)) == cfg


def test_round_trip_through_json():
  cfg = tiny.make(
    train__batch_ramp=((3, 2), (5, 4)),
    data__source='mixture',
    data__mixture=ml_collections.ConfigDict({'code': part(), 'prose': part(source='synthetic')}),
  )
  assert config.from_dict(json.loads(json.dumps(config.to_dict(cfg)))) == cfg
  assert isinstance(cfg.data.mixture['code'], config.MixtureComponent)
  assert cfg.train.batch_ramp == ((3, 2), (5, 4))


def part(**overrides):
  return {'source': 'text', 'path': 'a.txt', 'weight': 1.0} | overrides


def test_a_config_is_frozen_and_holds_every_key_of_the_base_page():
  cfg = tiny.make()
  with pytest.raises(AttributeError):
    cfg.train.seed = 1
  keys = lambda d: {k: keys(v) if isinstance(v, dict) else None for k, v in d.items()}
  assert keys(config.to_dict(cfg)) == keys(base.get_config().to_dict())


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
    config.from_dict(change(path, 1))
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
    config.from_dict(values)


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
    config.from_dict(change(path, value))
  assert str(error.value).startswith(f'config.{path}={value!r} must be of type ')
  assert str(error.value).endswith(expected)


def test_wrong_type_inside_a_tuple_or_a_mapping_is_named_with_its_place():
  with pytest.raises(errors.InputError, match=r"config\.optim\.multi_step_boundaries\[1\]='x'"):
    config.from_dict(change('optim.multi_step_boundaries', (0.8, 'x')))
  with pytest.raises(errors.InputError, match=r'config\.train\.batch_ramp\[0\]=\(1, 2, 3\)'):
    config.from_dict(change('train.batch_ramp', ((1, 2, 3),)))
  with pytest.raises(errors.InputError, match=r"config\.data\.mixture\.code\.weight='heavy'"):
    config.from_dict(change('data.mixture', {'code': part(weight='heavy')}))
  with pytest.raises(errors.InputError, match=r'config\.model\.moe=8 must be a section'):
    config.from_dict(change('model.moe', 8))


def test_ints_become_floats_and_lists_tuples():
  cfg = tiny.make(optim__peak_lr=1, optim__weight_decay=0)
  assert type(cfg.optim.peak_lr) is float and type(cfg.optim.weight_decay) is float
  cfg = config.from_dict(change('optim.multi_step_boundaries', [0.5, 0.7]))
  assert cfg.optim.multi_step_boundaries == (0.5, 0.7)


# (overrides, what the message must hold: the field with its value, the rule, a way out).
AT_LEAST_1 = [
  *(f'model.{n}' for n in ('vocab_size', 'max_seq_len', 'embed_dim', 'mlp_dim', 'num_layers')),
  *('model.num_heads', 'model.attention.num_kv_heads', 'model.attention.head_dim'),
  *('model.moe.num_experts_per_tok', 'model.moe.moe_mlp_dim'),
  *('data.prefetch', 'data.synthetic_documents'),
  *('train.num_steps', 'train.batch_size', 'train.log_every'),
  *('checkpoint.save_every', 'checkpoint.keep_last'),
]
AT_LEAST_0 = [
  *('model.num_dense_layers', 'model.norm_eps', 'model.init_std'),
  *('model.moe.num_shared_experts', 'model.moe.load_balance_loss_weight'),
  *(f'optim.{n}' for n in ('warmup_steps', 'final_lr_fraction', 'weight_decay', 'clip_norm')),
  *('optim.beta1', 'optim.beta2'),
  *('train.micro_batch_size', 'train.seed', 'train.z_loss_weight', 'train.eval_every'),
  *('train.sample_tokens', 'checkpoint.keep_every', 'paper.mlp_dim', 'paper.moe_mlp_dim'),
]


@pytest.mark.parametrize(
  'minimum, path', [(1, p) for p in AT_LEAST_1] + [(0, p) for p in AT_LEAST_0]
)
def test_minima(minimum, path):
  value = minimum - 1
  if path.endswith(('_std', '_eps', '_fraction', '_decay', '_norm', 'beta1', 'beta2', '_weight')):
    value = -0.5
  if path.startswith('paper'):
    value = -0.5
  with pytest.raises(errors.InputError) as error:
    config.from_dict(change(path, value))
  assert f'config.{path}={value}' in str(error.value)
  assert f'at least {minimum}' in str(error.value)


@pytest.mark.parametrize(
  'path',
  [
    *('model.dtype', 'model.param_dtype', 'model.remat', 'model.moe.router', 'model.moe.dispatch'),
    *('model.moe.grouped_matmul', 'data.source', 'optim.schedule'),
  ],
)
def test_choices_list_what_there_is(path):
  with pytest.raises(errors.InputError) as error:
    config.from_dict(change(path, 'zzz'))
  assert f"config.{path}='zzz' must be one of " in str(error.value)


def test_a_mistyped_choice_names_the_nearest():
  with pytest.raises(errors.InputError, match="did you mean 'cosine'"):
    config.from_dict(change('optim.schedule', 'cosin'))


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
    ({'model__attention__rope_theta': 0.0}, ('model.attention.rope_theta=0.0', 'positive')),
    (
      {'model__moe__num_experts_per_tok': 9},
      ('num_experts_per_tok=9', 'must not exceed', 'num_experts=8', 'choose at most 8'),
    ),
    (
      {'model__moe__router': 'gshard_top2', 'model__moe__num_experts_per_tok': 3},
      ('num_experts_per_tok=3 must be 2', "router='gshard_top2'", 'set it to 2', 'softmax_topk'),
    ),
    (
      {'model__moe__router': 'switch_top1'},
      ('num_experts_per_tok=2 must be 1', "router='switch_top1'", 'set it to 1', 'softmax_topk'),
    ),
    (
      {'model__moe__router': 'gshard_top2', 'model__moe__norm_topk_prob': True},
      ('norm_topk_prob=True', 'gshard_top2', 'set it to False'),
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
    ({'optim__peak_lr': 0.0}, ('optim.peak_lr=0.0', 'positive')),
    ({'optim__peak_lr': float('nan')}, ('optim.peak_lr=nan', 'positive')),
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
  values = tiny.values()
  for path, value in overrides.items():
    *sections, key = path.split('__')
    section = values
    for name in sections:
      section = section[name]
    section[key] = value
  with pytest.raises(errors.InputError) as error:
    config.from_dict(values)
  for words in parts:
    assert words in str(error.value)
  assert str(error.value).startswith('config.')


def test_diff_lists_leaves_that_differ():
  old = {'a': 1, 'b': {'c': 2, 'd': (1, 2)}, 'same': {'x': 0}, 'gone': 3}
  new = {'a': 1, 'b': {'c': 5, 'd': (1, 3)}, 'same': {'x': 0}, 'come': 'y'}
  assert config.diff(old, new) == [
    'b.c: 2 -> 5',
    'b.d: (1, 2) -> (1, 3)',
    "come: '<absent>' -> 'y'",
    "gone: 3 -> '<absent>'",
  ]
  assert config.diff(new, new) == []
