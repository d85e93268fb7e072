import types

import pytest

from moe_jax import errors
from moe_jax.rewards import programs, registry, sandbox

EXAMPLE = {'question': 'q', 'entry': 'f', 'tests': [[[1], 2], [[2], 3]]}


def judged(kind, *results, text='def f(x): ...', share=False, example=EXAMPLE):
  """(reward, what has been run) of a program that returns these."""
  asked = []

  def run(*arguments):
    asked.append(arguments)
    return sandbox.Outcome(kind, list(results), '')

  runner = types.SimpleNamespace(run=run, isolation='none')
  return programs.Program(runner, share=share)('', (), text, example), asked[0]


@pytest.mark.parametrize(
  'kind, results, value, expected',
  [
    ('ran', ({'value': 2}, {'value': 3}), 1.0, 'right'),
    ('ran', ({'value': 2}, {'value': 4}), 0.0, 'wrong'),
    ('error', ({'value': 2}, {'error': 'E'}), 0.0, 'error'),
    ('error', (), 0.0, 'error'),
    ('missing', ({'missing': 'f'},), 0.0, 'no_answer'),
    ('memory', ({'value': 2},), 0.0, 'memory'),
    ('time', ({'value': 2}, {'value': 3}), 0.0, 'time'),  # it has to end, too
  ],
)
def test_kinds(kind, results, value, expected):
  found, asked = judged(kind, *results)
  assert (found.value, found.kind) == (value, expected)
  assert asked == ('def f(x): ...', 'f', [[1], [2]])


def test_a_share_of_the_tests():
  found, _ = judged('error', {'value': 2}, {'error': 'E'}, share=True)
  assert found == (0.5, {'passed': 0.5}, 'error', None)


def test_a_question_without_tests_is_an_error():
  with pytest.raises(ValueError, match="'q' has no tests"):
    judged('ran', example=EXAMPLE | {'tests': []})


@pytest.mark.parametrize(
  'text, source',
  [
    (' def f(x):\n  return 1\n', 'def f(x):\n  return 1'),
    ('So:\n```python\nx = 1\n```\nor\n```\ny = 2\n```\nthat is it', 'y = 2\n'),
    ('```py\nx = 1', 'x = 1'),
  ],
)
def test_the_program_of_a_text(text, source):
  assert programs.source_in(text) == source
  assert judged('ran', text=text)[1][0] == source


def test_a_text_may_go_on_from_a_prefix():
  prefix = 'def f(x):\n'
  _, asked = judged('ran', text='  return x + 1', example=EXAMPLE | {'prefix': prefix})
  assert asked[0] == 'def f(x):\n  return x + 1'


@pytest.mark.parametrize(
  'found, expected, same',
  [
    (2, 2, True),
    (2.0, 2, True),
    (0.1 + 0.2, 0.3, True),
    (2, 3, False),
    (10**20, 10**20 + 1, False),  # not as floats
    (True, 1, False),
    (1, True, False),
    (False, False, True),
    (None, False, False),
    (None, None, True),
    ('1', 1, False),
    ('a', 'a', True),
    ([1, [2]], [1, [2]], True),
    ([1, 2], [1], False),
    ([1], [1, 2], False),
    ({'a': 1}, {'a': 1}, True),
    ({'a': 1, 'b': 2}, {'a': 1}, False),
    ([], {}, False),
  ],
)
def test_values_are_compared_as_what_they_are(found, expected, same):
  assert programs.equal(found, expected) is same


def test_limits_are_positive():
  with pytest.raises(errors.InputError, match=r'program\(cpu_seconds=0\) must be positive'):
    registry.build('program(cpu_seconds=0)')


@pytest.mark.slow
def test_programs_are_run_by_name_and_in_a_pool():
  from moe_jax.rewards import pool, reward

  with pool.RewardPool('program(cpu_seconds=1) + 0.5 * length', 2) as rewards:
    assert 'ways out, all closed' in rewards.isolation
    texts = ['def f(x): return x + 1', 'def f(x): return 2', 'def f(x): while', 'x = 1']
    items = [reward.Item('', [0] * 9, text, EXAMPLE) for text in texts] * 4
    found = rewards.score(items)
  assert [one.kind for one in found] == ['right', 'wrong', 'error', 'no_answer'] * 4
  assert [one.value for one in found] == [1.0, 0, 0, 0] * 4
  assert found[1].parts == {'program/passed': 0.5, 'length/tokens': 9}
