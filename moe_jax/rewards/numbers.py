"""Numbers in text, exactly: `fractions.Fraction` in place of floats, and never `eval`.

A number in a text is read whole or not at all: 2.5kg, 1.5e3, 5/7/2023, 1 1/2 and 2^10 are none, as
their beginnings (2, 1, 5/7, 1 and 2) are other numbers than what is meant.
"""

import fractions
import re
from typing import NamedTuple

_LONGEST = 64  # characters of a number; longer ones are none, as their arithmetic would take time
_SIGN = '[-+\N{MINUS SIGN}]?'
_PLAIN = rf'({_SIGN})\$?(\d+(?:,\d{{3}})*(?:\.\d+)?|\.\d+)(?:\s?/\s?(\d+))?(?:\s?\\?(%))?'
_LATEX = rf'({_SIGN})\$?\\[dt]?frac\{{(-?\d+)\}}\{{(-?\d+)\}}'
_WHOLE = re.compile(_PLAIN, re.ASCII)
_LATEX_FRACTION = re.compile(_LATEX, re.ASCII)
# What a number cannot touch without being part of something else: letters (pi too), a root, powers
# and halves that are one character.
_LETTER = '\\w\u0370-\u03ff\u221a\u00b2\u00b3\u00b9\u2070-\u209c\u00bc-\u00be\u2150-\u215f'
_SPACE = '[ \u00a0\u202f]'  # that may divide the digits of a number
_BEFORE = (
  rf"(?<![{_LETTER}.^/{{}}])(?<!\d[,:'\u2019])(?<!\d{_SPACE})(?<!\d[eE][-+])(?<!\d\\,)(?<!/\s)"
)
_BEHIND = (
  rf"(?![{_LETTER}]|{_SPACE}?/|\^(?!\{{?\\circ)|[.,:'\u2019]\d|\{{,\}}|{_SPACE}\d"
  rf'|{_SPACE}?[*\u00d7\u00b7]{_SPACE}?\d|\\,\d|{_SPACE}?\\(?!text|mathrm|mbox|quad)[A-Za-z])'
)
# (?>...) gives nothing back: what follows the whole number decides, not what follows a part of it.
_IN_TEXT = re.compile(rf'{_BEFORE}(?>\$?(?:{_LATEX}|{_PLAIN})){_BEHIND}', re.ASCII)
_STATED = re.compile(r'(?:[Tt]he (?:final )?answer is:?|####)\s+')
BOXED = '\\boxed{'
FORMS = ('boxed', 'stated', 'last')


class Span(NamedTuple):
  """Where something stands in a text."""

  begin: int
  end: int  # behind its last character


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
  return -value if sign in ('-', '\N{MINUS SIGN}') else value


def answer_in(text: str, solution: str) -> str | None:
  r"""The answer that a text gives, so written that equal answers are one; None if it gives none.

  The text must give it as the solution does: in \boxed{}, or behind "The answer is" or ####. If the
  solution is a bare number, the text may give it in any of these forms, or as its last number. If
  it is something else, the text is its answer, but for space at the ends. A number is written as
  the fraction that it is. The answer of the solution itself is `answer_in(solution, solution)`.
  """
  form, given = form_of(solution), text
  if form != 'last' or parse(solution) is not None:
    forms = FORMS if form == 'last' else (form,)
    given = next((one for f in forms if (one := stated(text, f)) is not None), '')
  value = parse(given)
  return str(value) if value is not None else given.strip() or None


def is_right(text: str, solution: str) -> bool:
  """Whether a text gives the answer of a solution, see `answer_in`; no answer is that of none."""
  given = answer_in(text, solution)
  return given is not None and given == answer_in(solution, solution)


def stated(text: str, form: str) -> str | None:
  r"""The last answer of a text in one of FORMS, as text; None if it has none of that form.

  Args:
    text: a solution.
    form: 'boxed' is what \boxed{...} holds, 'stated' the number behind "The answer is" or ####,
      'last' the last number.
  """
  found = place(text, form)
  return None if found is None else text[found.begin : found.end]


def place(text: str, form: str) -> Span | None:
  """Where `stated` has found its answer."""
  if form == 'boxed':
    return _boxed(text)
  if form == 'stated':
    behind = [match.end() for match in _STATED.finditer(text)]
    found = [_IN_TEXT.match(text, at) for at in behind[-1:]]
  else:
    found = list(_IN_TEXT.finditer(text))
  return Span(*found[-1].span()) if found and found[-1] else None


def form_of(solution: str) -> str:
  """The form of FORMS in which a solution gives its answer."""
  return next((form for form in FORMS[:2] if stated(solution, form) is not None), 'last')


def times_stated(text: str, form: str) -> int:
  """How often a text states an answer in a form of FORMS; once for 'last'."""
  if form == 'boxed':
    return text.count(BOXED)
  return len(_STATED.findall(text)) if form == 'stated' else 1


def _boxed(text: str) -> Span | None:
  r"""What the last \boxed{...} holds, with the braces in it; None if it is not closed."""
  begin = text.rfind(BOXED)
  if begin < 0:
    return None
  begin += len(BOXED)
  depth = 1
  for i in range(begin, len(text)):
    depth += (text[i] == '{') - (text[i] == '}')
    if depth == 0:
      return Span(begin, i)
  return None
