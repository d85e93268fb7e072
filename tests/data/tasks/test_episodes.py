import collections
import json

import pytest

from moe_jax import errors
from moe_jax.config import paths
from moe_jax.data import conversations, sources
from moe_jax.data.tasks import episodes

TASK = episodes.Task()
KNOWN = [
  [' mirror', ' gate', ' lamp', ' button'],
  ['food', 'clothes', 'weather', 'music'],
  [
    [' sock shoe hat', ' gate', 1],
    [' bread rice soup', ' mirror', 0],
    [' piano organ flute', ' button', 3],
    [' rain fog wind', ' lamp', 2],
    [' shirt sock shoe', ' gate', 1],
  ],
]


def spec(path):
  return sources.Spec('config.data', 'episodes', path, 'text', '', 0, paths.cache_root(''), False)


def test_a_known_episode():
  """The same on every machine: worked out once."""
  one = episodes.episode(3, TASK._replace(queries=1))
  assert json.loads(json.dumps(one)) == KNOWN


def test_labels_are_drawn_anew_and_items_are_of_their_class():
  """Of 400 episodes: what an item says of its label word by itself is what chance says."""
  meanings = collections.defaultdict(set)
  for number in range(400):
    one = episodes.episode(number, TASK)
    assert len(set(one.labels)) == len(set(one.classes)) == 4 and len(one.items) == 13
    assert sorted(item.number for item in one.items[:4]) == [0, 1, 2, 3]
    for item in one.items:
      words = item.text.split(' ')[1:]
      assert len(set(words)) == 3 and set(words) <= set(episodes.CLASSES[one.classes[item.number]])
      assert item.label == one.labels[item.number]
      meanings[item.label].add(one.classes[item.number])
  assert all(len(classes) == len(episodes.CLASSES) for classes in meanings.values())
  assert len(meanings) == len(episodes.LABELS)
  firsts = collections.Counter(episodes.episode(n, TASK).items[0].number for n in range(400))
  assert max(firsts.values()) < 140  # of 100 expected: the order of demonstrations is random
  assert episodes.episode(5, TASK) != episodes.episode(5, TASK._replace(seed=1))


def test_words_are_of_one_class_only():
  words = [word for own in episodes.CLASSES.values() for word in own] + list(episodes.LABELS)
  assert len(set(words)) == len(words)


def test_the_labels_that_can_be_known_are_learned():
  one = episodes.episode(0, TASK)
  turns = episodes.conversation(one)
  assert [turn.content for turn in turns[::2]] == [item.text for item in one.items]
  assert [turn.content for turn in turns[1::2]] == [item.label for item in one.items]
  assert [turn.learned for turn in turns[1::2]] == 4 * [False] + 9 * [True]
  assert conversations.from_messages(
    [{'role': turn.role, 'content': turn.content} for turn in turns]
  )


def test_mixed_sizes():
  """Up to those of the task, the smallest and the largest among them; else the same rules."""
  sizes = set()
  for number in range(600):
    one = episodes.episode(number, TASK._replace(mixed=1, queries=3))
    assert sorted(item.number for item in one.items[: len(one.labels)]) == [*range(len(one.labels))]
    words = {len(item.text.split()) for item in one.items}
    assert len(words) == 1
    sizes.add((len(one.labels), len(one.items) - len(one.labels), *words))
  assert sizes == {(k, q, w) for k in (2, 3, 4) for q in (1, 2, 3) for w in (2, 3)}


def test_items_that_repeat():
  """All items of a class are its first one, and the first ones are not changed by it."""
  for number in range(200):
    one = episodes.episode(number, TASK._replace(repeat=1, words=2))
    other = episodes.episode(number, TASK._replace(words=2))
    assert one.items[:4] == other.items[:4] and len(one.items) == len(other.items) == 13
    first = {item.number: item for item in one.items[:4]}
    assert all(item == first[item.number] for item in one.items[4:])
  found = [episodes.episode(n, TASK._replace(repeat=1)).items for n in range(400)]
  asked = [items[:4].index(items[4]) for items in found]  # each demonstration alike
  assert all(60 < asked.count(number) < 140 for number in range(4))


