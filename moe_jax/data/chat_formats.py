"""How a conversation becomes token ids, and which of them are to be learned.

A format is a few strings around what is said, or the template of a checkpoint (`chat_template`).
Each piece of text is encoded apart, so that no merge of the tokenizer crosses the border between
question and answer, and what users write never becomes a special token. An answer is learned with
the end token behind it, without which a model would never stop (only 'bare' has none); begin token,
questions and the words that open an answer are not.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from moe_jax import errors
from moe_jax.config import schema
from moe_jax.data import chat_template, conversations
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
  end: bool = True  # whether the end token follows an answer


TEMPLATE = 'template'  # the format whose text is data.chat_template
# The others by name; the source of each beside it.
FORMATS = {
  # DeepSeek LLM, DeepSeekMoE 16B, V2, Coder-V2, and ESFT's data: "Assistant:" ends the question's
  # part, and the answer begins with the space.
  'deepseek_llm': Format('\n\n', 'User: ', '', '\n\n', 'Assistant:', '', ' '),
  # DeepSeek-V2.5, V3 and R1: special tokens of their tokenizers.
  'deepseek_v3': Format('', '', '<｜User｜>', '', '', '<｜Assistant｜>', ''),
  # Ours, of `tasks.episodes`: one character each, and what is said brings its own spaces.
  'marks': Format('\n', '>', '', '', '=', '', ''),
  # Ours, for a first stage on `tasks.episodes`: what is said, with nothing around it.
  'bare': Format('', '', '', '', '', '', '', end=False),
}


class Rendered(NamedTuple):
  """Token ids, and whether each is to be learned."""

  ids: np.ndarray  # [n] uint32
  learned: np.ndarray  # [n] bool


class _Piece(NamedTuple):
  text: str  # '' if `token`
  token: int | None
  learned: bool
  is_template: bool = False  # the spelling of a special token is that token


def key(data: schema.DataConfig) -> tuple[str, ...]:
  """All of the config that decides how a conversation becomes text."""
  if data.chat_format == TEMPLATE:
    return 'chat', TEMPLATE, *_template(data)
  form = FORMATS[data.chat_format]
  return 'chat', *form[:-1], *(() if form.end else ('no end',))


def check(data: schema.DataConfig, tokenizer: tokenizer_lib.Tokenizer):
  """Refuses a format whose special tokens the tokenizer lacks, and a template that is not there.

  Raises:
    errors.InputError: names the format and what is missing.
  """
  name = data.chat_format
  if name == TEMPLATE:
    errors.require(
      bool(data.chat_template),
      "config.data.chat_template='' must be the text of a jinja template for "
      "data.chat_format='template': no checkpoint has brought one; give the text, or choose "
      "chat_format='deepseek_llm'",
    )
    return
  wanted = filter(None, (FORMATS[name].user_token, FORMATS[name].assistant_token))
  missing = [token for token in wanted if tokenizer.token_id(token) is None]
  errors.require(
    not missing,
    f'config.data.chat_format={name!r} needs the tokens {", ".join(missing)} in the tokenizer '
    "(config.data.tokenizer); use chat_format='deepseek_llm', which is text alone, or a tokenizer "
    'that has them',
  )


def render(
  data: schema.DataConfig,
  batch: Sequence[conversations.Conversation],
  tokenizer: tokenizer_lib.Tokenizer,
) -> list[Rendered]:
  """Whole conversations as ids, begin token to the last end token; encoded in one batch."""
  return _encode(_pieces(data, batch, tokenizer), tokenizer)


def prompts(
  data: schema.DataConfig,
  batch: Sequence[conversations.Conversation],
  tokenizer: tokenizer_lib.Tokenizer,
) -> list[list[int]]:
  """Ids behind which a model writes its answer to the last question of each conversation.

  Raises:
    errors.InputError: the format does not go with the tokenizer, or the last turn is no question.
  """
  check(data, tokenizer)
  errors.require(
    all(one and one[-1].role == 'user' for one in batch),
    'a prompt must end with a question of the user; leave out what is behind it',
  )
  return [found.ids.tolist() for found in _encode(_pieces(data, batch, tokenizer), tokenizer)]


def said(data: schema.DataConfig, text: str) -> str:
  """An answer that a model has written, without what the format opens it with."""
  return text.removeprefix(opening(data))


def opening(data: schema.DataConfig) -> str:
  """What stands between a prompt and the answer behind it, and is written with the answer."""
  if data.chat_format == TEMPLATE:
    return chat_template.opening(_template(data))
  return FORMATS[data.chat_format].answer


def _template(data: schema.DataConfig) -> chat_template.Template:
  return chat_template.Template(data.chat_template, data.bos_token, data.eos_token)


def _pieces(
  data: schema.DataConfig,
  batch: Sequence[conversations.Conversation],
  tokenizer: tokenizer_lib.Tokenizer,
) -> list[list[_Piece]]:
  """Each conversation in pieces; with a question at its end, up to where the answer begins."""
  if data.chat_format != TEMPLATE:
    return [list(_format_pieces(FORMATS[data.chat_format], one, tokenizer)) for one in batch]
  rendered = chat_template.render(_template(data), batch, tokenizer.special_tokens)
  return [[_Piece(p.text, None, p.learned, p.is_template) for p in one] for one in rendered]


def _format_pieces(
  form: Format, conversation: conversations.Conversation, tokenizer: tokenizer_lib.Tokenizer
) -> Iterator[_Piece]:
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
      if form.end:
        yield _Piece('', tokenizer.eos_id, turn.learned)
  if conversation[-1].role == 'user':
    yield from _opening(form, tokenizer)


def _opening(form: Format, tokenizer: tokenizer_lib.Tokenizer) -> Iterator[_Piece]:
  yield from _token(form.assistant_token, tokenizer)
  yield _Piece(form.assistant, None, False)


def _token(token: str, tokenizer: tokenizer_lib.Tokenizer) -> Iterator[_Piece]:
  if token:
    yield _Piece('', tokenizer.token_id(token), False)


def _encode(
  batch: Sequence[Sequence[_Piece]], tokenizer: tokenizer_lib.Tokenizer
) -> list[Rendered]:
  encoded = {}
  for special in (False, True):
    texts = [p.text for one in batch for p in one if p.token is None and p.is_template == special]
    encoded[special] = iter(tokenizer.encode_batch(texts, special_tokens=special))
  found = []
  for pieces in batch:
    ids = [next(encoded[p.is_template]) if p.token is None else [p.token] for p in pieces]
    lengths = [len(part) for part in ids]
    learned = np.repeat([p.learned for p in pieces], lengths)
    joined = np.concatenate([np.asarray(part, np.uint32) for part in ids])
    found.append(Rendered(joined, learned))
  return found
