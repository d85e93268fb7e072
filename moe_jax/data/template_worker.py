"""Renders conversations by a jinja template, in a process of its own.

A template is a program that came with a checkpoint. It runs in jinja2's immutable sandbox, which
keeps it from Python's insides; what it may use of time and memory is limited by the operating
system. `chat_template` starts this file, which imports nothing of this library.

Standard input: one JSON object {"template", "bos_token", "eos_token", "seconds", "conversations"},
each conversation a list of {"role", "content"}. Standard output: {"pieces": [...]}, see `cut`, or
{"error": "..."} in its place.
"""

import json
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import ext, meta, nodes, parser, sandbox

SECONDS = 5  # of CPU time for a conversation
MEMORY = 2**30  # bytes of address space, beside 40 for each one of the request
LARGEST = 2**22  # characters of a conversation

Message = Mapping[str, str]
Write = Callable[[Sequence[Message], bool], str]
# Names that transformers gives to a template besides; a checkpoint rarely needs them.
_UNKNOWN = frozenset(f'{name}_token' for name in ('pad', 'unk', 'sep', 'cls', 'mask'))


class Generation(ext.Extension):
  """Reads the blocks {% generation %} ... {% endgeneration %} as what stands in them."""

  tags = {'generation'}

  def parse(self, parser: parser.Parser) -> nodes.Node:
    line = next(parser.stream).lineno
    body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
    return nodes.Scope(body, lineno=line)


def writer(template: str, bos_token: str, eos_token: str) -> Write:
  """What renders messages, with the words that open an answer behind them if asked to.

  Raises:
    jinja2.TemplateError: the template is malformed, or needs what it is not given.
  """
  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
  )
  environment.filters['tojson'] = _to_json
  environment.globals['raise_exception'] = _refuse
  missing = meta.find_undeclared_variables(environment.parse(template)) & _UNKNOWN
  if missing:
    raise jinja2.TemplateError(f'it needs {", ".join(sorted(missing))}, which is not given to it')
  compiled = environment.from_string(template)

  def write(messages: Sequence[Message], opens_answer: bool) -> str:
    parts, size = [], 0
    for part in compiled.generate(
      messages=messages,
      add_generation_prompt=opens_answer,
      bos_token=bos_token,
      eos_token=eos_token,
      tools=None,
      documents=None,
    ):
      size += len(part)
      if size > LARGEST:
        raise jinja2.TemplateError(f'it writes more than {LARGEST:,} characters')
      parts.append(part)
    return ''.join(parts)

  return write


def cut(write: Write, messages: Sequence[Message]) -> list[str]:
  """A conversation as text in pieces: what leads to an answer, the answer, and so on.

  With a question at the end the last piece ends where its answer is to begin. Together the pieces
  are what the template writes.

  Raises:
    jinja2.TemplateError: what it writes of the beginning changes with what follows, so no part of
      the text is the answer.
  """
  found, done = [], ''
  ends = [(i, i + 1) for i, message in enumerate(messages) if message['role'] == 'assistant']
  steps = [(end, end == i) for i, behind in ends for end in (i, behind)]
  if messages[-1]['role'] != 'assistant':
    steps.append((len(messages), True))
  for end, opens_answer in steps:
    text = write(messages[:end], opens_answer)
    if not text.startswith(done):
      raise jinja2.TemplateError(
        f'what it writes up to message {end} does not begin with what it wrote before '
        f'({done[-40:]!r} at its end), so it cannot be told which text is the answer'
      )
    found.append(text[len(done) :])
    done = text
  return found


def answer(request: Mapping[str, Any], before_each: Callable[[], object]) -> dict[str, Any]:
  """What is written to standard output.

  Args:
    request: what was read.
    before_each: called before the template is read, and before every conversation.
  """
  pieces = []
  try:
    before_each()  # constants are computed when a template is read
    write = writer(request['template'], request['bos_token'], request['eos_token'])
    for messages in request['conversations']:
      before_each()
      pieces.append(cut(write, messages))
    return {'pieces': pieces}
  except Exception as e:  # a template can raise whatever Python can
    line = f'line {e.lineno}: ' if isinstance(e, jinja2.TemplateSyntaxError) else ''
    kind = '' if isinstance(e, jinja2.TemplateError) else f'{type(e).__name__}: '
    return {'error': f'{line}{kind}{e} (conversation {len(pieces)} of this batch)'}


def _to_json(value: Any, indent: int | None = None, **unused: Any) -> str:
  return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str):
  raise jinja2.TemplateError(message)


def _allow(seconds: int):
  """Gives the next conversation its time; who uses it up is ended by the signal SIGXCPU."""
  used = resource.getrusage(resource.RUSAGE_SELF)
  until = int(used.ru_utime + used.ru_stime) + 1 + seconds
  hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
  resource.setrlimit(resource.RLIMIT_CPU, (until, hard))


def main():
  """Answers one request."""
  text = sys.stdin.buffer.read()
  limit = MEMORY + 40 * len(text)
  resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
  request = json.loads(text)
  json.dump(answer(request, lambda: _allow(request['seconds'])), sys.stdout)


if __name__ == '__main__':
  main()
