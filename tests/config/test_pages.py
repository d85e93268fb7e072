"""Config pages by name and by path, and what is said about mistakes in them."""

import pathlib

import pytest

from moe_jax import errors
from moe_jax.config import pages

ROOT = pathlib.Path(__file__).parents[2]


def test_by_name_from_any_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for spec in (
    'routing:expert_choice',
    'routing.py:expert_choice',
    'configs/routing.py:expert_choice',
  ):
    assert pages.read(spec).model.moe.router == 'expert_choice', spec
  assert pages.find('quickstart') == ROOT / 'configs/quickstart.py'


def test_a_file_of_the_same_name_comes_first(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  own = pathlib.Path('quickstart.py')
  own.write_text('')
  assert pages.find('quickstart.py') == own
  assert pages.find('quickstart') == ROOT / 'configs/quickstart.py'


def test_a_slip_in_a_name(tmp_path, monkeypatch):
  with pytest.raises(errors.InputError, match="no such config page; did you mean 'quickstart'"):
    pages.values('quickstrat')
  with pytest.raises(errors.InputError, match='no such config page'):
    pages.values('elsewhere/quickstart')
  for nothing in ('', '/', '.'):
    with pytest.raises(errors.InputError, match='names no config page; give one'):
      pages.values(nothing)
  for long in ('a' * 300, 'a' * 300 + '/page.py'):
    with pytest.raises(errors.InputError, match='no such config page'):
      pages.values(long)
  monkeypatch.chdir(tmp_path)
  with pytest.raises(errors.InputError, match="did you mean 'configs/smoke.py'"):
    pages.values('configs/smok.py')


def test_load_page_by_path_and_variant():
  values = pages.read(f'{ROOT}/configs/deepseekmoe_2b.py:gshard')
  assert values.model.moe.num_experts == 16


@pytest.mark.parametrize(
  'name, text, message',
  [
    ('page.py:moe', 'def get_config(): pass', "takes no variant 'moe'"),
    ('page.py', 'def get_config(variant): pass', 'needs a variant'),
    ('page.py', 'x = 1', 'has no get_config'),
    ('page.py', 'def get_config(:', 'line 1'),
    ('page.txt', '', 'no such config page'),
    (
      'page.py:b',
      'from configs import base, recipes\ndef get_config(variant):\n'
      "  return recipes.variant(base.get_config(), variant, {'a': print})",
      "unknown variant 'b'.*choose one of a",
    ),
    (
      'page.py',
      'from configs import base\ndef get_config():\n'
      '  c = base.get_config()\n  c.model.num_layer = 3\n  return c',
      "config.model.num_layer is not a known key; did you mean 'num_layers'",
    ),
  ],
)
def test_bad_pages(tmp_path, name, text, message):
  (tmp_path / name.partition(':')[0]).write_text(text)
  with pytest.raises(errors.InputError, match=message):
    pages.read(f'{tmp_path}/{name}')


@pytest.mark.parametrize(
  'text, message',
  [
    ("  config.model.num_layers = '3'", 'num_layers'),
    ('  config.model.num_layer = 3', 'num_layer'),
    ('  import nosuchmodule', 'line 5: ModuleNotFoundError: .*nosuchmodule'),
    ('  assert not config.model.num_layers, "odd"', 'line 5: AssertionError: odd'),
    ('  "a".split(",")[1]', 'line 5: IndexError: list index'),
    ('  open("/no/such/file")', 'line 5: FileNotFoundError'),
    ('  raise ValueError("choose another")', 'page.py: choose another'),
    ('  return None', 'must return a ConfigDict, not NoneType; begin with'),
    ('  return {"a": 1}', 'must return a ConfigDict, not dict'),
  ],
)
def test_slips_in_a_page_are_one_line(tmp_path, text, message):
  page = tmp_path / 'page.py'
  head = 'from configs import base\n\ndef get_config():\n  config = base.get_config().lock()\n'
  page.write_text(f'{head}{text}\n  return config\n')
  with pytest.raises(errors.InputError, match=message):
    pages.read(str(page))
