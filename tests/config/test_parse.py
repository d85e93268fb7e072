import json

import ml_collections
import pytest

from moe_jax import errors
from moe_jax.config import parse, schema
from tests import tiny
from tests.config import changes


def test_round_trip():
  cfg = tiny.make(train__batch_ramp=((3, 2),))
  assert parse.from_dict(parse.to_dict(cfg)) == cfg


def test_round_trip_through_json():
  cfg = tiny.make(
    train__batch_ramp=((3, 2), (5, 4)),
    data__source='mixture',
    data__mixture=ml_collections.ConfigDict(
      {'code': changes.part(), 'prose': changes.part(source='synthetic')}
    ),
  )
  assert parse.from_dict(json.loads(json.dumps(parse.to_dict(cfg)))) == cfg
  assert isinstance(cfg.data.mixture['code'], schema.MixtureComponent)
  assert cfg.train.batch_ramp == ((3, 2), (5, 4))


def test_a_record_loses_a_path_that_was_never_read():
  mixture = {'data__source': 'mixture', 'data__mixture': {'code': changes.part()}}
  values = tiny.values(**mixture, data__path='a.txt')
  assert parse.from_record(values).data.path == '' and values['data']['path'] == 'a.txt'
  assert parse.from_record(tiny.values(data__source='text', data__path='a')).data.path == 'a'


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
    parse.from_dict(changes.change(path, 1))
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
    parse.from_dict(changes.change(path, value))
  assert str(error.value).startswith(f'config.{path}={value!r} must be of type ')
  assert str(error.value).endswith(expected)


def test_wrong_type_inside_a_tuple_or_a_mapping_is_named_with_its_place():
  with pytest.raises(errors.InputError, match=r"config\.optim\.multi_step_boundaries\[1\]='x'"):
    parse.from_dict(changes.change('optim.multi_step_boundaries', (0.8, 'x')))
  with pytest.raises(errors.InputError, match=r'config\.train\.batch_ramp\[0\]=\(1, 2, 3\)'):
    parse.from_dict(changes.change('train.batch_ramp', ((1, 2, 3),)))
  with pytest.raises(errors.InputError, match=r"config\.data\.mixture\.code\.weight='heavy'"):
    parse.from_dict(changes.change('data.mixture', {'code': changes.part(weight='heavy')}))
  with pytest.raises(errors.InputError, match=r'config\.model\.moe=8 must be a section'):
    parse.from_dict(changes.change('model.moe', 8))


def test_ints_become_floats_and_lists_tuples():
  cfg = tiny.make(optim__peak_lr=1, optim__weight_decay=0)
  assert type(cfg.optim.peak_lr) is float and type(cfg.optim.weight_decay) is float
  cfg = parse.from_dict(changes.change('optim.multi_step_boundaries', [0.5, 0.7]))
  assert cfg.optim.multi_step_boundaries == (0.5, 0.7)


def test_a_mistyped_choice_names_the_nearest():
  with pytest.raises(errors.InputError, match="did you mean 'cosine'"):
    parse.from_dict(changes.change('optim.schedule', 'cosin'))


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
