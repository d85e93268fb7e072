import json

import pytest

from experiments.common import json_output


def strict(text: str):
  return json.loads(text, parse_constant=lambda name: pytest.fail(f'{name} is no JSON'))


def test_numbers_that_are_not_finite_are_null(capsys):
  inf, nan = float('inf'), float('nan')
  json_output.show({'loss': nan, 'of': [1.5, -inf, ({'deep': inf},)], 7: 'NaN', 'no': None})
  assert strict(capsys.readouterr().out) == {
    'loss': None,
    'of': [1.5, None, [{'deep': None}]],
    '7': 'NaN',
    'no': None,
  }


def test_options_are_those_of_json(capsys):
  json_output.show([{'a': 1}], indent=2)
  assert capsys.readouterr().out == '[\n  {\n    "a": 1\n  }\n]\n'
  json_output.show({'path': json_output}, default=lambda one: one.__name__)
  assert strict(capsys.readouterr().out) == {'path': 'experiments.common.json_output'}