def test_noise():
  """The same episode with words of its other classes, as many as asked for, a few before many."""
  replaced = dict.fromkeys((0, 20, 60, 100), 0)
  for number in range(300):
    clean = episodes.episode(number, TASK)
    own = [set(episodes.CLASSES[name]) for name in clean.classes]
    before: set[tuple[int, int]] = set()
    for percent in replaced:
      one = episodes.episode(number, TASK._replace(noise=percent))
      assert (one.labels, one.classes, len(one.items)) == (clean.labels, clean.classes, 13)
      other = set()
      for i, (item, first) in enumerate(zip(one.items, clean.items)):
        words, firsts = item.text.split(' ')[1:], first.text.split(' ')[1:]
        assert (item.label, item.number) == (first.label, first.number)
        assert len(set(words)) == 3 and set(words) <= set.union(*own)
        kept = [word in own[item.number] for word in words]
        assert all(word == was for word, was, keeps in zip(words, firsts, kept) if keeps)
        other |= {(i, k) for k, keeps in enumerate(kept) if not keeps}
      assert before <= other
      before, replaced[percent] = other, replaced[percent] + len(other)
  total = 300 * 13 * 3  # so that a share of a fifth is known to 0.4 percent
  assert replaced[0] == 0 and replaced[100] == total
  assert abs(replaced[20] / total - 0.2) < 0.016 and abs(replaced[60] / total - 0.6) < 0.02


def test_noisy_items_that_repeat():
  """They repeat as they are read, foreign words and all."""
  one = episodes.episode(1, TASK._replace(repeat=1, noise=50))
  first = {item.number: item for item in one.items[:4]}
  assert all(item == first[item.number] for item in one.items[4:])
  assert one.items[:4] != episodes.episode(1, TASK._replace(repeat=1)).items[:4]


def test_what_a_trained_model_is_asked_otherwise():
  task = TASK._replace(words=2, seed=3)
  assert episodes.changed(task, '', 'x') == task
  assert episodes.changed(task, 'noise=20&classes=5', 'x') == task._replace(noise=20, classes=5)
  for path, problem in {
    'noise=101': 'x: noise=101 must be from 0 to 100',
    'queries=3': r'x must be of the form \?classes=4&words=2&.*; it has queries=3',
    'noise': 'it has noise=$',
  }.items():
    with pytest.raises(errors.InputError, match=problem):
      episodes.changed(task, path, 'x')


def test_the_source_reads_its_path():
  documents = list(sources.read(spec('?classes=2&queries=1&words=2&episodes=5&seed=4')))
  assert len(documents) == len({d.name for d in documents}) == 5
  task = episodes.Task(classes=2, queries=1, words=2, seed=4)
  want = [episodes.conversation(episodes.episode(n, task)) for n in range(5)]
  assert [conversations.from_bytes(d.text) for d in documents] == want
  assert episodes.of_path('', 'x') == (TASK, 10_000)


@pytest.mark.parametrize(
  'path, problem',
  [
    ('?classes=1', 'classes=1 must be from 2 to 8'),
    ('?classes=9', 'classes=9 must be from 2 to 8'),
    ('?words=5', 'words=5 must be from 1 to 4'),
    ('?queries=0', 'queries=0 must be from 1'),
    ('?repeat=2', 'repeat=2 must be from 0 to 1'),
    ('?noise=101', 'noise=101 must be from 0 to 100'),
    ('?shots=2', 'must be of the form .*classes=4.*it has shots=2'),
  ],
)
def test_bad_paths(path, problem):
  with pytest.raises(errors.InputError, match=problem):
    next(sources.read(spec(path)))
