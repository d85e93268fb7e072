import json

import pytest

from moe_jax import errors
from moe_jax.post_training import step_labels

TEXT = '7 + 5 = 12\n\n12 - 3 = 8 \nThe answer is 8.'
ONE = step_labels.Labelled(
  'What is 7 + 5 - 3?',
  'The answer is 9.',
  TEXT,
  step_labels.ends_of_steps(TEXT),
  ((True, False, True), (False, True, False), (False,)),
  (True, False, False),
)


def test_steps_are_lines_that_say_something():
  assert [TEXT[:end].splitlines()[-1] for end in ONE.ends] == [
    '7 + 5 = 12',
    '12 - 3 = 8',
    'The answer is 8.',
  ]
  assert step_labels.prefix(TEXT, ONE.ends[0]) == '7 + 5 = 12\n\n'
  assert step_labels.prefix(TEXT, ONE.ends[-1]) == TEXT


def test_hard_and_soft_labels():
  """The paper's example: of three completions two are right, so 2/3 and good."""
  assert ONE.soft == pytest.approx([2 / 3, 1 / 3, 0])
  assert ONE.hard == [True, True, False] == [soft > 0 for soft in ONE.soft]
  assert not ONE.right


def test_a_file_is_read_as_written(tmp_path):
  path = tmp_path / 'labels.jsonl'
  step_labels.write(path, [ONE, ONE._replace(truth=None)])
  assert step_labels.read(path, '--labels') == [ONE, ONE._replace(truth=None)]


def test_a_file_of_another_program_is_read(tmp_path):
  """With a byte order mark, Windows' ends of lines, and a line separator within a text."""
  separated = ONE._replace(question='two\u2028lines')
  text = json.dumps(separated._asdict(), ensure_ascii=False) + '\r\n'
  (tmp_path / 'labels.jsonl').write_bytes(b'\xef\xbb\xbf' + text.encode() + b'\r\n')
  assert step_labels.read(tmp_path / 'labels.jsonl', '--labels') == [separated]


@pytest.mark.parametrize(
  'change',
  [
    {'ends': [5]},
    {'ends': [25, 10, 40]},
    {'ends': [10, 22, 400]},
    {'outcomes': [[True], [], [True]]},
    {'truth': [True]},
    {'text': None, 'ends': 3},
  ],
)
def test_damage_is_named_by_line(tmp_path, change):
  path = tmp_path / 'labels.jsonl'
  path.write_text(json.dumps(ONE._asdict()) + '\n' + json.dumps(ONE._asdict() | change) + '\n')
  with pytest.raises(errors.InputError, match='--labels=.*line 2'):
    step_labels.read(path, '--labels')
  path.write_text('')
  with pytest.raises(errors.InputError, match='is empty'):
    step_labels.read(path, '--labels')
  with pytest.raises(errors.InputError, match='must be a file'):
    step_labels.read(tmp_path / 'none', '--labels')
