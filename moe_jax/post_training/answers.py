"""How many held-out questions a model answers rightly, greedily or drawn; programs are run."""

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from moe_jax import errors
from moe_jax.config import schema
from moe_jax.data import chat_formats, conversations, sources
from moe_jax.data import tokenizer as tokenizer_lib
from moe_jax.data.tasks import arithmetic, generated
from moe_jax.inference import generate, sampling
from moe_jax.rewards import numbers, pool, reward

_Z = 1.959964  # of a two-sided interval of 95 %
BATCH = 32  # prompts that are continued together
GREEDY = sampling.Sampling(temperature=0.0)
MOST_TOKENS = 64  # of an answer, if not told otherwise


class Question(NamedTuple):
  """A prompt and the answer that a held-out conversation gives to it."""

  prompt: conversations.Conversation  # ends with the user
  answer: str


def room(
  model: schema.ModelConfig,
  tokenizer: tokenizer_lib.Tokenizer,
  questions: Sequence[Question],
  data: schema.DataConfig,
) -> int:
  """Tokens of an answer: `MOST_TOKENS`, or what the longest question leaves of a row, if less.

  Args:
    model: which answers.
    tokenizer: its own.
    questions: what is asked.
    data: how conversations are written.
  """
  prompts = chat_formats.prompts(data, [q.prompt for q in questions], tokenizer)
  longest = max(len(prompt) for prompt in prompts)
  # A question that fills a row is refused when it is asked.
  return max(1, min(MOST_TOKENS, model.max_seq_len - longest))


class Model(Protocol):
  """What writes; `moe_jax.Run` does."""

  config: schema.Config
  tokenizer: tokenizer_lib.Tokenizer

  def complete(
    self,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: sampling.Sampling,
  ) -> generate.Generation:
    """Continues prompts."""
    ...


class Accuracy(NamedTuple):
  """Counts over questions."""

  right: int
  total: int
  ended: int  # answers with an end token within the limit
  right_steps: int  # of arithmetic, see `arithmetic.num_right_steps`
  steps: int
  kinds: Mapping[str, int] = {}  # of `rewards.reward.KINDS`: of programs, how their tests went

  def interval(self) -> tuple[float, float]:
    """Wilson's 95 % interval of the share that is right."""
    return wilson(self.right, self.total)

  def __str__(self) -> str:
    low, high = self.interval()
    text = f'{self.right} of {self.total} right: {self.right / self.total:.1%} '
    text += f'[{low:.1%}, {high:.1%}]; {self.ended} ended within the limit'
    text += f'; {self.right_steps} of {self.steps} steps right' if self.steps else ''
    return text + ''.join(f'; {kind} {self.kinds[kind]}' for kind in sorted(self.kinds))

  def as_dict(self) -> dict[str, object]:
    """The stable keys of `answers --json`."""
    return self._asdict() | {'share': self.right / self.total, 'interval': self.interval()}


def wilson(right: int, total: int) -> tuple[float, float]:
  """The 95 % interval of a share by Wilson's score, which stays inside of [0, 1]."""
  share, z2 = right / total, _Z * _Z
  middle = (share + z2 / (2 * total)) / (1 + z2 / total)
  half = _Z / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
  return max(middle - half, 0.0), min(middle + half, 1.0)


def questions(
  data: schema.DataConfig, most: int, *, heldout: bool = True, flag: str = '--n'
) -> list[Question]:
  """Up to `most` questions of conversations: each one's last answer, and what led to it.

  Args:
    data: where they are.
    most: number of questions.
    heldout: those of the held-out split; else those that are trained on.
    flag: where `most` was given, for an error.

  Raises:
    errors.InputError: `most` is below 1, the data are no conversations, or none is held out.
  """
  errors.require(most >= 1, f'{flag}={most} questions must be at least 1')
  errors.require(
    data.source in schema.CONVERSATION_SOURCES,
    f'config.data.source={data.source!r} must be a source of conversations '
    f'({", ".join(schema.CONVERSATION_SOURCES)}) to be asked about; take a run '
    'that was tuned on some, or name one with --like (experiments.answers, experiments.make_pairs)',
  )
  (spec,) = sources.specs(data).values()
  found: list[Question] = []
  for document in sources.read(spec):
    if len(found) == most:
      break
    if sources.is_heldout(document.name, data.heldout_fraction) == heldout:
      turns = conversations.from_bytes(document.text)
      last = max(i for i, turn in enumerate(turns) if turn.learned)
      found.append(Question(turns[:last], turns[last].content))
  errors.require(
    bool(found),
    f'config.data.heldout_fraction={data.heldout_fraction} holds no conversation of {spec.where} '
    'out, or all; change it, or give more conversations',
  )
  return found


