"""Fill-in-the-middle: some training documents are rearranged as prefix, suffix, middle (PSM).

`BOS BEGIN prefix HOLE suffix END middle EOS`, per document and before packing, with an ordinary
next-token loss on every token (DeepSeek-Coder-V2, section 3; split points uniform over characters,
as in Bavarian et al., 2022). The three parts are tokenised apart, as they will be when a user asks
for a middle.
"""

from collections.abc import Sequence

import numpy as np

from moe_jax import errors
from moe_jax.data import hashing
from moe_jax.data import tokenizer as tokenizer_lib


def check(tokenizer: tokenizer_lib.Tokenizer, fim_rate: float):
  """Raises errors.InputError if FIM is asked for and the tokenizer lacks its three tokens."""
  if fim_rate > 0 and tokenizer.fim_ids is None:
    raise errors.InputError(
      f'config.data.fim_rate={fim_rate} needs the tokens {", ".join(tokenizer_lib.FIM_TOKENS)} in '
      "the tokenizer (config.data.tokenizer); set fim_rate=0, or use tokenizer='bpe' or 'bytes'"
    )


def document_rng(seed: int, name: str) -> np.random.Generator:
  """The randomness of one document: it depends on no other document and on no order."""
  return np.random.Generator(np.random.PCG64([seed, hashing.integer('fim', name)]))


def split(text: str, rng: np.random.Generator, fim_rate: float) -> tuple[str, ...]:
  """Returns `(text,)`, or with probability `fim_rate` its `(prefix, suffix, middle)`."""
  if rng.random() >= fim_rate:
    return (text,)
  i, j = sorted(rng.integers(0, len(text) + 1, size=2))
  return text[:i], text[j:], text[i:j]


def assemble(
  tokenizer: tokenizer_lib.Tokenizer, parts: Sequence[tokenizer_lib.Ids]
) -> tokenizer_lib.Ids:
  """Joins the ids of what `split` returned into one document, BOS to EOS."""
  if len(parts) == 1:
    return _joined([tokenizer.bos_id], parts[0], [tokenizer.eos_id])
  prefix, suffix, middle = parts
  assert tokenizer.fim_ids is not None, '`check` comes before `split`'
  begin, hole, end = tokenizer.fim_ids
  front, last = [tokenizer.bos_id, begin], [tokenizer.eos_id]
  return _joined(front, prefix, [hole], suffix, [end], middle, last)


def _joined(*parts: tokenizer_lib.Ids) -> tokenizer_lib.Ids:
  """Ids one behind the other; an array if any part is one."""
  if any(isinstance(part, np.ndarray) for part in parts):
    return np.concatenate([np.asarray(part, np.uint32) for part in parts])
  return [number for part in parts for number in part]


def prompt(tokenizer: tokenizer_lib.Tokenizer, prefix: str, suffix: str) -> list[int]:
  """`BOS BEGIN prefix HOLE suffix END`, behind which a model writes the middle.

  Raises:
    errors.InputError: the tokenizer lacks the three tokens.
  """
  if tokenizer.fim_ids is None:
    raise errors.InputError(
      f'--prefix={prefix[:20]!r} and --suffix need the tokens '
      f"{', '.join(tokenizer_lib.FIM_TOKENS)} in the run's tokenizer; use --prompt, or a model "
      'trained with them'
    )
  parts = tokenizer.encode(prefix), tokenizer.encode(suffix), []
  return list(assemble(tokenizer, parts)[:-1])
