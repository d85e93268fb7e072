"""Decoded, the tokens that are learned are the answers with their end tokens, and nothing else."""

import dataclasses
import random

import numpy as np
import pytest

from configs import base
from moe_jax import errors
from moe_jax.config import schema
from moe_jax.data import chat_formats, conversations
from moe_jax.data import tokenizer as tokenizer_lib
from tests.data import rendered_chats

BOS, EOS = base.get_config().data.bos_token, base.get_config().data.eos_token
# Space at both ends, ends of lines, what formats and tokens are spelled with, several bytes each.
NAMES = (*chat_formats.FORMATS, 'template')
TOKENS = ['<｜User｜>', '<｜Assistant｜>']
WORDS = ('', ' ', '\n\n', 'User:', 'Assistant:', ' is it', 'ä', '好', '\U0001f600', EOS, 'x')


def data_of(name: str, template: str = 'tokens') -> schema.DataConfig:
  values = base.get_config().data.to_dict() | {'chat_format': name}
  if name == 'template':
    values['chat_template'] = rendered_chats.TEMPLATES[template][0]
  return schema.DataConfig(**values)


def chat(rng: random.Random) -> conversations.Conversation:
  def text() -> str:
    return ''.join(rng.choices(WORDS, k=rng.randint(0, 4)))

  turns = [{'role': 'system', 'content': text()}] if rng.random() < 0.5 else []
  for _ in range(rng.randint(1, 3)):
    turns += [{'role': 'user', 'content': text()}]
    turns += [{'role': 'assistant', 'content': text(), 'mask': rng.randint(0, 1)}]
  return conversations.from_messages(turns)


@pytest.fixture(scope='module')
def tokenizers():
  """'bytes' and 'bpe' -> a tokenizer with the special tokens of every format."""
  texts = ['User: What is it?\n\nAssistant: This is it. User: again Assistant: the same'] * 20
  both = tokenizer_lib.byte_tokenizer(BOS, EOS), tokenizer_lib.train_bpe(texts, 300, BOS, EOS)
  for one in both:
    one._inner.add_special_tokens(TOKENS)
  return dict(zip(('bytes', 'bpe'), both))


def test_the_table_is_that_of_the_schema():
  assert NAMES == schema.CHAT_FORMATS


@pytest.mark.parametrize('kind', ['bytes', 'bpe'])
@pytest.mark.parametrize('name', [name for name in NAMES if name != 'bare'])
def test_what_is_learned_is_the_answers(name, kind, tokenizers, in_process):
  tokenizer, data = tokenizers[kind], data_of(name)
  space = ' ' if name == 'deepseek_llm' else ''
  rng = random.Random(7)
  batch = [chat(rng) for _ in range(200)]
  for one, found in zip(batch, chat_formats.render(data, batch, tokenizer), strict=True):
    ids, learned = found.ids.tolist(), found.learned
    parts = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(learned)) + 1)
    spans = [part.tolist() for part in parts if learned[part[0]]]
    texts = [tokenizer.decode([ids[i] for i in span], skip_special_tokens=False) for span in spans]
    assert texts == [space + turn.content + EOS for turn in one if turn.learned]
    assert not learned[0] and ids[0] == tokenizer.bos_id
    assert ids.count(tokenizer.bos_id) == 1
    assert ids.count(tokenizer.eos_id) == sum(turn.role == 'assistant' for turn in one)


def test_bare_text_is_what_is_said_and_has_no_end(tokenizers):
  tokenizer, data = tokenizers['bytes'], data_of('bare')
  messages = [('user', ' cat'), ('assistant', ' gate'), ('user', ' rice'), ('assistant', ' lamp')]
  turns = tuple(conversations.Turn(role, text, text == ' lamp') for role, text in messages)
  (found,) = chat_formats.render(data, [turns], tokenizer)
  whole = tokenizer.decode(found.ids.tolist(), skip_special_tokens=False)
  assert whole == f'{BOS} cat gate rice lamp'
  assert found.learned.tolist() == [False] * (1 + len(' cat gate rice')) + [True] * len(' lamp')


def test_the_strings_of_deepseek_llm(tokenizers):
  tokenizer, data = tokenizers['bytes'], data_of('deepseek_llm')
  messages = [('system', 'S'), ('user', 'U1'), ('assistant', 'A1'), ('user', 'U2')]
  turns = tuple(conversations.Turn(role, text, role == 'assistant') for role, text in messages)
  whole = chat_formats.render(data, [turns[:3]], tokenizer)[0].ids.tolist()
  text = f'{BOS}S\n\nUser: U1\n\nAssistant: A1{EOS}'
  assert tokenizer.decode(whole, skip_special_tokens=False) == text
  (prompt,) = chat_formats.prompts(data, [turns], tokenizer)
  want = text + 'User: U2\n\nAssistant:'
  assert tokenizer.decode(prompt, skip_special_tokens=False) == want


def test_the_strings_of_deepseek_v3(tokenizers):
  tokenizer = tokenizers['bytes']
  turns = conversations.from_row({'prompt': 'U', 'completion': 'A'})
  (found,) = chat_formats.render(data_of('deepseek_v3'), [turns], tokenizer)
  want = f'{BOS}<｜User｜>U<｜Assistant｜>A{EOS}'
  assert tokenizer.decode(found.ids.tolist(), skip_special_tokens=False) == want


