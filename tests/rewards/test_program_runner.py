import json

import pytest

from moe_jax.rewards import program_runner


def run(source, *calls):
  told = []
  job = {'source': source, 'entry': 'f', 'calls': [list(call) for call in calls]}
  program_runner.run(job, told.append)
  return [json.loads(line) for line in told]


def test_every_call_has_a_line():
  source = 'def f(x, y=1):\n  return [x // y, {"a": None}]'
  assert run(source, (7, 2), (7, 0), (8,)) == [
    {'value': [3, {'a': None}]},
    {'error': 'ZeroDivisionError: integer division or modulo by zero'},
    {'value': [8, {'a': None}]},
  ]


@pytest.mark.parametrize(
  'source, line',
  [
    (
      'def f(x): return {1, 2}',
      {'error': 'TypeError: Object of type set is not JSON serializable'},
    ),
    ('def f(x): raise SystemExit(0)', {'error': 'SystemExit: 0'}),
    ('raise KeyboardInterrupt', {'failed': 'KeyboardInterrupt: '}),
    ('def f(x) return', {'failed': "SyntaxError: expected ':' (<program>, line 1)"}),
    ('f = 7', {'missing': 'f'}),
    ('', {'missing': 'f'}),
  ],
)
def test_what_goes_wrong_is_a_line(source, line):
  assert run(source, (1,)) == [line]


def test_a_number_that_json_lacks_is_no_value():
  assert list(run('def f(x): return float("nan")', (1,))[0]) == ['error']


def test_a_program_knows_that_it_is_not_the_main_one():
  assert run('f = lambda: __name__', ()) == [{'value': 'program'}]
