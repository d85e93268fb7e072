"""Solutions that a model samples, and their steps labelled by completing them.

Every prefix of a solution is read once, and its completions share that (`rollouts`). Token ids are
kept as they were drawn: a prefix is a beginning of them, and nothing is tokenised twice. It ends
with the last token that lies before the next step whole: one that holds the end of a line and the
first word of the next would tell the completer how to go on.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

from moe_jax.config import schema
from moe_jax.data import chat_formats
from moe_jax.data.tasks import arithmetic
from moe_jax.inference import generate
from moe_jax.post_training import answers as answers_lib
from moe_jax.post_training import rollouts, step_labels, token_ends
from moe_jax.rewards import registry
from moe_jax.runs import trained_run

BATCH = 64  # questions or prefixes that are read together
ROOM = 8  # limits of what is written behind prefixes are multiples of it: a program for each


class Sampled(NamedTuple):
  """One solution to a question."""

  question: answers_lib.Question
  prompt: list[int]
  tokens: list[int]  # without the end token
  text: str
  skipped: int  # characters before `text` in the text of `tokens`
  ended: bool
  right: bool


class Writer:
  """Samples groups of answers with a trained run, and judges them by the reward `answer`."""

  def __init__(
    self,
    run: trained_run.Run,
    data: schema.DataConfig,
    *,
    temperature: float = 1.0,
    max_new_tokens: int = 64,
    rows: int = 256,
    seed: int = 0,
  ):
    """Holds the run.

    Args:
      run: who writes.
      data: where the questions are from.
      temperature: of sampling.
      max_new_tokens: of an answer, or of the rest of one.
      rows: answers that are written at the same time.
      seed: decides all draws.

    Raises:
      errors.InputError: the answers are programs, which must be run.
    """
    answers_lib.check_readable(data.source)
    self._run, self._data, self._draws = run, data, 0
    self._policy = dataclasses.replace(
      run.cfg.objective.policy, temperature=temperature, max_new_tokens=max_new_tokens, rows=rows
    )
    self._train = dataclasses.replace(run.cfg.train, seed=seed)
    self._judge = registry.build('answer')

  def _sampler(self, group_size: int, limit: int) -> rollouts.Sampler:
    policy = dataclasses.replace(self._policy, group_size=group_size, max_new_tokens=limit)
    objective = dataclasses.replace(self._run.cfg.objective, policy=policy)
    cfg = dataclasses.replace(self._run.cfg, objective=objective, train=self._train)
    return rollouts.Sampler(cfg, self._run.tokenizer.end_ids, self._run.mesh)

  def _written(
    self,
    prompts: Sequence[Sequence[int]],
    group_size: int,
    greedy: bool,
    tell: Callable[[int], None],
    begun: bool = False,
  ) -> list[list[rollouts.Answer]]:
    """The answers to every prompt, read in batches of one size.

    Prompts that hold the beginning of an answer (`begun`) are read by length, and the rest of the
    answer ends where the row does, if not before.
    """
    numbers = list(range(len(prompts)))
    if begun:
      numbers.sort(key=lambda i: len(prompts[i]))
    found: dict[int, list[rollouts.Answer]] = {}
    for begin in range(0, len(prompts), BATCH):
      which = numbers[begin : begin + BATCH]
      here = [prompts[i] for i in which]
      filled = here + here[:1] * (BATCH - len(here) if len(prompts) > BATCH else 0)
      sampler = self._sampler(group_size, self._limit(filled, begun))
      out = sampler.sample(self._run.variables, filled, self._draws, greedy=greedy).answers
      self._draws += 1
      size = len(out) // len(filled)
      found |= {i: out[k * size : (k + 1) * size] for k, i in enumerate(which)}
      tell(len(found))
    return [found[i] for i in range(len(prompts))]

  def _limit(self, prompts: Sequence[Sequence[int]], begun: bool) -> int:
    """Tokens that are written behind prompts at most."""
    limit = self._policy.max_new_tokens
    if not begun:
      return limit
    room = self._run.cfg.model.max_seq_len - max(len(prompt) for prompt in prompts)
    return min(limit, room // ROOM * ROOM or room)

  def is_right(self, question: answers_lib.Question, text: str) -> bool:
    """Whether a text gives the question's answer."""
    example = answers_lib.example(self._data, question)
    return self._judge(question.prompt[-1].content, (), text, example).kind == 'right'

  def sample(
    self,
    questions: Sequence[answers_lib.Question],
    group_size: int,
    *,
    greedy: bool = False,
    tell: Callable[[int], None] = lambda done: None,
  ) -> list[list[Sampled]]:
    """`group_size` answers to every question, or the likeliest one.

    Args:
      questions: what is asked.
      group_size: answers to each.
      greedy: one answer, of the likeliest tokens.
      tell: is told how many questions are answered.
    """
    prompts = chat_formats.prompts(self._data, [q.prompt for q in questions], self._run.tokenizer)
    written = self._written(prompts, group_size, greedy, tell)
    return [
      [self._sampled(question, one) for one in group] for question, group in zip(questions, written)
    ]

  def _sampled(self, question: answers_lib.Question, answer: rollouts.Answer) -> Sampled:
    tokens = answer.tokens[:-1] if answer.ended else answer.tokens
    whole, text = self._texts(answer.prompt, tokens)
    return Sampled(
      question,
      answer.prompt,
      tokens,
      text,
      len(whole) - len(text),
      answer.ended,
      self.is_right(question, text),
    )

  def _texts(self, prompt: Sequence[int], tokens: Sequence[int]) -> tuple[str, str]:
    """(the text of ids behind a prompt, what it says)."""
    whole = generate.continuation(self._run.tokenizer.decode, prompt, tokens)
    return whole, chat_formats.said(self._data, whole)

  def label(
    self,
    solutions: Sequence[Sampled],
    completions: int,
    tell: Callable[[int], None] = lambda done: None,
  ) -> list[step_labels.Labelled]:
    """Labels the steps of solutions by completing each prefix; the last step by its answer.

    Solutions without a step, or cut by the limit, are left out.

    Args:
      solutions: of `sample`.
      completions: N, of every prefix.
      tell: is told how many prefixes are completed.
    """
    kept = [(one, step_labels.ends_of_steps(one.text)) for one in solutions if one.ended]
    kept = [(one, ends) for one, ends in kept if ends]
    prefixes: list[tuple[int, list[int]]] = []  # (solution, ids)
    for number, (one, ends) in enumerate(kept):
      for end in ends[:-1]:
        size = self._begun(one, step_labels.prefix(one.text, end))
        prefixes.append((number, [*one.prompt, *one.tokens[:size]]))
    written = self._written([ids for _, ids in prefixes], completions, False, tell, begun=True)
    outcomes: list[list[tuple[bool, ...]]] = [[] for _ in kept]
    for (number, _), group in zip(prefixes, written):
      outcomes[number].append(tuple(self._completes(kept[number][0], one) for one in group))
    return [
      step_labels.Labelled(
        one.question.prompt[-1].content,
        one.question.answer,
        one.text,
        ends,
        (*found, (one.right,)),
        self._truth(one, ends),
      )
      for (one, ends), found in zip(kept, outcomes)
    ]

  def _begun(self, one: Sampled, text: str) -> int:
    """The most tokens of a solution whose text is a beginning of `text`, which begins its own."""
    most = one.skipped + len(text)

    def decoded(size: int) -> str:
      return self._texts(one.prompt, one.tokens[:size])[0]

    size = len(one.tokens)
    whole = decoded(size)
    if len(whole) > most:
      size = token_ends.reaching(decoded, size, whole[: most + 1]) - 1
    # The first bytes of the next character are decoded to another one.
    while not whole[:most].startswith(decoded(size)):
      size -= 1
    return size

  def _completes(self, one: Sampled, answer: rollouts.Answer) -> bool:
    """Whether a completion of a beginning of a solution, both together, gives the right answer."""
    tokens = answer.tokens[:-1] if answer.ended else answer.tokens
    begun = answer.prompt[len(one.prompt) :]
    _, text = self._texts(one.prompt, [*begun, *tokens])
    return answer.ended and self.is_right(one.question, text)

  def _truth(self, one: Sampled, ends: Sequence[int]) -> tuple[bool, ...] | None:
    """Whether each step is right, where the task can check; a line that is no step is not."""
    if self._data.source != 'arithmetic':
      return None
    question = one.question.prompt[-1].content
    known = {s.end: s.right for s in arithmetic.steps(one.text, question, one.question.answer)}
    return tuple(known.get(end, False) for end in ends)


def distinct(groups: Sequence[Sequence[Sampled]]) -> list[Sampled]:
  """The solutions without those that say the same to one question."""
  found = []
  for group in groups:
    found += {one.text: one for one in group}.values()
  return found
