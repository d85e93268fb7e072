import pytest

from moe_jax import errors
from moe_jax.data import conversations
from moe_jax.data.tasks import generated, programs


@pytest.mark.parametrize('source', generated.TASKS)
def test_every_question_once(source):
  found = list(generated.questions(source, '?operations=1&problems=3000', 'config.data.path'))
  questions = [one.question for one, _ in found]
  assert len(set(questions)) == len(questions) < 3000
  one, conversation = found[0]
  assert conversation == generated.conversation(one.question, one.solution)
  assert [turn.role for turn in conversation] == ['user', 'assistant']
  assert conversations.answers(conversation) == one.solution
  assert one.label.endswith('1 operations')


@pytest.mark.parametrize('path', ['?operations=0', '?operation=1', '?operations=two', 'operations'])
def test_a_dial_that_there_is_not(path):
  words = r'here must be of the form \?operations=2&max_value=9&kinds=2&problems=20000'
  with pytest.raises(errors.InputError, match=words):
    list(generated.questions('programs', path, 'here'))


def test_examples():
  one = programs.problem(3, programs.Difficulty())
  found = generated.example('programs', one.question, one.solution)
  assert found['entry'] == 'f' and found['tests'] == programs.tests(one.question)
  assert found['question'] == one.question and found['answer'] == one.solution
  plain = generated.example('arithmetic', 'What is 1 + 1?', '2')
  assert plain == {'question': 'What is 1 + 1?', 'answer': '2'}
