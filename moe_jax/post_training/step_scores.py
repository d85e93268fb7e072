"""Solutions with a marker behind every step, and the probability that a step is good.

Released models of this kind (peiyi9979/math-shepherd-mistral-7b-prm) read the question and the
steps with a tag behind each, and predict '+' or '-' at the tag's place; so here, with a special
token of the tokenizer as the tag, which no text can spell and no merge can reach. The score of a
step is the probability of the good label among the two; a step whose tag has no room in a row
cannot be read, and is as good as one that is known to be bad: its score is `UNREAD`.

Axis letters: n solutions, s steps of a solution.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import errors, trees
from moe_jax.config import schema
from moe_jax.data import chat_formats, conversations, packing, whole_documents
from moe_jax.data import tokenizer as tokenizer_lib
from moe_jax.devices import partitioning
from moe_jax.models import transformer
from moe_jax.processes import agreement
from moe_jax.runs import trained_run

Array = jax.Array

UNREAD = 0.0


class Solution(NamedTuple):
  """A text whose steps are to be judged."""

  question: str
  text: str
  ends: tuple[int, ...]  # offset of the character behind each step's last one


class Marked(NamedTuple):
  """A solution as token ids."""

  ids: np.ndarray  # [L] int32, markers included
  marks: np.ndarray  # [s] int, places of the markers


class Marker:
  """Puts markers behind steps; knows the three ids."""

  def __init__(
    self,
    process: schema.ProcessRewardConfig,
    data: schema.DataConfig,
    tokenizer: tokenizer_lib.Tokenizer,
  ):
    """Looks the tokens up.

    Raises:
      errors.InputError: the tokenizer has no such special token, or a label is no single token.
    """
    self._process, self._data, self._tokenizer = process, data, tokenizer
    where = 'config.objective.process_reward'
    known = tokenizer.special_tokens
    errors.require(
      process.step_token in known,
      f'{where}.step_token={process.step_token!r} must be a special token of the tokenizer; it has '
      f'{", ".join(known)}',
    )
    self.step_id = errors.present(tokenizer.token_id(process.step_token), 'has an id')
    labels = [tokenizer.encode(text) for text in (process.good, process.bad)]
    errors.require(
      all(len(ids) == 1 for ids in labels) and labels[0] != labels[1],
      f'{where}.good={process.good!r} and bad={process.bad!r} must each be one token, and differ; '
      f'here they are {labels}',
    )
    self.good_id, self.bad_id = labels[0][0], labels[1][0]

  def marked(self, solutions: Sequence[Solution]) -> list[Marked]:
    """Ids of solutions; with `outcome` one marker behind the last step."""
    users = [(conversations.Turn('user', one.question, False),) for one in solutions]
    prompts = chat_formats.prompts(self._data, users, self._tokenizer)
    opening = chat_formats.opening(self._data)
    pieces, counts = [], []
    for one in solutions:
      ends = one.ends[-1:] if self._process.outcome else one.ends
      texts = [one.text[a:b] for a, b in zip((0, *ends), ends)]
      pieces += [opening + texts[0], *texts[1:]] if texts else []
      counts.append(len(texts))
    encoded = iter(self._tokenizer.encode_batch(pieces))
    found = []
    for prompt, count in zip(prompts, counts, strict=True):
      ids, marks = list(prompt), []
      for _ in range(count):
        ids += [int(i) for i in next(encoded)]
        marks.append(len(ids))
        ids.append(self.step_id)
      found.append(Marked(np.array(ids, np.int32), np.array(marks, int)))
    return found


def rows(
  marked: Sequence[Marked], order: np.ndarray, max_seq_len: int
) -> Iterator[list[tuple[int, int]]]:
  """Of every row [(number of a solution, place of its first token)]; what is longer is left out.

  Args:
    marked: the solutions.
    order: [n] decides which of those of one length comes first.
    max_seq_len: L.
  """
  sizes = np.array([len(one.ids) for one in marked])
  order = order[sizes[order] <= max_seq_len]
  order = order[np.argsort(-sizes[order], kind='stable')]
  for members in whole_documents.best_fit(sizes[order], max_seq_len):
    at, row = 0, []
    for number in order[members]:
      row.append((int(number), at))
      at += int(sizes[number])
    yield row


def filled(
  marked: Sequence[Marked],
  row: Sequence[tuple[int, int]],
  max_seq_len: int,
  labels: Sequence[np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
  """The arrays [L] of a row; `labels` are token ids [s] at the markers of each solution."""
  arrays = packing.padding_row(max_seq_len)
  for segment, (number, at) in enumerate(row, start=1):
    one = marked[number]
    here = slice(at, at + len(one.ids))
    arrays['tokens'][here] = one.ids
    arrays['segment_ids'][here] = segment
    arrays['positions'][here] = np.arange(len(one.ids))
    if labels is not None:
      arrays['targets'][at + one.marks] = labels[number]
  return arrays


@functools.partial(jax.jit, static_argnums=0)
def _probabilities(
  model: schema.ModelConfig,
  variables: trees.Variables,
  ids: tuple[Array, Array],
  batch: trees.Batch,
) -> Array:
  """[B, L] probability of the good label among the two at every place."""
  out = transformer.apply(
    model, variables, batch['tokens'], batch['positions'], batch['segment_ids']
  )
  head = transformer.head_of(model, variables['params']).astype(jnp.float32)
  both = out.normed.astype(jnp.float32) @ head[:, jnp.stack(ids)]
  return jax.nn.softmax(both)[..., 0]


def check(cfg: schema.Config, what: str):
  """Refuses a run that judges nothing.

  Args:
    cfg: of the run.
    what: what the user calls it.

  Raises:
    errors.InputError: it was trained for something else.
  """
  errors.require(
    cfg.objective.kind == 'process_reward',
    f"{what} has objective.kind={cfg.objective.kind!r}, which must be 'process_reward' to judge "
    'steps; train one with python -m experiments.process_reward train',
  )


def score(
  run: trained_run.Run,
  solutions: Sequence[Solution],
  batch_size: int = 16,
  tell_unread: Callable[[int], object] = lambda number: None,
) -> list[np.ndarray]:
  """The probability that each step is good, [s] per solution; `UNREAD` behind the end of a row.

  Args:
    run: trained with objective.kind='process_reward'.
    solutions: what is judged; with `outcome` the score is that of the whole, [1].
    batch_size: rows that are read together.
    tell_unread: is told how many scores are `UNREAD`, if any.

  Raises:
    errors.InputError: the run is of another objective.
  """
  cfg = run.cfg
  check(cfg, 'the run')
  marker = Marker(cfg.objective.process_reward, cfg.data, run.tokenizer)
  length = cfg.model.max_seq_len
  whole = marker.marked(solutions)
  marked = [_beginning(one, length) for one in whole]
  ways = partitioning.row_ways(run.mesh)
  size = -(-batch_size // ways) * ways
  steps = np.array([len(one.marks) for one in marked], int)
  order = list(rows(marked, np.flatnonzero(steps), length))
  ids = (np.int32(marker.good_id), np.int32(marker.bad_id))
  found = [np.full(len(one.marks), UNREAD, np.float32) for one in whole]
  unread = sum(map(len, found)) - int(steps.sum())
  if unread:
    tell_unread(unread)
  for begin in range(0, len(order), size):
    here = order[begin : begin + size]
    arrays = [filled(marked, row, length) for row in here]
    arrays += [packing.padding_row(length)] * (size - len(here))
    batch = {key: np.stack([a[key] for a in arrays]) for key in packing.KEYS[:4]}
    with partitioning.activate(run.mesh):
      put = partitioning.put_global_batch(batch, run.mesh)
      probabilities = agreement.fetch(_probabilities(cfg.model, run.variables, ids, put))
    for row, members in enumerate(here):
      for number, at in members:
        found[number][: steps[number]] = probabilities[row, at + marked[number].marks]
  return found


def _beginning(one: Marked, max_seq_len: int) -> Marked:
  """A solution up to the last marker that a row has room for; nothing if there is none."""
  marks = one.marks[one.marks < max_seq_len]
  return Marked(one.ids[: marks[-1] + 1] if len(marks) else one.ids[:0], marks)
