"""Chat templates are rendered and read as by transformers' `apply_chat_template`."""

import os
import random

import numpy as np
import pytest

os.environ['HF_HUB_OFFLINE'] = '1'
pytest.importorskip('transformers', minversion='5.23')

import transformers

from configs import base
from moe_jax.config import schema
from moe_jax.data import chat_formats, conversations, template_worker
from moe_jax.data import tokenizer as tokenizer_lib
from tests.data import rendered_chats
from tests.data.rendered_chats import BOS, CHAT, EOS, TEMPLATES

WORDS = (' ', '\n\n', 'User:', 'What', ' is it', 'ä', '好', '\U0001f600', 'x', '"<&>\'')


def theirs(name: str, tokenizer: tokenizer_lib.Tokenizer):
  template, tokens = TEMPLATES[name]
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer._inner,
    bos_token=BOS,
    eos_token=EOS,
    additional_special_tokens=list(tokens),
    chat_template=template,
  )


def chat(rng: random.Random) -> list[dict[str, str]]:
  def text() -> str:
    return ''.join(rng.choices(WORDS, k=rng.randint(1, 4)))

  found = [{'role': 'system', 'content': text()}] if rng.random() < 0.5 else []
  for _ in range(rng.randint(1, 3)):
    found += [{'role': role, 'content': text()} for role in ('user', 'assistant')]
  return found


@pytest.fixture(scope='module')
def tokenizer():
  found = tokenizer_lib.byte_tokenizer(BOS, EOS)
  found._inner.add_special_tokens([token for _, tokens in TEMPLATES.values() for token in tokens])
  return found


@pytest.mark.parametrize('name', TEMPLATES)
def test_text_and_ids(name, tokenizer):
  reference, rng = theirs(name, tokenizer), random.Random(1)
  write = template_worker.writer(TEMPLATES[name][0], BOS, EOS)
  batch = [chat(rng) for _ in range(50)]
  values = base.get_config().data.to_dict()
  values |= {'chat_format': 'template', 'chat_template': TEMPLATES[name][0]}
  data = schema.DataConfig(**values)
  turns = [conversations.from_messages(one) for one in batch]
  found = chat_formats.render(data, turns, tokenizer)
  prompts = chat_formats.prompts(data, [one[:-1] for one in turns], tokenizer)
  for messages, whole, prompt in zip(batch, found, prompts, strict=True):
    for end, opens in ((len(messages), False), (len(messages) - 1, True)):
      want = reference.apply_chat_template(
        messages[:end], tokenize=False, add_generation_prompt=opens
      )
      assert write(messages[:end], opens) == want
    want = reference.apply_chat_template(messages, return_dict=False)
    np.testing.assert_array_equal(whole.ids, want)
    want = reference.apply_chat_template(
      messages[:-1], return_dict=False, add_generation_prompt=True
    )
    assert prompt == want


@pytest.mark.parametrize('name', TEMPLATES)
def test_the_recorded_table(name, tokenizer):
  for end, opens, pieces in ((2, True, 1), (3, False, 2), (4, True, 3), (5, False, 4)):
    want = theirs(name, tokenizer).apply_chat_template(
      CHAT[:end], tokenize=False, add_generation_prompt=opens
    )
    assert ''.join(rendered_chats.RECORDED[name][:pieces]) == want
