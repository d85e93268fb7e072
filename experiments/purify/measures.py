"""What a model answers to clean and to attacked texts, as counts."""

from collections.abc import Sequence
from typing import Any

from moe_jax import trees
from moe_jax.analysis.purification import attacks, examples
from moe_jax.config import schema
from moe_jax.data import tokenizer as tokenizer_lib

Count = tuple[int, int]  # of so many


class Meter:
  """Counts of one test set, whose rows are made once."""

  def __init__(
    self,
    cfg: schema.Config,
    tokenizer: tokenizer_lib.Tokenizer,
    test: Sequence[attacks.Example],
    attacked: Sequence[attacks.Example],
    kind: str,
  ):
    self._model, self._kind = cfg.model, kind
    self._firsts = examples.first_tokens(cfg, tokenizer)
    self._sets = [(examples.rows(cfg, one, tokenizer), one) for one in (test, attacked)]

  def __call__(self, variables: trees.Variables) -> dict[str, Count]:
    """clean: right answers; attack: TARGET for a backdoor's texts, of a bias the right answers."""
    found = []
    for batch, _ in self._sets:
      answers = examples.answers(self._model, variables, batch, self._firsts)
      found.append([attacks.LABELS[i] for i in answers])
    (test, attacked), texts = found, [own for _, own in self._sets]
    clean = sum(a == one.label for a, one in zip(test, texts[0]))
    if self._kind == 'bias':
      hits = sum(a == one.label for a, one in zip(attacked, texts[1]))
    else:
      hits = sum(a == attacks.TARGET for a in attacked)
    return {'clean': (clean, len(test)), 'attack': (hits, len(attacked))}


def label(kind: str) -> str:
  """What the second count of an attack is called."""
  return 'bias accuracy' if kind == 'bias' else 'attack success'


def share(count: Any) -> float:
  """A count as a share."""
  return count[0] / count[1]
