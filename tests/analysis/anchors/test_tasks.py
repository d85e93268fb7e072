import json

import pytest

from configs import base
from moe_jax import errors
from moe_jax.analysis.anchors import prompts, tasks
from moe_jax.config import schema
from moe_jax.data import chat_formats, conversations
from moe_jax.data import tokenizer as tokenizer_lib
from moe_jax.data.tasks import episodes

EPISODES = episodes.Task()


def write(tmp_path, rows, name='rows.jsonl'):
  path = tmp_path / name
  path.write_text('\n'.join(json.dumps(row) for row in rows))
  return path


def reviews(count=60):
  return [{'text': f'film {i}', 'label': ('Positive', 1)[i % 2]} for i in range(count)]


def test_episodes_are_new_ones_of_the_form_trained_on():
  task = tasks.of('episodes', '', (EPISODES, 100))
  found = task.draw(7, 4, 20)
  one = episodes.episode(107, EPISODES._replace(queries=0))
  assert found.labels == tuple(word[1:] for word in one.labels) and found.classes == one.classes
  assert [(e.text, e.label) for e in found.demonstrations] == [
    (i.text, i.number) for i in one.items
  ]
  assert len(found.queries) == 20
  assert [e.label for e in found.more] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
  assert found == task.draw(7, 4, 20) != task.draw(8, 4, 20)
  # As a prompt it is what the model is trained on, token by token.
  data = schema.DataConfig(**base.get_config().data.to_dict() | {'chat_format': 'marks'})
  tokenizer = tokenizer_lib.byte_tokenizer(data.bos_token, data.eos_token)
  labels = [' ' + word for word in 'abcd']
  encoder = prompts.Encoder(tokenizer, task.template._replace(label_space=''), 'abcd', 'x')
  row = encoder.prompt(found.demonstrations, found.queries[0])
  turns = []
  for example in (*found.demonstrations, found.queries[0]):
    turns.append(conversations.Turn('user', example.text, False))
    turns.append(conversations.Turn('assistant', labels[example.label][1:], False))
  (want,) = chat_formats.prompts(data, [tuple(turns[:-1])], tokenizer)
  assert row.ids.tolist() == want


def test_harder_episodes_are_the_same_ones_with_foreign_words():
  clean = tasks.of('episodes', '', (EPISODES, 100)).draw(7, 4, 20)
  task = tasks.of('episodes?noise=30', '', (EPISODES, 100))
  found = task.draw(7, 4, 20)
  assert task.name == 'episodes?noise=30' and found.classes == clean.classes
  pairs = list(
    zip((*found.demonstrations, *found.queries), (*clean.demonstrations, *clean.queries))
  )
  assert all(one.label == other.label for one, other in pairs)
  words = [(a, b) for one, two in pairs for a, b in zip(one.text.split(), two.text.split())]
  assert 0.1 < sum(a != b for a, b in words) / len(words) < 0.5
  assert tasks.of('episodes?classes=3', '', (EPISODES, 100)).num_classes == 3
  with pytest.raises(errors.InputError, match=r'--task=episodes\?noice=3 must be of the form'):
    tasks.of('episodes?noice=3', '', (EPISODES, 100))


def test_a_model_that_knows_no_marks_is_not_asked_with_marks():
  with pytest.raises(errors.InputError, match="chat_format='bare' has none: it is the first stage"):
    tasks.of('episodes', '', (EPISODES, 100), 'bare')


def test_a_file_is_split_by_text(tmp_path):
  task = tasks.of('sst2', str(write(tmp_path, reviews())), None)
  assert task.num_classes == 2 and task.template.before == 'Review:'
  shown, asked = set(), set()
  for number in range(20):
    found = task.draw(number, 2, 6)
    assert sorted(e.label for e in found.demonstrations) == [0, 1] and len(found.queries) == 6
    assert [e.label for e in found.more] == [0, 0, 1, 1]
    assert len({e.text for e in (*found.demonstrations, *found.more)}) == 6
    shown |= {e.text for e in (*found.demonstrations, *found.more)}
    asked |= {e.text for e in found.queries}
    for e in (*found.demonstrations, *found.more, *found.queries):
      assert e.label == int(e.text.split()[1]) % 2
  assert not shown & asked and len(shown) > 10 < len(asked)
  first = {task.draw(n, 0, 1).demonstrations[0].label for n in range(20)}
  assert first == {0, 1}  # random order


def test_a_file_of_another_editor(tmp_path):
  path = write(tmp_path, reviews())
  lines = path.read_text().replace('film 1', 'film\u2028 1')
  path.write_text('\ufeff' + lines)
  assert tasks.of('sst2', str(path), None).num_classes == 2


def test_the_papers_templates():
  for name, written in tasks.PAPER.items():
    found = prompts.parse(written.template, name)
    assert found.label_space == ' ' and found.after == '\n'
  assert len(tasks.PAPER['trec'].labels) == 6


def test_a_task_of_ones_own(tmp_path):
  write(tmp_path, [{'text': f't {i}', 'label': 'ab'[i % 2]} for i in range(40)])
  content = {'template': 'In {text} is {label}.', 'labels': ['a', 'b'], 'examples': 'rows.jsonl'}
  path = tmp_path / 'mine.json'
  path.write_text(json.dumps(content))
  task = tasks.of(str(path), '', None)
  assert task.template == prompts.Template('In', ' ', ' is', ' ', '.')
  assert task.draw(0, 0, 3).labels == ('a', 'b')
  bad = {
    'template': ('In {text}.', r'must have \{label\} once'),
    'labels': (['a'], 'must be at least two different words'),
    'examples': (3, "must have 'examples'"),
  }
  for key, (value, problem) in bad.items():
    path.write_text(json.dumps(content | {key: value}))
    with pytest.raises(errors.InputError, match=f'--task=.*{problem}'):
      tasks.of(str(path), '', None)
  path.write_text('{')
  with pytest.raises(errors.InputError, match='must be JSON'):
    tasks.of(str(path), '', None)


@pytest.mark.parametrize(
  'name, examples, problem',
  [
    ('episodes', '', "this model's config.data.source is not episodes"),
    ('sst2', '', '--task=sst2 needs --examples=FILE.jsonl'),
    ('sst', 'x.jsonl', "--task=sst must be one of .*; did you mean 'sst2'"),
    ('sst2', 'missing.jsonl', 'must be a readable file'),
  ],
)
def test_tasks_that_are_not_there(name, examples, problem):
  with pytest.raises(errors.InputError, match=problem):
    tasks.of(name, examples, None)


@pytest.mark.parametrize(
  'row, problem',
  [
    ({'label': 0}, 'rows.jsonl:3 must have a string "text"'),
    ({'text': 'x', 'label': 'Good'}, 'must have as "label" one of Positive, Negative.*\'Good\''),
    ({'text': 'x', 'label': 2}, 'or its number from 0 to 1; it has 2'),
    ([], 'must be a JSON object'),
  ],
)
def test_bad_examples(tmp_path, row, problem):
  path = write(tmp_path, [*reviews(2), row])
  with pytest.raises(errors.InputError, match=problem):
    tasks.of('sst2', str(path), None)


def test_too_few_examples(tmp_path):
  task = tasks.of('sst2', str(write(tmp_path, reviews(8))), None)
  with pytest.raises(errors.InputError, match='has only [0-4] examples of a class .* 6 are needed'):
    task.draw(0, 5, 2)
