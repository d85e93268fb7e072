"""What a model is asked in context: episodes, or examples of a file under a template of the paper.

A task gives demonstration sets: one demonstration per class in random order, further examples and
queries. Set i is a pure function of the task and i. Episodes draw their label words anew for every
set; a file's examples are split by a hash of the text into those that demonstrations and auxiliary
examples are taken from, and those that are asked about.
"""

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_jax import errors
from moe_jax.analysis.anchors import prompts
from moe_jax.data import chat_formats, hashing
from moe_jax.data.tasks import episodes

ASKED_SHARE = 0.5  # of the examples of a file


class DemonstrationSet(NamedTuple):
  """What the rows of one set have in common, and what they ask."""

  labels: tuple[str, ...]  # label words without the space before them
  classes: tuple[str, ...]  # what they stand for; of a file the label words again
  demonstrations: tuple[prompts.Example, ...]  # one per class, in random order
  more: tuple[prompts.Example, ...]  # further ones, equally many per class, class by class
  queries: tuple[prompts.Example, ...]


class Task(NamedTuple):
  """A task and how it is written."""

  name: str
  template: prompts.Template
  num_classes: int
  # (number of the set, further examples per class, queries) -> set
  draw: Callable[[int, int, int], DemonstrationSet]


class Written(NamedTuple):
  """A template of the paper with its label words."""

  template: str
  labels: tuple[str, ...]


# Section 3 and Appendix A of the paper.
PAPER = {
  'sst2': Written('Review: {text}\nSentiment: {label}\n', ('Positive', 'Negative')),
  'trec': Written(
    'Question: {text}\nAnswer Type: {label}\n',
    ('Abbreviation', 'Entity', 'Description', 'Person', 'Location', 'Number'),
  ),
  'agnews': Written(
    'Article: {text}\nAnswer: {label}\n', ('World', 'Sports', 'Business', 'Technology')
  ),
  'emoc': Written('Dialogue: {text}\nEmotion: {label}\n', ('Others', 'Happy', 'Sad', 'Angry')),
}
NAMES = ('episodes', *PAPER)


def of(
  name: str,
  examples: str,
  trained: tuple[episodes.Task, int] | None,
  chat_format: str = 'marks',
) -> Task:
  """The task that a command line names.

  Args:
    name: one of `NAMES`, or the path of a JSON file with `template`, `labels` and `examples`.
      Behind episodes may stand what is other than in training: 'episodes?noise=20'.
    examples: path of a file of JSON lines with `text` and `label`, for a template of the paper.
    trained: of a model that was trained on episodes: how they are, and how many there are.
    chat_format: of the run; episodes are asked with marks around an item.

  Raises:
    errors.InputError: there is no such task, the run knows no marks, or something in its
      files is missing or wrong.
  """
  first, _, changes = name.partition('?')
  if first == 'episodes':
    errors.require(
      trained is not None,
      f"--task={name} asks what configs/episodes.py trains, and this model's "
      'config.data.source is not episodes; choose a task with words that it knows: '
      f'{", ".join(PAPER)} with --examples=FILE.jsonl, or a task file',
    )
    errors.require(
      chat_format == 'marks',
      f"--task={name} asks with marks around an item, and this run's config.data.chat_format="
      f'{chat_format!r} has none: it is the first stage; go on from it with '
      '--config=configs/episodes.py:repeated --config.init_from=WORKDIR, then so with :marked',
    )
    task, count = errors.present(trained, 'trained')
    task = episodes.changed(task, changes, f'--task={name}')
    return of_episodes(task, count)._replace(name=name)
  if name in PAPER:
    errors.require(
      bool(examples),
      f'--task={name} needs --examples=FILE.jsonl, whose lines are '
      '{"text": "...", "label": "' + PAPER[name].labels[0] + '"}',
    )
    return of_file(name, *PAPER[name], pathlib.Path(examples), '--task')
  return _of_task_file(pathlib.Path(name))


def of_episodes(task: episodes.Task, count: int) -> Task:
  """Episodes behind those that a model was trained on, in the format it was trained in."""
  form = chat_formats.FORMATS['marks']
  text = f'{form.user}{{text}}{form.assistant}{{label}}'

  def draw(number: int, num_more: int, num_queries: int) -> DemonstrationSet:
    # Enough items for `num_more` of each class, four in five times the first time.
    needed = num_queries + 2 * task.classes * (num_more + 2)
    while True:
      found = episodes.episode(count + number, task._replace(queries=needed, mixed=0))
      items = [prompts.Example(item.text, item.number) for item in found.items]
      first, rest = items[: task.classes], items[task.classes :]
      queries, rest = rest[:num_queries], rest[num_queries:]
      more = _per_class(rest, task.classes, num_more)
      if more is not None:
        labels = tuple(word.removeprefix(' ') for word in found.labels)
        return DemonstrationSet(labels, found.classes, tuple(first), more, tuple(queries))
      needed *= 2

  template = prompts.parse(text, 'the format of episodes', end=True)._replace(label_space=' ')
  return Task('episodes', template, task.classes, draw)


