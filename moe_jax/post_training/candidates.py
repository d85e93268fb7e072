"""Sampled solutions with the scores of judges, as what is chosen among."""

import functools
from collections.abc import Callable, Mapping, Sequence

from moe_jax.post_training import solutions, step_labels, step_scores, verification
from moe_jax.rewards import numbers
from moe_jax.runs import trained_run


def judged(
  groups: Sequence[Sequence[solutions.Sampled]],
  judges: Mapping[str, trained_run.Run],
  tell_unread: Callable[[str, int], object] = lambda kind, number: None,
) -> list[list[verification.Candidate]]:
  """The solutions of every question with their answers in canonical form and their scores.

  Args:
    groups: solutions to each question.
    judges: of whole solutions ('orm') and of steps ('prm').
    tell_unread: is told (judge, how many of its scores are `step_scores.UNREAD`), if any are.
  """
  flat = [one for group in groups for one in group]
  texts = [
    step_scores.Solution(
      one.question.prompt[-1].content, one.text, step_labels.ends_of_steps(one.text)
    )
    for one in flat
  ]
  scores = {
    kind: step_scores.score(judge, texts, tell_unread=functools.partial(tell_unread, kind))
    for kind, judge in judges.items()
  }
  found = iter(
    verification.Candidate(
      numbers.answer_in(one.text, one.question.answer),
      one.right,
      len(text.ends),
      float(orm[0]) if len(orm) else 0.0,
      tuple(map(float, prm)),
    )
    for one, text, orm, prm in zip(flat, texts, scores['orm'], scores['prm'], strict=True)
  )
  return [[next(found) for _ in group] for group in groups]
