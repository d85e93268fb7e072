"""Preferences: two answers to one prompt, of which people (or a check) prefer the first.

A row has `prompt`, `chosen` and `rejected`, each a text or a list of messages (`conversations`); or
`chosen` and `rejected` alone, two whole conversations that differ in their last answers. Only these
last answers are compared; earlier ones are part of the prompt. Between source and tokenizer a pair
travels as a `sources.Document` whose text is `to_bytes`.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from moe_jax.data import conversations


class Pair(NamedTuple):
  """Two conversations, the same up to their last turns, which are answers to be learned."""

  chosen: conversations.Conversation
  rejected: conversations.Conversation


def from_row(row: Any) -> Pair:
  """The pair in a row of a file.

  Raises:
    ValueError: says what a row must have, and what this one has.
  """
  if not isinstance(row, Mapping) or not {'chosen', 'rejected'} <= set(row):
    known = ', '.join(map(repr, row)) if isinstance(row, Mapping) else 'no object'
    raise ValueError(f'must have "prompt", "chosen" and "rejected"; its fields: {known}')
  pair = Pair(*(_conversation(row.get('prompt'), row[side], side) for side in Pair._fields))
  if _prompt(pair.chosen) != _prompt(pair.rejected):
    raise ValueError('has chosen and rejected answers to different prompts')
  if pair.chosen == pair.rejected:
    raise ValueError('has a rejected answer that is the chosen one; nothing can be preferred')
  return pair


def to_bytes(pair: Pair) -> bytes:
  """A pair as UTF-8, the same bytes for the same turns."""
  return json.dumps(pair, ensure_ascii=False, separators=(',', ':')).encode('utf-8')


def from_bytes(text: bytes) -> Pair:
  """The inverse of `to_bytes`."""
  sides = [tuple(conversations.Turn(*turn) for turn in side) for side in json.loads(text)]
  return Pair(*sides)


def _prompt(conversation: conversations.Conversation) -> conversations.Conversation:
  return conversation[:-1]


def _conversation(prompt: Any, answer: Any, side: str) -> conversations.Conversation:
  """Prompt and answer as turns, of which the last alone is learned."""
  before = _messages(prompt, 'user') if prompt is not None else []
  messages = [*before, *_messages(answer, 'assistant')]
  found = conversations.from_messages(messages)
  if not found or len(found) != len(messages) or messages[-1].get('mask'):
    raise ValueError(f'must end with an answer of the assistant in "{side}"')
  *earlier, last = found
  return (*(turn._replace(learned=False) for turn in earlier), last)


def _messages(value: Any, role: str) -> list[Any]:
  """A list of messages, or a text as the one message of `role`."""
  if isinstance(value, str):
    return [{'role': role, 'content': value}]
  if isinstance(value, list):
    return value
  raise ValueError('must have texts or lists of messages as "prompt", "chosen" and "rejected"')
