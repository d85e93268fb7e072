import json

import pytest

from moe_jax.data import conversations
from moe_jax.data.conversations import Turn

USER, ASSISTANT = {'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'a'}


def test_messages_and_prompt_completion_are_the_same():
  want = (Turn('user', 'q', False), Turn('assistant', 'a', True))
  assert conversations.from_row({'messages': [USER, ASSISTANT]}) == want
  assert conversations.from_row({'prompt': 'q', 'completion': 'a', 'id': 3}) == want


def test_a_masked_turn_is_read_and_not_learned():
  found = conversations.from_messages(
    [USER, ASSISTANT | {'mask': 1}, USER, ASSISTANT | {'mask': 0}]
  )
  assert [turn.learned for turn in found] == [False, False, False, True]
  assert conversations.answers(found) == 'a'
  assert not conversations.is_learned(found[:2])


def test_a_question_without_an_answer_is_left_out():
  system = {'role': 'system', 'content': 's'}
  assert conversations.from_messages([system, USER, ASSISTANT, USER])[-1].role == 'assistant'
  assert conversations.from_messages([USER]) == ()


@pytest.mark.parametrize(
  'row, words',
  [
    ('text', 'must be an object'),
    ({'text': 'x'}, "its fields: 'text'"),
    ({'messages': 'text'}, 'must be a list'),
    ({'messages': [['user', 'q']]}, 'message 0 must be an object'),
    ({'messages': [USER | {'role': 'tool'}]}, "message 0 has role 'tool'"),
    ({'messages': [USER, ASSISTANT | {'content': None}]}, 'message 1 has no string'),
    ({'messages': [USER, ASSISTANT | {'mask': 2}]}, 'message 1 has mask 2'),
    ({'messages': [USER, USER]}, "message 1 must be of the role 'assistant' and is of 'user'"),
    ({'messages': [ASSISTANT]}, "message 0 must be of the role 'user'"),
    ({'messages': [USER, ASSISTANT, {'role': 'system', 'content': ''}]}, 'message 2 must be'),
    ({'messages': [USER | {'content': '\ud800'}]}, 'surrogates not allowed'),
  ],
)
def test_what_is_refused(row, words):
  with pytest.raises(ValueError, match=words):
    conversations.from_row(row)


def test_bytes_and_back():
  one = (Turn('user', 'Wie? "ä"\n', False), Turn('assistant', '好', True))
  text = conversations.to_bytes(one)
  assert conversations.from_bytes(text) == one
  assert json.loads(text)[1] == ['assistant', '好', True]
