"""Continues prompts with a trained run or a downloaded checkpoint.

python -m experiments.generate --workdir=runs/quickstart --prompt="def main(" --max_new_tokens=64 \
  [--temperature=0.8 --top_k=50 --top_p=0.95 --min_p=0.05 --repetition_penalty=1.1 --seed=0] \
  [--stop="END" --stop_id=7 --stream --speculative --step=200 --json]
python -m experiments.generate --workdir=W --chat --prompt="What is 7 + 5?" --temperature=0
python -m experiments.generate --workdir=W --prefix="def add(a, b):" --suffix="  return c"

--prompt may be repeated, or stand in --prompts_file, one per line: the prompts are one batch. A
line that is a whole JSON string is read as one (for line ends), any other is text as it stands.
"""

import functools
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags

from experiments.common import cli, json_output
from moe_jax import errors
from moe_jax.data import json_files

if TYPE_CHECKING:
  from moe_jax.api import run
  from moe_jax.inference import sampling as sampling_lib


def define_flags():
  """Flags of this command."""
  cli.workdir_flag('directory of a trained run, or of a downloaded checkpoint', bucket=True)
  cli.adapter_flag()
  flags.DEFINE_multi_string('prompt', None, 'text to continue; repeat it for a batch')
  cli.path_flag('prompts_file', None, 'file of prompts, one per line')
  flags.DEFINE_bool('chat', False, "each prompt is a question, in the run's data.chat_format")
  flags.DEFINE_string('prefix', None, 'fill in the middle: what stands before it')
  flags.DEFINE_string('suffix', None, 'fill in the middle: what stands behind it')
  flags.DEFINE_integer('max_new_tokens', 64, 'tokens to add at most')
  flags.DEFINE_float('temperature', 1.0, '0 takes the most likely token')
  flags.DEFINE_integer('top_k', 0, 'draw among the k most likely tokens; 0 = all')
  flags.DEFINE_float('top_p', 1.0, 'draw among the fewest tokens whose probabilities reach p')
  flags.DEFINE_float('min_p', 0.0, 'draw among tokens this times as likely as the likeliest')
  flags.DEFINE_float(
    'repetition_penalty', 1.0, 'makes tokens that stand there less likely; 1 = off'
  )
  flags.DEFINE_multi_string('stop', [], 'string that ends a continuation; repeat it for more')
  flags.DEFINE_multi_integer(
    'stop_id', [], 'token id that ends a continuation, beside the end token'
  )
  flags.DEFINE_bool(
    'special_tokens', False, 'read the spelling of a special token in a prompt as that token'
  )
  flags.DEFINE_integer('seed', 0, 'decides the draws')
  flags.DEFINE_integer('step', None, 'checkpoint to use; the newest whole one if not given')
  flags.DEFINE_bool('stream', False, 'show the text of one prompt as it comes')
  flags.DEFINE_bool('speculative', False, 'draft with the module of multi-token prediction')
  flags.DEFINE_bool('json', False, 'print one JSON object (a list for several prompts), no more')


def main(unused_argv: Sequence[str]):
  """Prints prompts and continuations."""
  from moe_jax.api import load
  from moe_jax.data import chat_formats, fim
  from moe_jax.inference import sampling as sampling_lib
  from moe_jax.runs import trained_run

  values = flags.FLAGS
  workdir, texts = cli.required('workdir'), _texts()
  names = ('temperature', 'top_k', 'top_p', 'seed', 'min_p', 'repetition_penalty')
  sampling = sampling_lib.Sampling(**{name: values[name].value for name in names})
  _check(len(texts))
  loaded = load.load(workdir, step=values.step, adapter=values.adapter, flag='--workdir')
  if values.chat:
    errors.require(
      values.prefix is None and not values.special_tokens,
      '--chat asks questions: give them with --prompt, without --prefix and --special_tokens',
    )
    prompts = loaded.encode_chats(texts)
  elif values.prefix is None:
    _warn_of_special_tokens(loaded, texts)
    read = functools.partial(trained_run.encode_prompt, special_tokens=values.special_tokens)
    prompts = [read(loaded.trained, text) for text in texts]
  else:
    prompts = [fim.prompt(loaded.tokenizer, values.prefix, values.suffix)]
  if values.stream:
    print(texts[0], end='', flush=True)
  completions, tokens, note, speed = _write(loaded, prompts, sampling)
  if values.chat:
    completions = [chat_formats.said(loaded.config.data, text) for text in completions]
  if values.json:
    keys = ('prompt', 'completion', 'tokens', 'tokens_per_second')
    records = [dict(zip(keys, (*row, speed))) for row in zip(texts, completions, tokens)]
    json_output.show(records[0] if len(records) == 1 else records)
    return
  if not values.stream:
    between = '\n' if values.chat else ''
    print('\n---\n'.join(a + between + b for a, b in zip(texts, completions)), end='')
  print(f'\n[{sum(map(len, tokens))} tokens, {speed:.0f} tokens/s{note}]')


