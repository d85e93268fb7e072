import pytest

from moe_jax.data import template_worker
from tests.data import rendered_chats
from tests.data.rendered_chats import BOS, CHAT, EOS, TEMPLATES


def answer(template, *batch):
  names = {'bos_token': BOS, 'eos_token': EOS}
  request = {'template': template, 'conversations': batch} | names
  return template_worker.answer(request, lambda: None)


def writer(name):
  return template_worker.writer(TEMPLATES[name][0], BOS, EOS)


@pytest.mark.parametrize('case', rendered_chats.RECORDED, ids=str)
def test_templates_are_rendered_as_by_transformers(case):
  name, number, opens_answer = case
  assert writer(name)(CHAT[:number], opens_answer) == rendered_chats.RECORDED[case]


def test_the_table_has_every_template():
  assert {name for name, _, _ in rendered_chats.RECORDED} == set(TEMPLATES)


@pytest.mark.parametrize('name', TEMPLATES)
def test_pieces_are_prompts_and_answers_in_turn(name):
  write = writer(name)
  pieces = template_worker.cut(write, CHAT)
  assert len(pieces) == 4 and ''.join(pieces) == write(CHAT, False)
  assert ''.join(pieces[:1]) == write(CHAT[:2], True)
  assert ''.join(pieces[:3]) == write(CHAT[:4], True)
  # Up to a question, what follows is to be written.
  assert template_worker.cut(write, CHAT[:4]) == pieces[:3]
  assert template_worker.cut(write, CHAT[:2]) == pieces[:1]


def test_a_template_that_changes_what_it_wrote_is_refused():
  forgets = (
    "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}{{ m.content[:1] }}"
    '{% else %}{{ m.content }}{% endif %}{% endfor %}'
  )
  error = answer(forgets, CHAT[1:])['error']
  assert 'what it writes up to message 3 does not begin with what it wrote before' in error
  assert answer(forgets, CHAT[1:3]) == {'pieces': [[CHAT[1]['content'], '12']]}


@pytest.mark.parametrize(
  'template, words',
  [
    ('{% for m in messages %}', 'line 1: Unexpected end of template'),
    ("{{ raise_exception('no system') }}", 'no system (conversation 0'),
    ('{{ messages.append(1) }}', 'SecurityError'),
    ("{{ ''.__class__.__mro__ }}", 'SecurityError'),
    ('{{ messages[0].content + 1 }}', 'TypeError'),
    ('{{ pad_token }}{{ unk_token }}', 'it needs pad_token, unk_token, which is not given'),
    ('{{ strftime_now("%d") }}', "'strftime_now' is undefined"),
    ('{% for i in range(10**6) %}{% endfor %}', 'OverflowError'),
    ("{% for i in range(99) %}{{ 'x' * 10**5 }}{% endfor %}", 'more than 4,194,304 characters'),
  ],
)
def test_templates_that_are_refused(template, words):
  assert words in answer(template, CHAT)['error']