def example(data: schema.DataConfig, question: Question) -> dict[str, Any]:
  """What rewards are told of a question, see `rewards.reward`."""
  return generated.example(data.source, question.prompt[-1].content, question.answer)


def check_readable(source: str):
  """Refuses a source whose answers cannot be judged by reading them.

  Raises:
    errors.InputError: they are programs, which are run.
  """
  errors.require(
    source != 'programs',
    "config.data.source='programs' has answers that must be run; count them with "
    'experiments.answers, and train on them with the reward "program"',
  )


def is_right(source: str) -> Callable[[str, str], bool]:
  """What judges (text, answer of the data): for sums their own form, else as the reward `answer`.

  That reads what both give as their answer. Texts are compared where the data's answer is neither
  stated nor a number.

  Raises:
    errors.InputError: see `check_readable`.
  """
  check_readable(source)
  return arithmetic.is_right if source == 'arithmetic' else numbers.is_right


def measure(
  model: Model,
  questions: Sequence[Question],
  data: schema.DataConfig,
  max_new_tokens: int,
  tell: Callable[[Question, str, bool], object] = lambda *_: None,
  rewards: pool.RewardPool | None = None,
  how: sampling.Sampling = GREEDY,
) -> Accuracy:
  """Writes an answer to every question and judges it.

  Args:
    model: the model.
    questions: see `questions`.
    data: where they come from, which decides what is right; and the format in which they are asked.
    max_new_tokens: limit of an answer; what does not end within it is judged as it stands.
    tell: is told every question with what is said to it, see `chat_formats.said`, and whether that
      is right.
    rewards: what judges in place of `is_right`, while the next answers are written.
    how: tokens are chosen. Each batch draws by its `seed` plus the number of its first question.

  Raises:
    errors.InputError: a prompt and its answer do not go into `model.max_seq_len`, or the answers
      are programs and there are no `rewards`.
    pool.PoolError: the rewards cannot be given.
  """
  judge = is_right(data.source) if rewards is None else None
  texts: list[str] = []
  scored: list[pool.Scored] = []
  ended = right_steps = steps = 0
  for begin in range(0, len(questions), BATCH):
    batch = questions[begin : begin + BATCH]
    prompts = chat_formats.prompts(data, [q.prompt for q in batch], model.tokenizer)
    drawn = dataclasses.replace(how, seed=how.seed + begin)
    written = model.complete(prompts, max_new_tokens, drawn)
    said = [chat_formats.said(data, text) for text in written.texts]
    texts += said
    ended += sum(len(tokens) < max_new_tokens for tokens in written.tokens)
    if rewards is not None:
      scored.append(rewards.submit(_items(batch, written.tokens, said, data)))
    if data.source == 'arithmetic':
      for question, text in zip(batch, said):
        found = arithmetic.num_right_steps(text, question.prompt[-1].content)
        right_steps, steps = right_steps + found[0], steps + found[1]
  kinds = [one.kind for batch in scored for one in batch.result()]
  rights = [kind == 'right' for kind in kinds]
  if judge is not None:
    rights = [judge(text, question.answer) for text, question in zip(texts, questions)]
  for question, text, right in zip(questions, texts, rights):
    tell(question, text, right)
  counts = collections.Counter(kinds)
  return Accuracy(sum(rights), len(questions), ended, right_steps, steps, counts)


def _items(
  batch: Sequence[Question],
  tokens: Sequence[Sequence[int]],
  texts: Sequence[str],
  data: schema.DataConfig,
) -> list[reward.Item]:
  return [
    reward.Item(q.prompt[-1].content, ids, text, example(data, q))
    for q, ids, text in zip(batch, tokens, texts)
  ]