def _texts() -> list[str]:
  """What is continued, as the user gave it."""
  values = flags.FLAGS
  given = [n for n in ('prompt', 'prompts_file', 'prefix') if values[n].value is not None]
  errors.require(
    len(given) == 1 and (values.prefix is None) == (values.suffix is None),
    f'--prompt is missing: give --prompt, --prompts_file, or --prefix and --suffix, not {given}',
  )
  if values.prefix is not None:
    cli.refuse_idle(('special_tokens',), 'with --prefix, which is read as ordinary text')
  if values.prompts_file is None:
    return [values.prefix] if values.prompt is None else list(values.prompt)
  try:
    texts = _lines(json_files.lines(pathlib.Path(values.prompts_file)))
  except (OSError, ValueError) as e:
    raise errors.InputError(
      f'--prompts_file={values.prompts_file} cannot be read ({e}); give a text file of one prompt '
      'per line'
    ) from e
  errors.require(
    bool(texts), f'--prompts_file={values.prompts_file} is empty; write a prompt per line'
  )
  return texts


def _lines(lines: Sequence[str]) -> list[str]:
  """Prompts of a file's lines; says how lines that begin with a quotation mark were read."""
  texts, read, plain = [], 0, []
  for number, line in enumerate(lines, start=1):
    text = line
    if line.startswith('"'):
      try:
        text, read = str(json_files.parse(line)), read + 1
      except ValueError:
        plain.append(str(number))
    if line:
      texts.append(text)
  if read or plain:
    note = f'{read} lines of --prompts_file were read as JSON strings'
    if plain:
      note += f'; line {", ".join(plain)} begins with a quotation mark but is none: taken as text'
    print(note, file=sys.stderr)
  return texts


def _warn_of_special_tokens(loaded: 'run.Run', texts: Sequence[str]):
  spelled = sorted({t for text in texts for t in loaded.tokenizer.special_tokens_in(text)})
  if spelled and not flags.FLAGS.special_tokens:
    print(
      f'--prompt spells {", ".join(spelled)}, read as ordinary characters, as in training; '
      '--special_tokens reads it as the token',
      file=sys.stderr,
    )


def _check(num_prompts: int):
  values = flags.FLAGS
  errors.require(
    not values.stream or (num_prompts == 1 and not values.json),
    f'--stream shows one text as it comes, not {num_prompts} prompts or --json; leave it out',
  )
  taken = [name for name in ('stop', 'stop_id', 'stream') if values[name].value]
  errors.require(
    not (values.speculative and taken),
    f'--speculative cannot go with {", ".join("--" + name for name in taken)}; leave one out',
  )


def _write(
  loaded: 'run.Run', prompts: list[list[int]], sampling: 'sampling_lib.Sampling'
) -> tuple[list[str], list[list[int]], str, float]:
  """(completions, their tokens, a note for the last line, tokens per second)."""
  from moe_jax.inference import generate as generate_lib
  from moe_jax.inference import speculative

  values, tokenizer, limit = flags.FLAGS, loaded.tokenizer, flags.FLAGS.max_new_tokens
  if values.speculative:
    model, ends = (loaded.config.model, loaded.variables), tokenizer.end_ids
    found = speculative.speculate(*model, prompts, limit, ends, sampling, timed=True)
    pairs = zip(prompts, found.tokens)
    texts = [generate_lib.continuation(tokenizer.decode, *pair) for pair in pairs]
    note = f', {found.accepted} of {found.drafted} drafts accepted ({found.acceptance:.1%})'
    return texts, found.tokens, note, found.tokens_per_second

  def show(row: int, text: str):
    print(text, end='', flush=True)

  found = loaded.complete(
    prompts,
    limit,
    sampling,
    stop=values.stop,
    stop_ids=values.stop_id,
    on_text=show if values.stream else None,
    timed=True,
  )
  return found.texts, found.tokens, '', found.tokens_per_second


if __name__ == '__main__':
  cli.run(main, define_flags)
