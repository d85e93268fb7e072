import dataclasses
import types

import pytest

from configs import base, sft
from moe_jax import errors
from moe_jax.config import schema
from moe_jax.data import chat_template, conversations, sources, template_worker
from moe_jax.data import tokenizer as tokenizer_lib
from moe_jax.inference import generate
from moe_jax.post_training import answers
from moe_jax.rewards import reward
from moe_jax.rewards import text as text_rewards


@pytest.fixture
def data(tmp_path) -> schema.DataConfig:
  values = sft.get_config().data.to_dict() | {'cache_dir': str(tmp_path), 'tokenizer': 'bytes'}
  return schema.DataConfig(
    **values | {'path': '?max_value=20&operations=2&problems=800', 'heldout_fraction': 0.3}
  )


def test_questions_are_held_out_ones(data):
  questions = answers.questions(data, 10)
  assert len(questions) == 10
  for question in questions:
    text = question.prompt[-1].content
    assert sources.is_heldout(text, data.heldout_fraction) and question.prompt[-1].role == 'user'
    assert question.answer.startswith(text.split()[2] + ' ')


def test_text_has_no_questions(data):
  with pytest.raises(errors.InputError, match="data.source='synthetic' must be a source of conv"):
    answers.questions(dataclasses.replace(data, source='synthetic', path=''), 1)


def test_fewer_than_one_question_is_refused(data):
  for most in (0, -1):
    with pytest.raises(errors.InputError, match=f'^--n={most} questions must be at least 1'):
      answers.questions(data, most)
  with pytest.raises(errors.InputError, match='^--questions=0 questions'):
    answers.questions(data, 0, flag='--questions')


def test_counts(data):
  """A model that knows every second answer, and never ends the others."""
  questions = answers.questions(data, 70)
  tokens = base.get_config().data
  tokenizer = tokenizer_lib.byte_tokenizer(tokens.bos_token, tokens.eos_token)
  asked, told = [], []

  def complete(prompts, max_new_tokens, sampling):
    begin = len(asked)
    asked.extend(tokenizer.decode(p) for p in prompts)
    assert sampling.temperature == 0 and len(prompts) <= answers.BATCH
    numbers = range(begin, len(asked))
    texts = [questions[i].answer if i % 2 else 'The answer is 99.' for i in numbers]
    ids = [[0] * (5 if i % 2 else max_new_tokens) for i in numbers]
    return generate.Generation(ids, texts, 1.0)

  model = types.SimpleNamespace(config=None, tokenizer=tokenizer, complete=complete)
  data = schema.DataConfig(**tokens.to_dict() | {'source': 'arithmetic'})
  found = answers.measure(model, questions, data, 8, lambda *one: told.append(one))
  assert asked == [f'User: {q.prompt[-1].content}\n\nAssistant:' for q in questions]
  assert found[:3] == (35, 70, 35)
  steps = sum(q.answer.count('=') for q in questions[1::2])
  assert found[3:5] == (steps, steps) and not found.kinds
  assert [right for _, _, right in told] == [False, True] * 35


@pytest.mark.parametrize(
  'gold, text, right',
  [
    ('{"a": 1}', ' {"a": 1}\n', True),
    ('{"a": 1}', '{"a": 2}', False),
    ('7 * 6 = 42.\n#### 42', 'That is 6 * 7, so 42.\n#### 42', True),
    ('7 * 6 = 42.\n#### 42', '7 * 6 = 42.\n#### 41', False),
    ('7 * 6 = 42.\n#### 42', '42', False),  # the form is the solution's
    ('42', 'It is 42.', True),
    (r'So it is \boxed{x}.', r'\boxed{x}', True),
  ],
)
def test_conversations_are_judged_by_the_answer_as_the_reward_does(gold, text, right):
  assert answers.is_right('conversations')(text, gold) == right
  assert text_rewards.answer('', (), text, {'answer': gold}).value == right


def test_wilsons_interval():
  """Brown, Cai and DasGupta (2001): the centre is drawn to a half, the ends stay inside."""
  low, high = answers.wilson(8, 10)
  assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
  assert answers.wilson(0, 20)[0] == 0 and answers.wilson(0, 20)[1] == pytest.approx(
    0.1611, abs=1e-4
  )
  assert answers.wilson(20, 20)[1] == 1


def test_programs_are_judged_by_what_runs_them(tmp_path):
  """Batch by batch, while the next one is written."""
  tokens = base.get_config().data.to_dict()
  data = schema.DataConfig(**tokens | {'source': 'programs', 'heldout_fraction': 0.5})
  questions = answers.questions(data, 40)
  tokenizer = tokenizer_lib.byte_tokenizer(tokens['bos_token'], tokens['eos_token'])
  events, prompts = [], []

  def complete(asked, max_new_tokens, sampling):
    events.append('written')
    return generate.Generation([[1] * 5 for _ in asked], ['def f'] * len(asked), 1.0)

  def submit(items):
    events.append('submitted')
    prompts.extend(item.prompt for item in items)
    for item in items:
      assert item.text == 'def f' and item.completion_ids == [1] * 5
      assert item.example['entry'] == 'f' and item.prompt == item.example['question']
    kinds = ['right', 'time', 'error', 'error'] * (len(items) // 4)
    found = [reward.Reward(0.0, {}, kind) for kind in kinds]
    return types.SimpleNamespace(result=lambda: found)

  model = types.SimpleNamespace(config=None, tokenizer=tokenizer, complete=complete)
  rewards = types.SimpleNamespace(submit=submit)
  found = answers.measure(model, questions, data, 8, rewards=rewards)
  assert events == ['written', 'submitted'] * 2
  assert prompts == [question.prompt[-1].content for question in questions]
  assert found[:3] == (10, 40, 40) and found.kinds == {'right': 10, 'time': 10, 'error': 20}
  assert str(found).endswith('40 ended within the limit; error 20; right 10; time 10')
  with pytest.raises(errors.InputError, match='answers that must be run'):
    answers.measure(model, questions, data, 8)


def test_what_a_template_writes_before_an_answer_is_no_part_of_it(data, monkeypatch):
  monkeypatch.setattr(
    chat_template, '_ask', lambda request: template_worker.answer(request, lambda: None)
  )
  thinks = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.role == 'assistant' %}"
    "{{ '<think></think>' }}{% endif %}{{ m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
  )
  data = dataclasses.replace(
    data, source='conversations', path='', chat_format='template', chat_template=thinks
  )
  asked = answers.Question((conversations.Turn('user', 'Capital of France?', False),), 'Paris')
  tokenizer = tokenizer_lib.byte_tokenizer(data.bos_token, data.eos_token)
  written = generate.Generation([[0] * 5], ['<think></think>Paris'], 1.0)
  model = types.SimpleNamespace(config=None, tokenizer=tokenizer, complete=lambda *unused: written)
  told, items = [], []
  found = answers.measure(model, [asked], data, 8, lambda *one: told.append(one))
  assert found.right == 1 and told == [(asked, 'Paris', True)]

  def submit(batch):
    items.extend(batch)
    return types.SimpleNamespace(result=lambda: [reward.Reward(1.0, {}, 'right')])

  answers.measure(model, [asked], data, 8, rewards=types.SimpleNamespace(submit=submit))
  assert [item.text for item in items] == ['Paris']
