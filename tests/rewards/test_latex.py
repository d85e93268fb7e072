import importlib.util
import sys
import types

import pytest

from moe_jax import errors
from moe_jax.rewards import latex, registry


@pytest.fixture
def library(monkeypatch):
  """In place of math-verify: answers are words of one letter, and 'x' is one that it fails on."""
  asked = []

  def parse(text, *, parsing_timeout, raise_on_error=False):
    asked.append((parsing_timeout, raise_on_error))
    return [word for word in text.split() if len(word) == 1]

  def verify(gold, target, *, timeout_seconds, raise_on_error):
    assert timeout_seconds is None and raise_on_error
    if 'x' in target:
      raise TypeError('cannot compare')
    return gold == target

  monkeypatch.setitem(sys.modules, 'math_verify', types.SimpleNamespace(parse=parse, verify=verify))
  return asked


@pytest.mark.parametrize(
  'text, expected', [('so a', (1, 'right')), ('so b', (0, 'wrong')), ('so', (0, 'no_answer'))]
)
def test_kinds(library, text, expected):
  found = registry.by_name('math_verify')('', (), text, {'answer': 'a'})
  assert (found.value, found.kind) == expected
  assert library == [
    (None, True),
    (None, False),
  ]  # no signals, and bad examples raise


def test_errors_are_no_wrong_answers(library):
  judge = latex.math_verify()
  with pytest.raises(TypeError, match='cannot compare'):
    judge('', (), 'so x', {'answer': 'a'})
  with pytest.raises(ValueError, match='finds no answer in'):
    judge('', (), 'so a', {'answer': 'none'})


def test_without_the_library_there_is_a_way_out(monkeypatch):
  monkeypatch.setitem(sys.modules, 'math_verify', None)
  with pytest.raises(errors.InputError, match=r"pip install 'moe_jax\[math\]'"):
    latex.math_verify()


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec('math_verify'), reason='needs the extra math')
def test_values_are_compared():
  judge = latex.math_verify()
  for text, kind in ((r'so $\frac{2}{4}$', 'right'), ('0.5', 'right'), ('0.51', 'wrong')):
    assert judge('', (), text, {'answer': r'\boxed{1/2}'}).kind == kind
