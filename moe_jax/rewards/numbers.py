"""Numbers in text, exactly: `fractions.Fraction` in place of floats, and never `eval`."""

import fractions
import re

_LONGEST = 64  # characters of a number; longer ones are none, as their arithmetic would take time
_PLAIN = r'([-+]?)\$?(\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?:\s?/\s?(\d+))?(%?)'
_WHOLE = re.compile(_PLAIN, re.ASCII)
_IN_TEXT = re.compile(rf'(?<![\w.]){_PLAIN}(?![\w/])', re.ASCII)
_LATEX_FRACTION = re.compile(r'([-+]?)\\[dt]?frac\{(-?\d+)\}\{(-?\d+)\}', re.ASCII)
_STATED = re.compile(r'(?:[Tt]he (?:final )?answer is:?|####)\s+')
BOXED = '\\boxed{'
FORMS = ('boxed', 'stated', 'last')


def parse(text: str) -> fractions.Fraction | None:
  r"""The number that a text is, as 7, -1,200.5, 3/4, 12% or \frac{3}{4}; None if it is none."""
  text = text.strip().strip('$').strip().rstrip('.')
  if len(text) > _LONGEST:
    return None
  latex = _LATEX_FRACTION.fullmatch(text)
  if latex is not None:
    return _ratio(latex[1], latex[2], latex[3])
  plain = _WHOLE.fullmatch(text)
  if plain is None:
    return None
  value = _ratio(plain[1], plain[2].replace(',', ''), plain[3] or '1')
  return value / 100 if value is not None and plain[4] else value


def _ratio(sign: str, above: str, below: str) -> fractions.Fraction | None:
  divisor = fractions.Fraction(below)
  if divisor == 0:
    return None
  value = fractions.Fraction(above) / divisor
  return -value if sign == '-' else value


def stated(text: str, form: str) -> str | None:
  r"""The last answer of a text in one of FORMS, as text; None if it has none of that form.

  Args:
    text: a solution.
    form: 'boxed' is what \boxed{...} holds, 'stated' the number behind "The answer is" or ####,
      'last' the last number.
  """
  if form == 'boxed':
    return _boxed(text)
  if form == 'stated':
    behind = [match.end() for match in _STATED.finditer(text)]
    found = _IN_TEXT.match(text, behind[-1]) if behind else None
    return found[0] if found else None
  found = [match[0] for match in _IN_TEXT.finditer(text)]
  return found[-1] if found else None


def form_of(solution: str) -> str:
  """The form of FORMS in which a solution gives its answer."""
  return next((form for form in FORMS[:2] if stated(solution, form) is not None), 'last')


def times_stated(text: str, form: str) -> int:
  """How often a text states an answer in a form of FORMS; once for 'last'."""
  if form == 'boxed':
    return text.count(BOXED)
  return len(_STATED.findall(text)) if form == 'stated' else 1


def _boxed(text: str) -> str | None:
  r"""What the last \boxed{...} holds, with the braces in it; None if it is not closed."""
  begin = text.rfind(BOXED)
  if begin < 0:
    return None
  begin += len(BOXED)
  depth = 1
  for i in range(begin, len(text)):
    depth += (text[i] == '{') - (text[i] == '}')
    if depth == 0:
      return text[begin:i]
  return None
