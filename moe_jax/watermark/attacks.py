"""What happens to a marked text before somebody reads it: ids in, ids out."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from moe_jax import errors


class Substituted(NamedTuple):
  """A text with other tokens in some places."""

  ids: list[int]
  replaced: int


def substitute(
  ids: Sequence[int],
  logits: np.ndarray,
  share: float,
  rng: np.random.Generator,
  threshold: float = 1.0,
) -> Substituted:
  """Replaces a share of the tokens by others that a model finds about as likely.

  The paper's attacker is a masked language model; here it is a causal one, which sees what stands
  before a place in the text as it was. Places come in random order, at most three times as many as
  are to be replaced: a place is left alone if no other token is likely enough.

  Args:
    ids: the text.
    logits: [L, V] of the token at each place.
    share: of the places, 0 to 1.
    rng: decides places and tokens.
    threshold: how far below the logit of the token that of its successor may be.

  Raises:
    errors.InputError: share is not between 0 and 1.
  """
  errors.require(0 <= share <= 1, f'--share={share} must be between 0 and 1')
  found, wanted, done = list(ids), round(share * len(ids)), 0
  for place in rng.permutation(len(found))[: 3 * wanted]:
    if done == wanted:
      break
    own, row = found[place], logits[place]
    allowed = np.flatnonzero(row >= row[own] - threshold)
    allowed = allowed[allowed != own]
    if len(allowed):
      weights = np.exp(row[allowed] - row[allowed].max())
      found[place] = int(rng.choice(allowed, p=weights / weights.sum()))
      done += 1
  return Substituted(found, done)


def paste(ids: Sequence[int], host: Sequence[int], rng: np.random.Generator) -> list[int]:
  """The text at a random place of another one."""
  at = int(rng.integers(len(host) + 1))
  return [*host[:at], *ids, *host[at:]]


def cut(ids: Sequence[int], share: float, rng: np.random.Generator) -> list[int]:
  """The text without a share of its tokens, which are taken from its beginning and its end.

  Raises:
    errors.InputError: share is not between 0 and 1.
  """
  errors.require(0 <= share <= 1, f'--share={share} must be between 0 and 1')
  gone = round(share * len(ids))
  first = int(rng.integers(gone + 1))
  return list(ids[first : len(ids) - (gone - first)])


def encode_again(
  ids: Sequence[int],
  decode: Callable[[Sequence[int]], str],
  encode: Callable[[str], Sequence[int]],
) -> list[int]:
  """The ids of the text that ids make: others, where the model has not written the usual pieces."""
  return list(encode(decode(ids)))
