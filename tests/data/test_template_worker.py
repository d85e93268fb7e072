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


@pytest.mark.parametrize('name', TEMPLATES)
def test_templates_are_rendered_as_by_transformers(name):
  write, pieces = writer(name), rendered_chats.RECORDED[name]
  assert tuple(template_worker.cut(write, CHAT)) == pieces
  assert write(CHAT, False) == ''.join(pieces)
  # Up to a question, what follows is to be written.
  assert tuple(template_worker.cut(write, CHAT[:4])) == pieces[:3]
  assert tuple(template_worker.cut(write, CHAT[:2])) == pieces[:1]


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
    ('{{ messages.append(1) }}', "attribute 'append' of 'list' object is unsafe"),
    ("{{ ''.__class__.__mro__ }}", "'__class__' of 'str' object is unsafe"),
    ('{{ messages[0].content + 1 }}', 'TypeError'),
    ('{{ pad_token }}{{ unk_token }}', 'it needs pad_token, unk_token, which is not given'),
    ('{{ strftime_now("%d") }}', "'strftime_now' is undefined"),
    ('{% for i in range(10**6) %}{% endfor %}', 'OverflowError'),
    ("{% for i in range(99) %}{{ 'x' * 10**5 }}{% endfor %}", 'more than 4,194,304 characters'),
  ],
)
def test_templates_that_are_refused(template, words):
  assert words in answer(template, CHAT)['error']
