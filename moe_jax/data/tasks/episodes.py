"""Episodes of a classification task whose labels only the episode itself tells.

  > cat horse wolf= gate> bread soup cheese= lamp> goat cat wolf= gate

An item is a few words of one class, here animals or food, and a label word stands behind it. Which
label word a class has is drawn anew for every episode, so that a model has to find it among the
labelled items (the demonstrations) before. The first items are one of each class in random order;
their labels nobody can know. Those behind them are to be predicted. With noise, words of an item
come from the other classes of its episode: then no single demonstration is to be relied on, and not
every item can be told.

A number and a seed name an episode, the same one on every machine and in every Python.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

from moe_jax import errors
from moe_jax.data import conversations

CLASSES = {
  'animals': ('cat', 'horse', 'goat', 'wolf'),
  'food': ('bread', 'cheese', 'rice', 'soup'),
  'body': ('hand', 'knee', 'nose', 'neck'),
  'weather': ('rain', 'snow', 'wind', 'fog'),
  'clothes': ('shirt', 'shoe', 'hat', 'sock'),
  'tools': ('hammer', 'saw', 'drill', 'axe'),
  'music': ('harp', 'flute', 'piano', 'organ'),
  'plants': ('oak', 'rose', 'fern', 'moss'),
}
LABELS = (
  *('gate', 'lamp', 'river', 'paper', 'stone', 'window', 'coin', 'bridge'),
  *('candle', 'market', 'mirror', 'garden', 'ticket', 'button', 'castle', 'engine'),
)


class Task(NamedTuple):
  """How the episodes are made."""

  classes: int = 4  # of an episode
  queries: int = 9  # labelled items behind the first of each class
  words: int = 3  # of an item, all different
  mixed: int = 0  # 1: classes, words and queries of an episode are drawn up to these
  repeat: int = 0  # 1: every item of a class has the words of the class's first one
  noise: int = 0  # percent of an item's words that other classes of the episode stand in for
  seed: int = 0  # decides all episodes


class Item(NamedTuple):
  """An input and its class."""

  text: str  # with the space that a word begins with
  label: str  # likewise
  number: int  # of the class in its episode, by the order of `Episode.labels`


class Episode(NamedTuple):
  """Items in order; the first `len(labels)` are one of each class."""

  labels: tuple[str, ...]  # label words, one per class
  classes: tuple[str, ...]  # which of `CLASSES` each of them stands for
  items: tuple[Item, ...]


def _draw(rng: random.Random, options: Sequence[str], count: int) -> list[str]:
  """`count` different options in random order; `random.Random.random` is the same everywhere."""
  left = list(options)
  return [left.pop(int(rng.random() * len(left))) for _ in range(count)]


def of_path(path: str, where: str) -> tuple[Task, int]:
  """(how the episodes are, how many there are), as the path of the source says.

  Args:
    path: '' or for example '?classes=4&queries=9&words=3&episodes=10000'.
    where: begins error messages.

  Raises:
    errors.InputError: the path has another form, or asks for more classes or words than there are.
  """
  options = _options(path, where, Task()._asdict() | {'episodes': 10_000})
  count = options.pop('episodes')
  return Task(**options), count


def changed(task: Task, path: str, where: str) -> Task:
  """A task with what the path says in place of its own: how hard a trained model is asked.

  Args:
    task: what the model was trained on.
    path: '' or for example '?noise=20'.
    where: begins error messages.

  Raises:
    errors.InputError: see `of_path`; a set has as many queries as are asked for, and its own size.
  """
  own = {key: value for key, value in task._asdict().items() if key not in ('queries', 'mixed')}
  return task._replace(**_options(path, where, own))


def _options(path: str, where: str, options: dict[str, int]) -> dict[str, int]:
  """The options with those of a path in place of their own, checked."""
  options = dict(options)
  example = '&'.join(f'{key}={value}' for key, value in options.items())
  given = [part.partition('=') for part in path.removeprefix('?').split('&') if part]
  for key, _, value in given:
    errors.require(
      key in options and value.isdecimal() and int(value) <= 10**7,
      f'{where} must be of the form ?{example}, with whole numbers up to 10,000,000; it has '
      f'{key}={value}',
    )
    options[key] = int(value)
  words = min(map(len, CLASSES.values()))
  sizes = {'classes': (2, len(CLASSES)), 'words': (1, words), 'queries': (1, 1000)}
  sizes |= {'mixed': (0, 1), 'repeat': (0, 1), 'noise': (0, 100)}
  for name, (least, most) in sizes.items():
    value = options.get(name, least)
    errors.require(
      least <= value <= most, f'{where}: {name}={value} must be from {least} to {most}'
    )
  return options


def episode(number: int, task: Task) -> Episode:
  """The episode of that number; with noise it is the same one, some words of which are others."""
  key = number + (task.seed << 40)
  rng, noise_rng = random.Random(key), random.Random(key + (1 << 80))
  task = _sized(rng, task) if task.mixed else task
  classes = tuple(_draw(rng, tuple(CLASSES), task.classes))
  labels = tuple(f' {word}' for word in _draw(rng, LABELS, task.classes))
  first = _draw(rng, tuple(map(str, range(task.classes))), task.classes)
  items: list[Item] = []
  for i in range(task.classes + task.queries):  # the first ones whatever their number is
    which = int(first[i]) if i < task.classes else int(rng.random() * task.classes)
    if task.repeat and i >= task.classes:
      items.append(next(item for item in items if item.number == which))
      continue
    words = _draw(rng, CLASSES[classes[which]], task.words)
    others = [word for k, name in enumerate(classes) if k != which for word in CLASSES[name]]
    words = _replaced(noise_rng, words, others, task.noise)
    items.append(Item(''.join(f' {word}' for word in words), labels[which], which))
  return Episode(labels, classes, tuple(items))


def _replaced(
  rng: random.Random, words: Sequence[str], others: Sequence[str], percent: int
) -> list[str]:
  """Each word, or with that probability one of the others, which are all different.

  As much is drawn at any percentage: what a smaller one replaces, a larger one does too.
  """
  foreign = _draw(rng, others, len(words))
  return [new if 100 * rng.random() < percent else old for old, new in zip(words, foreign)]


def _sized(rng: random.Random, task: Task) -> Task:
  """A task of at most that size: short episodes teach what long ones need."""

  def upto(least: int, most: int) -> int:
    return least + int(rng.random() * (most - least + 1))

  return task._replace(
    classes=upto(2, task.classes),
    words=upto(min(2, task.words), task.words),
    queries=upto(1, task.queries),
  )


def conversation(one: Episode) -> conversations.Conversation:
  """Items as questions of a user, label words as answers; the first of each class is not learned.

  For the formats 'marks' and 'bare', in which what is said brings its own spaces.
  """
  turns = []
  for i, item in enumerate(one.items):
    turns.append(conversations.Turn('user', item.text, False))
    turns.append(conversations.Turn('assistant', item.label, i >= len(one.labels)))
  return tuple(turns)
