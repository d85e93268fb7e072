"""Conversations: their turns, how files hold them, and which turns a model is to learn.

A row has `messages`, a list of {"role": "system" | "user" | "assistant", "content": str, "mask": 0
or 1}, or `prompt` and `completion`. A model learns the turns of the assistant, but those with
"mask": 1 (ESFT's form). Between source and tokenizer a conversation travels as a `sources.Document`
whose text is `to_bytes`.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

ROLES = ('system', 'user', 'assistant')


class Turn(NamedTuple):
  """What one side says."""

  role: str  # one of ROLES
  content: str
  learned: bool  # whether its tokens are targets


Conversation = tuple[Turn, ...]


def from_row(row: Any) -> Conversation:
  """The conversation in a row of a file.

  Raises:
    ValueError: says what a row must have, and what this one has.
  """
  if not isinstance(row, Mapping):
    raise ValueError('must be an object with "messages", or with "prompt" and "completion"')
  if 'messages' in row:
    return from_messages(row['messages'])
  if 'prompt' in row and 'completion' in row:
    texts = {'user': row['prompt'], 'assistant': row['completion']}
    return from_messages([{'role': role, 'content': text} for role, text in texts.items()])
  known = ', '.join(map(repr, row)) or 'none'
  raise ValueError(f'must have "messages", or "prompt" and "completion"; its fields: {known}')


def from_messages(messages: Any, *, for_prompt: bool = False) -> Conversation:
  """Turns in the form of `messages`.

  Args:
    messages: as in a row.
    for_prompt: a question behind the last answer stays; else it is left out.

  Raises:
    ValueError: a message has another form, or stands where none of its role can.
  """
  if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
    raise ValueError('"messages" must be a list')
  turns = tuple(_turn(message, i) for i, message in enumerate(messages))
  expected = 'user'
  for i, turn in enumerate(turns):
    if turn.role == 'system' and i == 0:
      continue
    if turn.role != expected:
      raise ValueError(
        f'message {i} must be of the role {expected!r} and is of {turn.role!r}: after a system '
        'message, which may come first, user and assistant take turns'
      )
    expected = 'assistant' if expected == 'user' else 'user'
  unanswered = bool(turns) and turns[-1].role != 'assistant'
  return turns[:-1] if unanswered and not for_prompt else turns


def _turn(message: Any, index: int) -> Turn:
  if not isinstance(message, Mapping):
    raise ValueError(f'message {index} must be an object with "role" and "content"')
  role, content, mask = (message.get(key) for key in ('role', 'content', 'mask'))
  if role not in ROLES:
    raise ValueError(f'message {index} has role {role!r}, which must be one of {", ".join(ROLES)}')
  if not isinstance(content, str):
    raise ValueError(f'message {index} has no string as "content"')
  if mask not in (None, 0, 1):
    raise ValueError(f'message {index} has mask {mask!r}, which must be 0 or 1')
  content.encode('utf-8')  # UnicodeEncodeError, a ValueError, for half of a surrogate pair
  return Turn(role, content, role == 'assistant' and not mask)


def is_learned(conversation: Conversation) -> bool:
  """Whether any turn of a conversation is to be learned."""
  return any(turn.learned for turn in conversation)


def answers(conversation: Conversation) -> str:
  """What is to be learned, as text; the text whose bytes are counted."""
  return ''.join(turn.content for turn in conversation if turn.learned)


def to_bytes(conversation: Conversation) -> bytes:
  """A conversation as UTF-8, the same bytes for the same turns."""
  return json.dumps(conversation, ensure_ascii=False, separators=(',', ':')).encode('utf-8')


def from_bytes(text: bytes) -> Conversation:
  """The inverse of `to_bytes`."""
  return tuple(Turn(*turn) for turn in json.loads(text))
