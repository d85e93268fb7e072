import json

import pytest

from moe_jax import errors
from moe_jax.data import kept_files
from moe_jax.data import tokenizer as tokenizer_lib

TOKENIZER = tokenizer_lib.byte_tokenizer('<s>', '</s>')
END = TOKENIZER.eos_id
TURN = TOKENIZER.fim_ids[0]  # stands for the end of a turn


def ends(directory, **files) -> tuple[int, ...]:
  for path in directory.iterdir():
    path.unlink()
  for name, content in files.items():
    (directory / f'{name}.json').write_text(json.dumps(content))
  return kept_files.end_ids(directory, TOKENIZER)


def test_every_end_token_that_a_file_names_ends_a_text(tmp_path):
  assert ends(tmp_path) == (END,)
  assert ends(tmp_path, generation_config={'eos_token_id': [END, 9, 7]}) == (END, 9, 7)
  assert ends(tmp_path, generation_config={'eos_token_id': 9}) == (END, 9)
  assert ends(tmp_path, config={'eos_token_id': [9]}) == (END, 9)
  assert ends(tmp_path, config={'eos_token_id': 0}) == (END, 0)
  both = {'generation_config': {'eos_token_id': 8}, 'config': {'eos_token_id': 9}}
  assert ends(tmp_path, **both) == (END, 8)
  assert ends(tmp_path, **both | {'generation_config': {'eos_token_id': None}}) == (END, 9)
  turn = tokenizer_lib.FIM_TOKENS[0]
  assert ends(tmp_path, tokenizer_config={'eos_token': {'content': turn}}) == (END, TURN)
  assert ends(tmp_path, tokenizer_config={'eos_token': turn}) == (END, TURN)
  assert ends(tmp_path, tokenizer_config={'eos_token': 'no such token'}) == (END,)


@pytest.mark.parametrize('value', ['7', -1, True, [7, 1.5], {'a': 1}, 10**30])
def test_what_is_no_id_is_refused(tmp_path, value):
  with pytest.raises(errors.InputError, match='generation_config.json: eos_token_id='):
    ends(tmp_path, generation_config={'eos_token_id': value})


def template(directory, **content) -> str:
  (directory / 'tokenizer_config.json').write_text(json.dumps(content))
  return kept_files.chat_template(directory)


def test_the_template_of_a_checkpoint(tmp_path):
  assert kept_files.chat_template(tmp_path) == template(tmp_path) == ''
  assert template(tmp_path, chat_template='{{ a }}') == '{{ a }}'
  several = [{'name': 'tools', 'template': 'b'}, {'name': 'default', 'template': 'c'}]
  assert template(tmp_path, chat_template=several) == 'c'
  assert template(tmp_path, chat_template=several[:1]) == ''
  for bad in (7, [{'name': 'default', 'template': 7}]):
    with pytest.raises(errors.InputError, match='tokenizer_config.json: chat_template must be'):
      template(tmp_path, chat_template=bad)
  (tmp_path / 'chat_template.jinja').write_text('{{ d }}', encoding='utf-8')
  assert template(tmp_path, chat_template='{{ a }}') == '{{ d }}'
  (tmp_path / 'chat_template.jinja').write_bytes(b'\xff')
  with pytest.raises(errors.InputError, match='chat_template.jinja must be readable UTF-8'):
    kept_files.chat_template(tmp_path)


def test_files_are_carried_once_and_whole(tmp_path):
  source, target = tmp_path / 'a', tmp_path / 'b'
  source.mkdir(), target.mkdir()
  kept_files.carry(source, target)
  assert list(target.iterdir()) == []
  (source / 'hf').mkdir()
  (source / 'hf/chat_template.jinja').write_text('{{ x }}')
  kept_files.carry(source, target)
  (source / 'hf/chat_template.jinja').write_text('another')
  kept_files.carry(source, target)
  assert [p.name for p in target.iterdir()] == ['hf']
  assert (target / 'hf/chat_template.jinja').read_text() == '{{ x }}'


def test_an_import_with_one_matrix_at_both_ends_is_not_trained_as_two_in_silence(tmp_path):
  kept_files.require_untied(str(tmp_path), 'config.init_from')  # a run of our own
  (tmp_path / 'hf').mkdir()
  (tmp_path / 'hf/config.json').write_text('{"tie_word_embeddings": true}')
  (tmp_path / 'hf/moe_jax.json').write_text('{}')
  with pytest.raises(errors.InputError, match='config.init_from=.*--untie'):
    kept_files.require_untied(str(tmp_path), 'config.init_from')
  (tmp_path / 'hf/moe_jax.json').write_text('{"untied": true}')
  kept_files.require_untied(str(tmp_path), 'config.init_from')


@pytest.mark.parametrize('named_by', ['generation_config', 'config'])
def test_a_workdir_of_another_model_gets_what_speaks_of_text(tmp_path, named_by):
  kept = tmp_path / 'dense' / kept_files.DIRECTORY
  kept.mkdir(parents=True)
  for name in ('config.json', kept_files.RECORD, 'generation_config.json'):
    (kept / name).write_text('{}')
  (kept / 'chat_template.jinja').write_text('a template')
  (kept / f'{named_by}.json').write_text(json.dumps({'eos_token_id': [END, 9]}))
  kept_files.carry_without_model(tmp_path / 'dense', tmp_path / 'moe')
  made = tmp_path / 'moe' / kept_files.DIRECTORY
  assert {path.name for path in made.iterdir()} == {'chat_template.jinja', 'generation_config.json'}
  assert kept_files.end_ids(made, TOKENIZER) == (END, 9)
  kept_files.carry_without_model(tmp_path / 'nothing', tmp_path / 'other')
  assert not (tmp_path / 'other').exists()
