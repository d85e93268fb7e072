"""How many held-out questions a model answers rightly, written greedily."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from moe_jax import errors
from moe_jax.config import schema
from moe_jax.data import chat_formats, conversations, sources
from moe_jax.data import tokenizer as tokenizer_lib
from moe_jax.data.tasks import arithmetic
from moe_jax.inference import generate, sampling

_Z = 1.959964  # of a two-sided interval of 95 %
BATCH = 32  # prompts that are continued together


class Question(NamedTuple):
  """A prompt and the answer that a held-out conversation gives to it."""

  prompt: conversations.Conversation  # ends with the user
  answer: str


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

  def interval(self) -> tuple[float, float]:
    """Wilson's 95 % interval of the share that is right."""
    return wilson(self.right, self.total)

  def __str__(self) -> str:
    low, high = self.interval()
    text = f'{self.right} of {self.total} right: {self.right / self.total:.1%} '
    text += f'[{low:.1%}, {high:.1%}]; {self.ended} ended within the limit'
    return text + (f'; {self.right_steps} of {self.steps} steps right' if self.steps else '')

  def as_dict(self) -> dict[str, object]:
    """The stable keys of `answers --json`."""
    return self._asdict() | {'share': self.right / self.total, 'interval': self.interval()}


def wilson(right: int, total: int) -> tuple[float, float]:
  """The 95 % interval of a share by Wilson's score, which stays inside of [0, 1]."""
  share, z2 = right / total, _Z * _Z
  middle = (share + z2 / (2 * total)) / (1 + z2 / total)
  half = _Z / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
  return max(middle - half, 0.0), min(middle + half, 1.0)


def questions(data: schema.DataConfig, most: int, *, heldout: bool = True) -> list[Question]:
  """Up to `most` questions of conversations: each one's last answer, and what led to it.

  Args:
    data: where they are.
    most: number of questions.
    heldout: those of the held-out split; else those that are trained on.

  Raises:
    errors.InputError: the data are no conversations, or none is held out.
  """
  errors.require(
    data.source in schema.CONVERSATION_SOURCES,
    f'config.data.source={data.source!r} must be a source of conversations '
    f'({", ".join(schema.CONVERSATION_SOURCES)}) to be asked about; choose one with '
    '--data_source and --data_path',
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


def example(data: schema.DataConfig, question: Question) -> dict[str, str]:
  """What rewards are told of a question, see `rewards.reward`."""
  del data
  return {'question': question.prompt[-1].content, 'answer': question.answer}


def is_right(source: str) -> Callable[[str, str], bool]:
  """What judges (text, answer): for sums the number, else equality but for space at the ends."""
  if source == 'arithmetic':
    return arithmetic.is_right
  return lambda text, answer: text.strip() == answer.strip()


def measure(
  model: Model,
  questions: Sequence[Question],
  data: schema.DataConfig,
  max_new_tokens: int,
  tell: Callable[[Question, str, bool], object] = lambda *_: None,
) -> Accuracy:
  """Writes an answer to every question and judges it.

  Args:
    model: the model.
    questions: see `questions`.
    data: where they come from, which decides what is right; and the format in which they are asked.
    max_new_tokens: limit of an answer; what does not end within it is judged as it stands.
    tell: is told every question with its text and whether that is right.

  Raises:
    errors.InputError: a prompt and its answer do not go into `model.max_seq_len`.
  """
  judge, counts = is_right(data.source), Accuracy(0, 0, 0, 0, 0)
  greedy = sampling.Sampling(temperature=0.0)
  for begin in range(0, len(questions), BATCH):
    batch = questions[begin : begin + BATCH]
    prompts = chat_formats.prompts(data, [q.prompt for q in batch], model.tokenizer)
    written = model.complete(prompts, max_new_tokens, greedy)
    for question, text, tokens in zip(batch, written.texts, written.tokens):
      right = judge(text, question.answer)
      steps = (0, 0)
      if data.source == 'arithmetic':
        steps = arithmetic.num_right_steps(text, question.prompt[-1].content)
      counts = Accuracy(
        counts.right + right,
        counts.total + 1,
        counts.ended + (len(tokens) < max_new_tokens),
        counts.right_steps + steps[0],
        counts.steps + steps[1],
      )
      tell(question, text, right)
  return counts
