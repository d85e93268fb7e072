"""The chat template of a checkpoint: it writes conversations as text with special tokens in it.

A template spells special tokens as text. So that those of the template alone become tokens, what
users spell like one is replaced, while the template runs, by a character that nobody uses.
"""

import functools
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from moe_jax import errors
from moe_jax.data import conversations, template_worker

_FIRST, _LAST = 0x100000, 0x10FFFD  # a plane of Unicode for private use
_PROBE = 'an-answer-0123456789'  # that no template writes of itself
_WAY_OUT = (
  "choose one of the formats (config.data.chat_format='deepseek_llm' or 'deepseek_v3'), or give "
  'another template as config.data.chat_template'
)


class Template(NamedTuple):
  """A template and what it is given."""

  text: str
  bos_token: str
  eos_token: str


class Piece(NamedTuple):
  """Part of a rendered conversation."""

  text: str
  is_template: bool  # the spelling of a special token in it is that token
  learned: bool


def render(
  template: Template,
  batch: Sequence[conversations.Conversation],
  special_tokens: Iterable[str],
) -> list[list[Piece]]:
  """Conversations as pieces of text, each to be encoded for itself.

  An answer is learned up to the last special token that the template writes behind it. Pieces end
  where answers begin and end, so no merge of a tokenizer crosses these borders.

  Args:
    template: the template.
    batch: conversations; one that ends with a question is rendered up to where its answer begins.
    special_tokens: of the tokenizer.

  Raises:
    errors.InputError: the template fails, or uses too much of anything, or its text of a
      conversation does not begin with that of the conversation's beginning.
  """
  stand_ins = _StandIns(special_tokens)
  messages = [
    [{'role': turn.role, 'content': stand_ins.hide(turn.content)} for turn in one] for one in batch
  ]
  return [
    _pieces(texts, [turn.learned for turn in one if turn.role == 'assistant'], stand_ins)
    for one, texts in zip(batch, run(template, messages), strict=True)
  ]


@functools.lru_cache
def opening(template: Template) -> str:
  """What a template writes between a prompt and the answer behind it: '' or a space, say.

  '' too for a template that can ask a question and cannot write its answer, so that nothing is
  learned behind it.
  """
  question = {'role': 'user', 'content': 'question'}
  try:
    ((_, text),) = run(template, [[question, {'role': 'assistant', 'content': _PROBE}]])
  except errors.InputError:
    return ''
  return text[: max(text.find(_PROBE), 0)]


def run(
  template: Template,
  batch: Sequence[Sequence[template_worker.Message]],
  seconds: int = template_worker.SECONDS,
) -> list[list[str]]:
  """What `template_worker.cut` makes of every conversation, in a process with limits.

  Args:
    template: the template.
    batch: messages of each conversation.
    seconds: CPU time of one of them.

  Raises:
    errors.InputError: see `render`.
  """
  names = {'bos_token': template.bos_token, 'eos_token': template.eos_token, 'seconds': seconds}
  answer = _ask(names | {'template': template.text, 'conversations': batch})
  problem = answer.get('error', '')
  errors.require(not problem, f'config.data.chat_template cannot be used: {problem}; {_WAY_OUT}')
  return answer['pieces']


def _ask(request: Mapping[str, Any]) -> dict[str, Any]:
  """What the process of `template_worker` answers, or how it ended."""
  command, text = [sys.executable, '-I', template_worker.__file__], json.dumps(request).encode()
  done = subprocess.run(command, input=text, capture_output=True)
  if done.returncode == 0:
    return json.loads(done.stdout)
  if done.returncode == -signal.SIGXCPU:
    return {'error': f'it takes more than {request["seconds"]} s for a conversation'}
  last = done.stderr.decode(errors='replace').strip().splitlines()[-1:]
  return {'error': f'its process ended with {done.returncode} {" ".join(last)}'}


def _pieces(texts: Sequence[str], learned: Sequence[bool], stand_ins: '_StandIns') -> list[Piece]:
  """The pieces of one conversation, whose texts are prompts and answers in turn."""
  found, rest = [], ''
  for i, text in enumerate(texts):
    is_answer = bool(i % 2)
    if is_answer:
      end = stand_ins.end_of_last_token(text)
      errors.require(
        end > 0,
        'config.data.chat_template writes no special token behind an answer '
        f'({text[-40:]!r}), so a model would never learn to stop; {_WAY_OUT}',
      )
      text, rest = text[:end], text[end:]
    else:
      text, rest = rest + text, ''
    found += stand_ins.shown(text, is_answer and learned[i // 2])
  return found + (stand_ins.shown(rest, False) if rest else [])


class _StandIns:
  """Characters that stand for what users spell like special tokens."""

  def __init__(self, special_tokens: Iterable[str]):
    longest_first = sorted(special_tokens, key=len, reverse=True)
    tokens = '|'.join(map(re.escape, longest_first))
    self._tokens = re.compile(tokens)
    self._hidden = re.compile(f'{tokens}|[{chr(_FIRST)}-{chr(_LAST)}]')
    self._numbers: dict[str, int] = {}

  def hide(self, text: str) -> str:
    """A text of a user in which no special token is spelled."""
    return self._hidden.sub(self._stand_in, text)

  def _stand_in(self, match: re.Match[str]) -> str:
    number = self._numbers.setdefault(match[0], len(self._numbers))
    errors.require(
      number <= _LAST - _FIRST,
      'conversations hold too many characters of a private plane of Unicode (U+100000 and above) '
      'for a chat template; remove them',
    )
    return chr(_FIRST + number)

  def shown(self, text: str, learned: bool) -> list[Piece]:
    """A rendered text in pieces of the template and of what was hidden."""
    hidden = {chr(_FIRST + number): words for words, number in self._numbers.items()}
    parts = re.split(f'([{"".join(hidden)}])', text) if hidden else [text]
    return [Piece(hidden.get(part, part), part not in hidden, learned) for part in parts if part]

  def end_of_last_token(self, text: str) -> int:
    """The place behind the last special token; 0 if there is none."""
    return max((match.end() for match in self._tokens.finditer(text)), default=0)