@pytest.mark.parametrize('name', NAMES)
def test_a_prompt_is_how_training_goes_on(name, tokenizers, in_process):
  tokenizer, data = tokenizers['bpe'], data_of(name)
  turns = conversations.from_row({'prompt': 'What is it?', 'completion': 'This is it.'})
  (whole,) = chat_formats.render(data, [turns], tokenizer)
  (prompt,) = chat_formats.prompts(data, [turns[:1]], tokenizer)
  assert whole.ids[: len(prompt)].tolist() == prompt
  assert not whole.learned[: len(prompt)].any() and whole.learned[len(prompt) :].all()


@pytest.mark.parametrize('name', ['deepseek_v3', 'template'])
def test_what_users_write_is_never_a_special_token(name, tokenizers, in_process):
  tokenizer = tokenizers['bytes']
  turns = conversations.from_row({'prompt': f'{EOS}<｜Assistant｜>', 'completion': BOS})
  (found,) = chat_formats.render(data_of(name), [turns], tokenizer)
  ids = found.ids.tolist()
  assert ids.count(tokenizer.eos_id) == ids.count(tokenizer.bos_id) == 1
  assert ids.count(tokenizer.token_id('<｜Assistant｜>')) == 1


@pytest.mark.parametrize('name, template', [('deepseek_llm', 'words'), ('deepseek_v3', 'tokens')])
def test_a_template_with_the_strings_of_a_format_is_that_format(
  name, template, tokenizers, in_process
):
  rng = random.Random(3)
  batch = [chat(rng) for _ in range(20)]
  found, want = (
    chat_formats.render(data, batch, tokenizers['bytes'])
    for data in (data_of('template', template), data_of(name))
  )
  for a, b in zip(found, want, strict=True):
    np.testing.assert_array_equal(a.ids, b.ids)
    np.testing.assert_array_equal(a.learned, b.learned)


def test_the_text_of_a_template_is_part_of_the_key():
  keys = [chat_formats.key(data_of('template', name)) for name in rendered_chats.TEMPLATES]
  keys += [chat_formats.key(data_of(name)) for name in chat_formats.FORMATS]
  assert len(set(keys)) == len(keys)
  # As it was before there were templates, so that no text is tokenised anew.
  v3 = chat_formats.key(data_of('deepseek_v3'))
  assert v3 == ('chat', '', '', '<｜User｜>', '', '', '<｜Assistant｜>', '')


def test_what_a_model_has_written_is_said_without_what_opens_it(in_process):
  assert chat_formats.said(data_of('deepseek_llm'), ' 12') == '12'
  assert chat_formats.said(data_of('deepseek_v3'), ' 12') == ' 12'
  # A template opens an answer with what it writes itself; other space is the answer's own.
  assert chat_formats.said(data_of('template', 'words'), ' 12') == '12'
  assert chat_formats.said(data_of('template', 'words'), '  12') == ' 12'
  assert chat_formats.said(data_of('template', 'tokens'), ' 12') == ' 12'
  assert chat_formats.said(data_of('template', 'lines'), ' 12') == ' 12'


@pytest.mark.parametrize('name', [*chat_formats.FORMATS, 'words', 'tokens'])
def test_the_opening_stands_between_prompt_and_answer(name, tokenizers, in_process):
  tokenizer = tokenizers['bytes']
  data = data_of(name) if name in chat_formats.FORMATS else data_of('template', name)
  turns = conversations.from_row({'prompt': 'What is it?', 'completion': ' This'})
  (whole,) = chat_formats.render(data, [turns], tokenizer)
  (prompt,) = chat_formats.prompts(data, [turns[:1]], tokenizer)
  written = tokenizer.decode(whole.ids[len(prompt) :].tolist())
  assert written == chat_formats.opening(data) + ' This'
  assert chat_formats.said(data, written) == ' This'


def test_a_template_may_open_an_answer_with_words_and_may_be_no_use_for_one(in_process):
  start = "{% for m in messages %}{{ '<' + m.role + '>' }}"
  thinks = start + "{% if m.role == 'assistant' %}{{ '<think></think>\n' }}{% endif %}"
  end = "{{ m.content + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}"
  data = dataclasses.replace(data_of('template'), chat_template=thinks + end + '{% endif %}')
  assert chat_formats.opening(data) == '<think></think>\n'
  forgets = start + end + '{{ "<think>" }}{% endif %}'
  data = dataclasses.replace(data, chat_template=forgets)
  assert chat_formats.said(data, ' 12') == ' 12'


def test_formats_that_cannot_be_used_are_refused():
  tokenizer = tokenizer_lib.byte_tokenizer(BOS, EOS)
  with pytest.raises(errors.InputError, match="chat_format='deepseek_v3' needs the tokens <｜User"):
    chat_formats.check(data_of('deepseek_v3'), tokenizer)
  with pytest.raises(errors.InputError, match='must end with a question'):
    chat_formats.prompts(data_of('deepseek_llm'), [()], tokenizer)
  empty = data_of('template')
  with pytest.raises(errors.InputError, match="config.data.chat_template='' must be the text"):
    chat_formats.check(dataclasses.replace(empty, chat_template=''), tokenizer)
