"""Pairs of answers out of a model's own: a right answer preferred to a wrong one of its samples."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from moe_jax.config import schema
from moe_jax.data import chat_formats
from moe_jax.inference import sampling as sampling_lib
from moe_jax.post_training import answers


class Asked(NamedTuple):
  """What came of one question."""

  right: int  # samples that are right
  wrong: int  # samples that are wrong, and have ended
  row: dict[str, Any] | None  # of a file of preferences; None where no sample is wrong


def sampled(
  model: answers.Model,
  questions: Sequence[answers.Question],
  data: schema.DataConfig,
  *,
  samples: int,
  max_new_tokens: int,
  sampling: sampling_lib.Sampling,
) -> Iterator[Asked]:
  """Yields a pair per question: the model's first wrong answer against a right one.

  Preferred is the model's own first right answer, or that of the data where none of its samples is
  right. A sample without an end token is neither right nor wrong.

  Args:
    model: that answers.
    questions: see `answers.questions`.
    data: where they come from, which decides what is right; and the format in which they are asked.
    samples: answers per question.
    max_new_tokens: limit of an answer.
    sampling: how they are drawn; the k-th samples of all questions with seed + k.
  """
  judge = answers.is_right(data.source)
  for begin in range(0, len(questions), answers.BATCH):
    batch = questions[begin : begin + answers.BATCH]
    prompts = chat_formats.prompts(data, [q.prompt for q in batch], model.tokenizer)
    found: list[tuple[list[str], list[str]]] = [([], []) for _ in batch]  # right, wrong
    for k in range(samples):
      # Another seed per batch too: rows of one number draw alike.
      seed = (sampling.seed + begin * samples + k) % 2**32
      drawn = dataclasses.replace(sampling, seed=seed)
      written = model.complete(prompts, max_new_tokens, drawn)
      for question, lists, text, ids in zip(batch, found, written.texts, written.tokens):
        if len(ids) < max_new_tokens:
          text = chat_formats.said(data, text)
          lists[0 if judge(text, question.answer) else 1].append(text)
    for question, (right, wrong) in zip(batch, found):
      row = None
      if wrong:
        prompt = [{'role': turn.role, 'content': turn.content} for turn in question.prompt]
        chosen = right[0] if right else question.answer
        row = {'prompt': prompt, 'chosen': chosen, 'rejected': wrong[0]}
      yield Asked(len(right), len(wrong), row)
