import dataclasses
import types

import pytest

from configs import base, sft
from moe_jax.config import schema
from moe_jax.data import conversations, preferences, sources
from moe_jax.data import tokenizer as tokenizer_lib
from moe_jax.inference import generate
from moe_jax.inference import sampling as sampling_lib
from moe_jax.post_training import answers, pairs


@pytest.fixture
def data(tmp_path) -> schema.DataConfig:
  values = sft.get_config().data.to_dict() | {
    'cache_dir': str(tmp_path),
    'tokenizer': 'bytes',
    'chat_format': 'deepseek_llm',
  }
  return schema.DataConfig(**values | {'path': '?max_value=20&operations=2&problems=200'})


@pytest.fixture
def questions(data):
  found = answers.questions(data, 40, heldout=False)
  assert not any(sources.is_heldout(q.prompt[-1].content, data.heldout_fraction) for q in found)
  return found


def test_a_wrong_answer_that_ended_against_a_right_one(data, questions):
  """Question i: 0 never right, 1 right in its second sample, 2 always right, 3 never ends."""
  tokens = base.get_config().data
  tokenizer = tokenizer_lib.byte_tokenizer(tokens.bos_token, tokens.eos_token)
  by_prompt = {q.prompt[-1].content: i for i, q in enumerate(questions)}
  seeds, calls = [], []

  def complete(prompts, max_new_tokens, sampling):
    assert sampling.temperature == 0.7
    seeds.append(sampling.seed)
    texts, ids = [], []
    for prompt in prompts:
      text = tokenizer.decode(prompt).removeprefix('User: ').removesuffix('\n\nAssistant:')
      i = by_prompt[text]
      nth = calls.count(i)
      calls.append(i)
      good = f' Hence. The answer is {questions[i].answer.split()[-1]}'
      right = i % 4 == 2 or (i % 4 == 1 and nth == 1)
      texts.append(good if right else f' The answer is {100 + nth}.')
      ids.append([0] * (8 if i % 4 == 3 else 5))
    return generate.Generation(ids, texts, 1.0)

  model = types.SimpleNamespace(config=None, tokenizer=tokenizer, complete=complete)
  sampling = sampling_lib.Sampling(temperature=0.7, seed=5)
  found = list(
    pairs.sampled(
      model,
      questions,
      data,
      samples=3,
      max_new_tokens=8,
      sampling=sampling,
    )
  )
  assert len(found) == 40 and len(set(seeds)) == len(seeds) == 6
  for i, one in enumerate(found):
    assert (one.right, one.wrong) == [(0, 3), (1, 2), (3, 0), (0, 0)][i % 4]
    assert (one.row is None) == (i % 4 > 1)
    if one.row is not None:
      pair = preferences.from_row(one.row)
      assert pair.rejected[-1].content == 'The answer is 100.'
      assert pair.chosen[:-1] == questions[i].prompt
      own = pair.chosen[-1].content.startswith('Hence.')
      assert own == (i % 4 == 1) and (own or pair.chosen[-1].content == questions[i].answer)


def test_a_right_answer_in_other_words_is_not_rejected(data):
  """What the gold solution states decides, as in rewards; its words do not."""
  question = answers.Question(
    (conversations.Turn('user', 'Six shelves of seven?', False),), '7 * 6 = 42.\n#### 42'
  )
  texts = [' 6 * 7, so 42.\n#### 42', ' 7 * 6 = 48.\n#### 48']

  def complete(prompts, max_new_tokens, sampling):
    del prompts, max_new_tokens
    return generate.Generation([[0] * 5], [texts[sampling.seed]], 1.0)

  model = types.SimpleNamespace(
    config=None, tokenizer=tokenizer_lib.byte_tokenizer('<s>', '</s>'), complete=complete
  )
  (found,) = pairs.sampled(
    model,
    [question],
    dataclasses.replace(data, source='conversations', path='unread'),
    samples=2,
    max_new_tokens=8,
    sampling=sampling_lib.Sampling(seed=0),
  )
  assert (found.right, found.wrong) == (1, 1)
  pair = preferences.from_row(found.row)
  assert (pair.chosen[-1].content, pair.rejected[-1].content) == tuple(map(str.strip, texts))
