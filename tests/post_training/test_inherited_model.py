import json

import pytest

from configs import sft
from moe_jax import errors
from moe_jax.config import parse
from moe_jax.post_training import inherited_model
from tests import tiny


@pytest.fixture
def source(tmp_path):
  values = tiny.values(
    model__moe__expert_bias__update_rule='sign',
    model__moe__balance__router_z__weight=0.1,
    model__embed_dim=24,
    data__eos_token='<end>',
  )
  (tmp_path / 'config.json').write_text(json.dumps({'config': values}))
  return tmp_path


def page(source, **changes):
  values = sft.get_config().to_dict() | {'init_from': str(source)}
  values['objective'] |= changes
  return values


def test_model_and_tokenizer_are_the_sources(source):
  found = inherited_model.applied(page(source))
  cfg = parse.from_dict(found)
  assert cfg.model.embed_dim == 24
  assert cfg.data.tokenizer == str(source / 'tokenizer.json') and cfg.data.eos_token == '<end>'
  moe = cfg.model.moe
  assert not any(moe.loss(name).weight for name in ('expert_level', 'router_z'))
  # The rule stays: without it the bias would leave the model, and with it the routing.
  assert (moe.expert_bias.update_rule, moe.expert_bias.update_rate) == ('sign', 0.0)


def test_balance_goes_on_if_asked_for(source):
  moe = parse.from_dict(inherited_model.applied(page(source, balance=True))).model.moe
  assert moe.loss('router_z').weight == 0.1 and moe.expert_bias.update_rate > 0


def test_nothing_is_inherited_unasked(source):
  values = page(source, inherit=False)
  assert inherited_model.applied(values) is values
  assert inherited_model.applied(values | {'init_from': ''})['init_from'] == ''


@pytest.mark.parametrize(
  'kind, left', [('sft', 1), ('next_token', 1), ('dpo', 0), ('policy', 0), ('process_reward', 0)]
)
def test_prediction_modules_are_inherited_where_they_are_trained(source, kind, left):
  record = json.loads((source / 'config.json').read_text())
  record['config']['model']['num_mtp_layers'] = 1
  (source / 'config.json').write_text(json.dumps(record))
  assert inherited_model.applied(page(source, kind=kind))['model']['num_mtp_layers'] == left


def test_an_older_record_is_completed(source):
  record = json.loads((source / 'config.json').read_text())
  del record['config']['objective'], record['config']['optim']['spike_sigma']
  (source / 'config.json').write_text(json.dumps(record))
  assert parse.from_dict(inherited_model.applied(page(source))).model.embed_dim == 24


def test_the_form_of_conversations_is_the_sources(source):
  assert parse.from_dict(inherited_model.applied(page(source))).data.chat_format == 'deepseek_llm'
  (source / 'hf').mkdir()
  (source / 'hf/chat_template.jinja').write_text('{{ older }}')
  data = inherited_model.applied(page(source))['data']
  assert (data['chat_format'], data['chat_template']) == ('deepseek_llm', '{{ older }}')
  record = json.loads((source / 'config.json').read_text())
  record['config']['data'] |= {'chat_format': 'template', 'chat_template': '{{ x }}'}
  (source / 'config.json').write_text(json.dumps(record))
  data = inherited_model.applied(page(source))['data']
  assert (data['chat_format'], data['chat_template']) == ('template', '{{ x }}')
  own = page(source)
  own['data'] |= {'chat_format': 'deepseek_v3', 'chat_template': '{{ own }}'}
  data = inherited_model.applied(own)['data']
  assert (data['chat_format'], data['chat_template']) == ('deepseek_v3', '{{ own }}')


@pytest.mark.parametrize('record', [{'config': {}}, {'config': []}, {'config': {'model': {}}}, []])
def test_a_record_of_nothing(tmp_path, record):
  (tmp_path / 'config.json').write_text(json.dumps(record))
  with pytest.raises(errors.InputError, match='config.json is no record of one'):
    inherited_model.applied(page(tmp_path))


def test_no_run_there(tmp_path):
  with pytest.raises(errors.InputError, match='config.init_from=.* must be the directory of a run'):
    inherited_model.applied(page(tmp_path / 'nowhere'))


def test_a_page_without_a_start_is_told_so_first():
  with pytest.raises(errors.InputError, match="config.init_from='' must name the run"):
    parse.from_dict(sft.get_config().to_dict())
