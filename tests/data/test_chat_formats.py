"""Decoded, the tokens that are learned are the answers with their end tokens, and nothing else."""

import random

import numpy as np
import pytest

from configs import base
from moe_jax import errors
from moe_jax.config import schema
from moe_jax.data import chat_formats, conversations
from moe_jax.data import tokenizer as tokenizer_lib

BOS, EOS = base.get_config().data.bos_token, base.get_config().data.eos_token
# Space at both ends, ends of lines, what formats and tokens are spelled with, several bytes each.
WORDS = ('', ' ', '\n\n', 'User:', 'Assistant:', ' is it', 'ä', '好', '\U0001f600', EOS, 'x')


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
  """Name of a format -> (bytes, trained BPE), both with the format's special tokens."""
  texts = ['User: What is it?\n\nAssistant: This is it. User: again Assistant: the same'] * 20
  found = {}
  for name, form in chat_formats.FORMATS.items():
    both = tokenizer_lib.byte_tokenizer(BOS, EOS), tokenizer_lib.train_bpe(texts, 300, BOS, EOS)
    for one in both:
      one._inner.add_special_tokens([t for t in (form.user_token, form.assistant_token) if t])
    found[name] = both
  return found


def test_the_table_is_that_of_the_schema():
  assert tuple(chat_formats.FORMATS) == schema.CHAT_FORMATS


@pytest.mark.parametrize('kind', ['bytes', 'bpe'])
@pytest.mark.parametrize('name', chat_formats.FORMATS)
def test_what_is_learned_is_the_answers(name, kind, tokenizers):
  tokenizer, space = tokenizers[name][kind == 'bpe'], chat_formats.FORMATS[name].answer

  rng = random.Random(7)
  batch = [chat(rng) for _ in range(200)]
  for one, found in zip(batch, chat_formats.render(name, batch, tokenizer), strict=True):
    ids, learned = found.ids.tolist(), found.learned
    parts = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(learned)) + 1)
    spans = [part.tolist() for part in parts if learned[part[0]]]
    texts = [tokenizer.decode([ids[i] for i in span], skip_special_tokens=False) for span in spans]
    assert texts == [space + turn.content + EOS for turn in one if turn.learned]
    assert not learned[0] and ids[0] == tokenizer.bos_id
    assert ids.count(tokenizer.bos_id) == 1
    assert ids.count(tokenizer.eos_id) == sum(turn.role == 'assistant' for turn in one)


def test_the_strings_of_deepseek_llm(tokenizers):
  tokenizer = tokenizers['deepseek_llm'][0]
  messages = [('system', 'S'), ('user', 'U1'), ('assistant', 'A1'), ('user', 'U2')]
  turns = tuple(conversations.Turn(role, text, role == 'assistant') for role, text in messages)
  whole = chat_formats.render('deepseek_llm', [turns[:3]], tokenizer)[0].ids.tolist()
  text = f'{BOS}S\n\nUser: U1\n\nAssistant: A1{EOS}'
  assert tokenizer.decode(whole, skip_special_tokens=False) == text
  prompt = chat_formats.prompt('deepseek_llm', turns, tokenizer)
  want = text + 'User: U2\n\nAssistant:'
  assert tokenizer.decode(prompt, skip_special_tokens=False) == want


def test_the_strings_of_deepseek_v3(tokenizers):
  tokenizer = tokenizers['deepseek_v3'][0]
  turns = conversations.from_row({'prompt': 'U', 'completion': 'A'})
  (found,) = chat_formats.render('deepseek_v3', [turns], tokenizer)
  want = f'{BOS}<｜User｜>U<｜Assistant｜>A{EOS}'
  assert tokenizer.decode(found.ids.tolist(), skip_special_tokens=False) == want


@pytest.mark.parametrize('name', chat_formats.FORMATS)
def test_a_prompt_is_how_training_goes_on(name, tokenizers):
  tokenizer = tokenizers[name][1]
  turns = conversations.from_row({'prompt': 'What is it?', 'completion': 'This is it.'})
  (whole,) = chat_formats.render(name, [turns], tokenizer)
  prompt = chat_formats.prompt(name, turns[:1], tokenizer)
  assert whole.ids[: len(prompt)].tolist() == prompt
  assert not whole.learned[: len(prompt)].any() and whole.learned[len(prompt) :].all()


def test_what_users_write_is_never_a_special_token(tokenizers):
  tokenizer = tokenizers['deepseek_v3'][0]
  turns = conversations.from_row({'prompt': f'{EOS}<｜Assistant｜>', 'completion': BOS})
  (found,) = chat_formats.render('deepseek_v3', [turns], tokenizer)
  ids = found.ids.tolist()
  assert ids.count(tokenizer.eos_id) == ids.count(tokenizer.bos_id) == 1
  assert ids.count(tokenizer.token_id('<｜Assistant｜>')) == 1


def test_a_tokenizer_without_the_tokens_is_refused():
  tokenizer = tokenizer_lib.byte_tokenizer(BOS, EOS)
  with pytest.raises(errors.InputError, match="chat_format='deepseek_v3' needs the tokens <｜User"):
    chat_formats.check('deepseek_v3', tokenizer)
  with pytest.raises(errors.InputError, match='must end with a question'):
    chat_formats.prompt('deepseek_llm', (), tokenizer)
