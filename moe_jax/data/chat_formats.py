"""How a conversation becomes token ids, and which of them are to be learned.

A format is a few strings around what is said. Each piece of text is encoded apart, so that no merge
of the tokenizer crosses the border between question and answer, and what users write never becomes
a special token. An answer is learned with the end token behind it, without which a model would
never stop; begin token, questions and the words that open an answer are not.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from moe_jax import errors
from moe_jax.data import conversations
from moe_jax.data import tokenizer as tokenizer_lib


class Format(NamedTuple):
  """Text and special tokens around what is said; '' for none."""

  system: str  # behind a system message
  user: str  # before a question
  user_token: str  # special token before a question
  user_end: str  # behind a question
  assistant: str  # opens an answer, and ends a prompt
  assistant_token: str
  answer: str  # before an answer; learned with it


# By name; the source of each beside it.
FORMATS = {
  # DeepSeek LLM, DeepSeekMoE 16B, V2, Coder-V2, and ESFT's data: "Assistant:" ends the question's
  # part, and the answer begins with the space.
  'deepseek_llm': Format('\n\n', 'User: ', '', '\n\n', 'Assistant:', '', ' '),
  # DeepSeek-V2.5, V3 and R1: special tokens of their tokenizers.
  'deepseek_v3': Format('', '', '<｜User｜>', '', '', '<｜Assistant｜>', ''),
}


class Rendered(NamedTuple):
  """Token ids, and whether each is to be learned."""

  ids: np.ndarray  # [n] uint32
  learned: np.ndarray  # [n] bool


class _Piece(NamedTuple):
  text: str  # '' if `token`
  token: int | None
  learned: bool


def check(name: str, tokenizer: tokenizer_lib.Tokenizer):
  """Refuses a format whose special tokens the tokenizer lacks.

  Raises:
    errors.InputError: names the format and the tokens.
  """
  wanted = filter(None, (FORMATS[name].user_token, FORMATS[name].assistant_token))
  missing = [token for token in wanted if tokenizer.token_id(token) is None]
  errors.require(
    not missing,
    f'config.data.chat_format={name!r} needs the tokens {", ".join(missing)} in the tokenizer '
    "(config.data.tokenizer); use chat_format='deepseek_llm', which is text alone, or a tokenizer "
    'that has them',
  )


def render(
  name: str,
  batch: Sequence[conversations.Conversation],
  tokenizer: tokenizer_lib.Tokenizer,
) -> list[Rendered]:
  """Whole conversations as ids, begin token to the last end token; encoded in one batch."""
  return _encode([list(_pieces(name, c, tokenizer)) for c in batch], tokenizer)


def prompt(
  name: str, conversation: conversations.Conversation, tokenizer: tokenizer_lib.Tokenizer
) -> list[int]:
  """Ids behind which a model writes its answer to the last question of a conversation.

  Raises:
    errors.InputError: the format does not go with the tokenizer, or the last turn is no question.
  """
  check(name, tokenizer)
  errors.require(
    bool(conversation) and conversation[-1].role == 'user',
    'a prompt must end with a question of the user; leave out what is behind it',
  )
  pieces = [*_pieces(name, conversation, tokenizer), *_opening(FORMATS[name], tokenizer)]
  return _encode([pieces], tokenizer)[0].ids.tolist()


def _pieces(
  name: str, conversation: conversations.Conversation, tokenizer: tokenizer_lib.Tokenizer
) -> Iterator[_Piece]:
  form = FORMATS[name]
  yield _Piece('', tokenizer.bos_id, False)
  for turn in conversation:
    if turn.role == 'system':
      yield _Piece(turn.content + form.system, None, False)
    elif turn.role == 'user':
      yield from _token(form.user_token, tokenizer)
      yield _Piece(form.user + turn.content + form.user_end, None, False)
    else:
      yield from _opening(form, tokenizer)
      yield _Piece(form.answer + turn.content, None, turn.learned)
      yield _Piece('', tokenizer.eos_id, turn.learned)


def _opening(form: Format, tokenizer: tokenizer_lib.Tokenizer) -> Iterator[_Piece]:
  yield from _token(form.assistant_token, tokenizer)
  yield _Piece(form.assistant, None, False)


def _token(token: str, tokenizer: tokenizer_lib.Tokenizer) -> Iterator[_Piece]:
  if token:
    yield _Piece('', tokenizer.token_id(token), False)


def _encode(
  batch: Sequence[Sequence[_Piece]], tokenizer: tokenizer_lib.Tokenizer
) -> list[Rendered]:
  texts = [piece.text for pieces in batch for piece in pieces if piece.token is None]
  encoded = iter(tokenizer.encode_batch(texts))
  found = []
  for pieces in batch:
    ids = [next(encoded) if p.token is None else [p.token] for p in pieces]
    lengths = [len(part) for part in ids]
    learned = np.repeat([p.learned for p in pieces], lengths)
    joined = np.concatenate([np.asarray(part, np.uint32) for part in ids])
    found.append(Rendered(joined, learned))
  return found
