"""Overrides of config pages, in all spellings and in any order."""

import json
import pathlib

import pytest

from experiments.common import cli, config_overrides
from moe_jax import errors
from tests import tiny

ROOT = pathlib.Path(__file__).parents[3]
BASE = f'--config={ROOT}/configs/base.py'


def read(*arguments: str):
  """The page and the other arguments of a command line."""
  (spec,), overrides, others = config_overrides.split(['train', *arguments])
  return config_overrides.read(spec, overrides), others


@pytest.mark.parametrize(
  'key, message',
  [
    ('optimm.peak_lr', "config.optimm is not a known key; did you mean 'optim'"),
    ('optim.peak_lr.x', 'config.optim.peak_lr is a single value, it has no key'),
    ('train.xxxxxxxx', r'config.train.xxxxxxxx is not a known key$'),
    ('train.batch_ramp[0]', r'config.train.batch_ramp\[0\] cannot be set by itself'),
    ('optim.multi_step_boundaries[1]', r'\[1\] .* give the whole value, --config.optim.multi_step'),
    ('optim.multi_step_boundaries[1', r'boundaries\[1 cannot be set'),
    ('train.seed[0]', r'config.train.seed\[0\] cannot be set'),
    ('train[0].seed', r'config.train\[0\] cannot be set'),
  ],
)
def test_unknown_keys_name_the_nearest_known_one(key, message):
  with pytest.raises(errors.InputError, match=message):
    read(BASE, f'--config.{key}', '1')


def test_known_keys_pass_in_all_spellings():
  arguments = ['--config', f'{ROOT}/configs/base.py', '-config.train.seed', '1', '--workdir=w']
  switches = ['--noconfig.model.moe.norm_topk_prob', '--config.model.scan_layers', '--x']
  page, others = read(*arguments, *switches, '--', '--config.x=1')
  assert page.train.seed == 1 and page.is_locked
  assert page.model.moe.norm_topk_prob is False and page.model.scan_layers is True
  assert others == ['train', '--workdir=w', '--x', '--', '--config.x=1']


@pytest.mark.parametrize('start, refused', [('deepseek_llm', True), ('template', False)])
def test_a_template_of_the_page_must_be_that_of_the_format(tmp_path, start, refused):
  values = tiny.values(data__chat_format=start, data__chat_template='{{ y }}')
  (tmp_path / 'config.json').write_text(json.dumps({'config': values}))
  tuned = ('--config=sft', f'--config.init_from={tmp_path}')
  assert read(*tuned)[0].data.chat_template == '{{ y }}'  # of the start, which may be carried
  given = '--config.data.chat_template={{ x }}'
  for command, wrong in (
    ((*tuned, given), refused),
    ((BASE, given), True),
    ((BASE, given, '--config.data.chat_format=template'), False),
  ):
    if wrong:
      with pytest.raises(errors.InputError, match="'deepseek_llm' would ignore it; set data.chat_"):
        read(*command)
    else:
      assert read(*command)[0].data.chat_template == '{{ x }}'


def test_a_page_without_sections_is_told_so(tmp_path):
  (tmp_path / 'page.py').write_text(
    'import ml_collections\ndef get_config(): return ml_collections.ConfigDict()\n'
  )
  with pytest.raises(errors.InputError, match='is missing; start the config page from'):
    cli.resolve(read(f'--config={tmp_path}/page.py')[0])


def test_the_order_of_arguments_does_not_matter():
  first, _ = read('--config.train.seed=7', '--config.optim.peak_lr', '0.5', BASE)
  second, _ = read(BASE, '--config.optim.peak_lr=0.5', '--config.train.seed=7')
  assert first.to_dict() == second.to_dict()
  assert (first.train.seed, first.optim.peak_lr) == (7, 0.5)


def test_the_last_of_two_overrides_holds():
  assert read('--config.train.seed=7', BASE, '--config.train.seed=8')[0].train.seed == 8


def test_a_routing_that_is_no_router_leads_to_its_page():
  page, _ = read('--config=quickstart', '--config.model.moe.router=gshard')
  with pytest.raises(
    errors.InputError, match=r'router=.gshard. must be .* --config=routing:gshard'
  ):
    cli.resolve(page)
  page, _ = read('--config=quickstart', '--config.model.moe.router=gsharp')
  with pytest.raises(errors.InputError, match=r'^((?!routing:).)*$'):
    cli.resolve(page)


def test_two_pages_where_one_is_read():
  flag = cli.PageFlag(repeated=False)
  with pytest.raises(errors.InputError, match='given 2 times'):
    flag.read(['smoke', 'quickstart'], [])
