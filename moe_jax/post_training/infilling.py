"""How often a model fills in the end of a line, taken out of held-out text, exactly as it was.

The model must say where the middle ends, too: it may write one token more than the longest middle
has, and one that does not end by then has not filled its gap.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from moe_jax import errors
from moe_jax.config import schema
from moe_jax.data import fim, sources
from moe_jax.data import tokenizer as tokenizer_lib
from moe_jax.inference import sampling
from moe_jax.post_training import answers

LONGEST = 24  # characters that are taken out at most


class Gap(NamedTuple):
  """A document without the end of one of its lines."""

  prefix: str
  suffix: str
  middle: str


class Filled(NamedTuple):
  """Counts over gaps."""

  right: int
  total: int

  def __str__(self) -> str:
    low, high = answers.wilson(self.right, self.total)
    share = self.right / self.total
    return f'{self.right} of {self.total} exact: {share:.1%} [{low:.1%}, {high:.1%}]'


def gaps(data: schema.DataConfig, most: int) -> Iterator[tuple[str, list[Gap]]]:
  """Yields (domain label, up to `most` gaps in its held-out documents), one per document.

  Where a gap is follows from the document's name alone.

  Raises:
    errors.InputError: the data are conversations.
  """
  for label, spec in sources.specs(data).items():
    errors.require(
      spec.source not in schema.CHAT_SOURCES,
      f'{spec.where} holds conversations, and gaps are made in text; leave --infill out',
    )
    found: list[Gap] = []
    for document in sources.read(spec, quiet=True):
      if len(found) == most:
        break
      if sources.is_heldout(document.name, data.heldout_fraction):
        made = gap(document.text.decode('utf-8'), fim.document_rng(0, document.name))
        found += [made] if made else []
    if found:
      yield label or spec.source, found


def gap(text: str, rng: np.random.Generator) -> Gap | None:
  """Takes the end of a random line out, at least one character of it; None without a long line.

  Lines of two to `LONGEST` characters more than their indentation are long enough and not too long.
  """
  lines = text.splitlines(keepends=True)
  fits = [i for i, line in enumerate(lines) if 2 <= len(line.strip()) <= LONGEST]
  if not fits:
    return None
  number = fits[int(rng.integers(len(fits)))]
  line = lines[number]
  end = len(line.rstrip())
  begin = int(rng.integers(len(line) - len(line.lstrip()) + 1, end))
  before, behind = ''.join(lines[:number]), ''.join(lines[number + 1 :])
  return Gap(before + line[:begin], line[end:] + behind, line[begin:end])


def measure(model: answers.Model, found: Sequence[Gap]) -> Filled:
  """Fills every gap greedily, and counts those that are as they were and end there.

  Prefix and suffix are cut to what stands next to the gap, half of the row for each.

  Raises:
    errors.InputError: the tokenizer lacks the tokens of fill-in-the-middle, or rows are too short.
  """
  tokenizer, length = model.tokenizer, model.config.model.max_seq_len
  fim.check(tokenizer, 1.0)
  limit = 1 + max((len(tokenizer.encode(one.middle)) for one in found), default=0)
  half = (length - limit - 4) // 2
  errors.require(
    half > 0,
    f'config.model.max_seq_len={length} is too short to fill gaps of {limit - 1} tokens with text '
    'on both sides; leave --infill out',
  )
  right, greedy = 0, sampling.Sampling(temperature=0.0)
  for begin in range(0, len(found), answers.BATCH):
    batch = found[begin : begin + answers.BATCH]
    prompts = [_prompt(tokenizer, one, half) for one in batch]
    written = model.complete(prompts, limit, greedy)
    right += sum(
      text == one.middle and len(ids) < limit  # less than the limit: it has ended
      for ids, text, one in zip(written.tokens, written.texts, batch, strict=True)
    )
  return Filled(right, len(found))


def _prompt(tokenizer: tokenizer_lib.Tokenizer, one: Gap, half: int) -> list[int]:
  prefix, suffix = tokenizer.encode(one.prefix)[-half:], tokenizer.encode(one.suffix)[:half]
  return [int(i) for i in fim.assemble(tokenizer, (prefix, suffix, []))[:-1]]
