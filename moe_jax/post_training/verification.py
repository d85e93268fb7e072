"""Choosing among many answers to one question: votes, best-of-N, and weighted votes.

Math-Shepherd (arXiv 2312.08935, section 3.3): a solution is worth the least of its step scores;
self-consistency with a reward model takes the answer whose solutions are worth most together.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

METHODS = ('self_consistency', 'orm', 'prm', 'self_consistency+orm', 'self_consistency+prm')
# Step scores -> score of the solution. `min` favours short solutions, so all are reported.
AGGREGATIONS: dict[str, Callable[[np.ndarray], float]] = {
  'min': lambda scores: float(scores.min()),
  'last': lambda scores: float(scores[-1]),
  'product': lambda scores: float(scores.prod()),
}


class Candidate(NamedTuple):
  """One answer to a question."""

  answer: str | None  # in canonical form, so that equal ones vote together; None if it gives none
  right: bool
  steps: int
  orm: float  # probability that the solution is right
  prm: tuple[float, ...]  # probability of each step


def aggregate(scores: Sequence[float], how: str) -> float:
  """The score of a solution from those of its steps; 0 for a solution without steps."""
  return AGGREGATIONS[how](np.asarray(scores, np.float64)) if scores else 0.0


def best(scores: Sequence[float]) -> int:
  """The index of the largest score, the first of equal ones."""
  return int(np.argmax(scores))


def vote(answers: Sequence[str | None], weights: Sequence[float]) -> int:
  """The index of the first candidate whose answer has the largest weight in all.

  Candidates without an answer do not vote; where none has one, 0.
  """
  totals: dict[str, float] = {}
  for answer, weight in zip(answers, weights, strict=True):
    if answer is not None:
      totals[answer] = totals.get(answer, 0.0) + weight
  if not totals:
    return 0
  winner = max(totals, key=lambda answer: totals[answer])  # the first of equal ones
  return list(answers).index(winner)


def choose(candidates: Sequence[Candidate], method: str, how: str = 'min') -> int:
  """The index of the candidate that a method takes.

  Args:
    candidates: answers to one question.
    method: one of `METHODS`.
    how: key of `AGGREGATIONS`.
  """
  kind = method.rpartition('+')[2]
  if kind == 'prm':
    scores = [aggregate(one.prm, how) for one in candidates]
  elif kind == 'orm':
    scores = [one.orm for one in candidates]
  else:
    scores = [1.0] * len(candidates)
  if method.startswith('self_consistency'):
    return vote([one.answer for one in candidates], scores)
  return best(scores)


def curves(
  questions: Sequence[Sequence[Candidate]], counts: Sequence[int], how: str = 'min'
) -> dict[str, dict[int, tuple[int, float]]]:
  """Method -> N -> (questions answered rightly, mean steps of what was chosen).

  Args:
    questions: the candidates of each; the first N of them are chosen among.
    counts: values of N, none above the number of candidates.
    how: key of `AGGREGATIONS`.
  """
  found: dict[str, dict[int, tuple[int, float]]] = {}
  for method in METHODS:
    found[method] = {}
    for n in counts:
      chosen = [one[choose(one[:n], method, how)] for one in questions]
      steps = float(np.mean([c.steps for c in chosen]))
      found[method][n] = sum(c.right for c in chosen), steps
  return found


class LabelQuality(NamedTuple):
  """Hard labels of N completions against true ones, counts of steps."""

  both: int  # labelled good and right
  labelled: int  # labelled good
  true: int  # right
  agreeing: int  # labelled as they are
  steps: int

  def as_dict(self) -> dict[str, float]:
    """Precision and recall of the good ones, and accuracy."""
    return {
      'precision': self.both / max(self.labelled, 1),
      'recall': self.both / max(self.true, 1),
      'accuracy': self.agreeing / max(self.steps, 1),
      'steps': self.steps,
    }


def label_quality(
  outcomes: Sequence[Sequence[bool]], truth: Sequence[bool], counts: Sequence[int]
) -> Mapping[int, LabelQuality]:
  """N -> quality of hard labels that use the first N completions of every step."""
  found = {}
  real = np.asarray(truth, bool)
  for n in counts:
    hard = np.array([any(one[:n]) for one in outcomes], bool)
    found[n] = LabelQuality(
      int((hard & real).sum()),
      int(hard.sum()),
      int(real.sum()),
      int((hard == real).sum()),
      len(real),
    )
  return found


def auc(scores: npt.ArrayLike, good: npt.ArrayLike) -> float:
  """The share of pairs of a good and a bad one whose good one has the larger score, ties half.

  The area under the ROC curve, by ranks; NaN where all are good, or none is.
  """
  values, is_good = np.asarray(scores, np.float64), np.asarray(good, bool)
  num_good, num_bad = int(is_good.sum()), int((~is_good).sum())
  if not num_good or not num_bad:
    return float('nan')
  _, place, count = np.unique(values, return_inverse=True, return_counts=True)
  ranks = (np.cumsum(count) - (count - 1) / 2)[place]
  return float((ranks[is_good].sum() - num_good * (num_good + 1) / 2) / (num_good * num_bad))
