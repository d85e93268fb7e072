r"""Prompts of demonstrations and a query, in which the place of every label word is known.

A template is text with one `{text}` and one `{label}`: 'Review: {text}\nSentiment: {label}\n'. A
demonstration is the whole of it, the query all before its label. Each piece is encoded apart, so
that no merge crosses the border of a label word, and its place is known by construction. A space
before a field is taken to be the field's own: label words are ' Positive', as they stand in text.

Axis letters: W label words of a task.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_jax import errors
from moe_jax.data import tokenizer as tokenizer_lib

FORMAT, TEXT, LABEL = 0, 1, 2  # kinds of token
KINDS = ('format', 'text', 'label')
FIELDS = ('{text}', '{label}')
Numbers = Any  # an array of numpy, inside of a compiled program one of JAX


class Template(NamedTuple):
  """What stands around the text and the label word of an example."""

  before: str
  text_space: str  # ' ' where a text follows a space, else ''
  between: str
  label_space: str  # likewise of the label word
  after: str  # behind it
  end: bool = False  # whether the end token of the tokenizer follows


def parse(text: str, where: str, *, end: bool = False) -> Template:
  """A template of its text.

  Args:
    text: with `{text}` and, behind it, `{label}`.
    where: what the user calls it.
    end: see `Template`.

  Raises:
    errors.InputError: a field is missing, stands twice, or in the other order.
  """
  for field in FIELDS:
    errors.require(
      text.count(field) == 1,
      f'{where}={text!r} must have {field} once, and has it {text.count(field)} times; write it as '
      r"in 'Review: {text}\nSentiment: {label}\n'",
    )
  before, rest = text.split('{text}')
  errors.require(
    '{label}' in rest,
    f'{where}={text!r} must have {{label}} behind {{text}}, as a model reads from left to right; '
    'swap them',
  )
  between, after = rest.split('{label}')
  errors.require(
    bool(between.strip()),
    f'{where}={text!r} must have words between {{text}} and {{label}}, from the last of which the '
    "label word is predicted; add some, as in '{text}\\nAnswer: {label}\\n'",
  )
  spaces = [' ' if part.endswith(' ') else '' for part in (before, between)]
  return Template(
    before.removesuffix(' '), spaces[0], between.removesuffix(' '), spaces[1], after, end
  )


class Example(NamedTuple):
  """A text and which of the label words is right."""

  text: str
  label: int


class Prompt(NamedTuple):
  """One row."""

  ids: np.ndarray  # [L] int32
  kinds: np.ndarray  # [L] int32, FORMAT (the begin token too), TEXT or LABEL
  places: np.ndarray  # [demonstrations] int32, of label words: of the last token of each
  classes: np.ndarray  # [demonstrations] int32, which label words they are
  start: int  # of the query
  answer: int  # right label word of the query; its prediction stands at the last token


class Encoder:
  """Makes prompts with one tokenizer; every text is encoded once."""

  def __init__(
    self, tokenizer: tokenizer_lib.Tokenizer, template: Template, labels: Sequence[str], where: str
  ):
    """Encodes template and label words.

    Raises:
      errors.InputError: two label words begin with the same token, by which they are told apart.
    """
    self._tokenizer, self._template = tokenizer, template
    fixed = [template.before, template.between, template.after]
    encoded = tokenizer.encode_batch([*fixed, *(template.label_space + word for word in labels)])
    self._before, self._between, self._after, *self._labels = [list(ids) for ids in encoded]
    if template.end:
      self._after.append(tokenizer.eos_id)
    for word, ids in zip(labels, self._labels):
      errors.require(bool(ids), f'{where}: the label word {word!r} must have a token; give another')
    # [W], the first token of every label word, whose logits are compared
    self.label_ids = np.asarray([ids[0] for ids in self._labels], np.int32)
    for i, word in enumerate(labels):
      first = self.label_ids.tolist().index(self.label_ids[i])
      errors.require(
        first == i,
        f'{where}: the label words {labels[first]!r} and {word!r} must differ in their first token '
        'with this tokenizer, which is what the model is asked for; choose another word',
      )

  def prompt(self, demonstrations: Sequence[Example], query: Example) -> Prompt:
    """The row of demonstrations and a query."""
    texts = [self._template.text_space + one.text for one in (*demonstrations, query)]
    encoded = self._tokenizer.encode_batch(texts)
    pieces = [([self._tokenizer.bos_id], FORMAT)]
    places, start = [], 0
    for one, text in zip((*demonstrations, query), encoded):
      start = sum(len(ids) for ids, _ in pieces)
      pieces += [(self._before, FORMAT), (list(text), TEXT), (self._between, FORMAT)]
      if len(places) < len(demonstrations):
        pieces.append((self._labels[one.label], LABEL))
        places.append(sum(len(ids) for ids, _ in pieces) - 1)
        pieces.append((self._after, FORMAT))
    kinds = np.repeat([kind for _, kind in pieces], [len(ids) for ids, _ in pieces])
    return Prompt(
      np.concatenate([np.asarray(ids, np.int32) for ids, _ in pieces]),
      kinds.astype(np.int32),
      np.asarray(places, np.int32),
      np.asarray([one.label for one in demonstrations], np.int32),
      start,
      query.label,
    )


class Batch(NamedTuple):
  """Prompts with equally many demonstrations, padded on the right."""

  tokens: Numbers  # [B, L] int32
  mask: Numbers  # [B, L] bool, False = padding
  kinds: Numbers  # [B, L] int32, -1 for padding
  places: Numbers  # [B, demonstrations] int32
  classes: Numbers  # [B, demonstrations] int32
  start: Numbers  # [B] int32, of the query
  target: Numbers  # [B] int32, place of the last token
  answer: Numbers  # [B] int32
  label_ids: Numbers  # [B, W] int32, first tokens of the label words

  def take(self, rows: np.ndarray | slice) -> 'Batch':
    """Some of the rows."""
    return Batch(*(a[rows] for a in self))


def stack(rows: Sequence[Prompt], label_ids: Sequence[np.ndarray], length: int = 0) -> Batch:
  """Prompts as a batch.

  Args:
    rows: the prompts.
    label_ids: [W] of each.
    length: L; without it that of the longest.
  """
  lengths = np.asarray([len(row.ids) for row in rows], np.int32)
  length = max(length, int(lengths.max()))
  mask = np.arange(length) < lengths[:, None]

  def padded(arrays: Sequence[np.ndarray], fill: int) -> np.ndarray:
    out = np.full((len(rows), length), fill, np.int32)
    for i, array in enumerate(arrays):
      out[i, : len(array)] = array
    return out

  return Batch(
    padded([row.ids for row in rows], 0),
    mask,
    padded([row.kinds for row in rows], -1),
    np.stack([row.places for row in rows]),
    np.stack([row.classes for row in rows]),
    np.asarray([row.start for row in rows], np.int32),
    lengths - 1,
    np.asarray([row.answer for row in rows], np.int32),
    np.stack(label_ids).astype(np.int32),
  )


def join(batches: Sequence[Batch]) -> Batch:
  """Batches of one length and one number of demonstrations, one below the other."""
  return Batch(*(np.concatenate(parts) for parts in zip(*batches)))