def _per_class(
  examples: Sequence[prompts.Example], num_classes: int, count: int
) -> tuple[prompts.Example, ...] | None:
  """The first `count` examples of every class, class by class; None if there are not enough."""
  found = []
  for label in range(num_classes):
    own = [one for one in examples if one.label == label][:count]
    if len(own) < count:
      return None
    found += own
  return tuple(found)


def of_file(name: str, template: str, labels: Sequence[str], path: pathlib.Path, flag: str) -> Task:
  """A task of examples in a file.

  Raises:
    errors.InputError: the template lacks a field, or the file has not what a task needs.
  """
  parsed = prompts.parse(template, f'{flag}={name}: template')
  where = f'{flag}={name}: {path}'
  errors.require(
    len(set(labels)) == len(labels) >= 2 and all(labels),
    f'{flag}={name}: labels={list(labels)} must be at least two different words',
  )
  rows = _examples(path, where, labels)
  asked = [hashing.uniform('anchors', one.text) < ASKED_SHARE for one in rows]
  pool = [one for one, is_asked in zip(rows, asked) if not is_asked]
  queries = [one for one, is_asked in zip(rows, asked) if is_asked]
  errors.require(bool(queries), f'{where} has no example to ask about; give more examples')

  def draw(number: int, num_more: int, num_queries: int) -> DemonstrationSet:
    rng = np.random.default_rng(number)
    mixed = [pool[i] for i in rng.permutation(len(pool))]
    chosen = _per_class(mixed, len(labels), 1 + num_more)
    fewest = min(sum(one.label == k for one in pool) for k in range(len(labels)))
    errors.require(
      chosen is not None,
      f'{where} has only {fewest} examples of a class to demonstrate with, and {1 + num_more} are '
      'needed; give more examples, about half of which are taken for it',
    )
    chosen = errors.present(chosen, 'chosen')
    each = 1 + num_more
    first = [chosen[k * each] for k in rng.permutation(len(labels))]
    more = tuple(one for i, one in enumerate(chosen) if i % each)
    picked = rng.choice(len(queries), size=num_queries, replace=num_queries > len(queries))
    return DemonstrationSet(
      tuple(labels), tuple(labels), tuple(first), more, tuple(queries[i] for i in picked)
    )

  return Task(name, parsed, len(labels), draw)


def _examples(path: pathlib.Path, where: str, labels: Sequence[str]) -> list[prompts.Example]:
  rows = []
  for number, line in enumerate(_read(path, where).split('\n'), start=1):
    if line.strip():
      row = _json(line, f'{where}:{number}')
      rows.append(_example(row, f'{where}:{number}', labels))
  return rows


def _example(row: Mapping[str, Any], where: str, labels: Sequence[str]) -> prompts.Example:
  text, label = row.get('text'), row.get('label')
  errors.require(
    isinstance(text, str) and bool(text.strip()),
    f'{where} must have a string "text"; its fields are {", ".join(row) or "none"}',
  )
  if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(labels):
    return prompts.Example(str(text).strip(), label)
  errors.require(
    label in labels,
    f'{where} must have as "label" one of {", ".join(labels)}, or its number from 0 to '
    f'{len(labels) - 1}; it has {label!r}',
  )
  return prompts.Example(str(text).strip(), labels.index(str(label)))


def _of_task_file(path: pathlib.Path) -> Task:
  where = f'--task={path}'
  errors.require(
    path.suffix == '.json',
    f'{where} must be one of {", ".join(NAMES)}, or a .json file with template, labels and '
    f'examples{errors.did_you_mean(str(path), NAMES)}',
  )
  content = _json(_read(path, where), where)
  for key, kind in {'template': str, 'labels': list, 'examples': str}.items():
    errors.require(
      isinstance(content.get(key), kind),
      f'{where} must have {key!r}, as in {{"template": "Review: {{text}}\\nSentiment: '
      '{label}\\n", "labels": ["Positive", "Negative"], "examples": "reviews.jsonl"}',
    )
  labels = content['labels']
  errors.require(
    all(isinstance(word, str) for word in labels), f'{where}: labels={labels!r} must be strings'
  )
  examples = path.parent / content['examples']
  return of_file(str(path), content['template'], labels, examples, '--task')


def _read(path: pathlib.Path, where: str) -> str:
  try:
    return path.read_text(encoding='utf-8-sig')
  except (OSError, UnicodeDecodeError) as e:
    raise errors.InputError(f'{where} must be a readable file of UTF-8 text ({e})') from e


def _json(text: str, where: str) -> dict[str, Any]:
  try:
    found = json.loads(text)
  except ValueError as e:
    raise errors.InputError(f'{where} must be JSON ({e}); repair it') from e
  errors.require(isinstance(found, dict), f'{where} must be a JSON object')
  return found
