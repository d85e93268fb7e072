"""Text of others in pictures: tokens, labels of text, names of directories.

matplotlib reads what stands between dollar signs as mathematics, and draws a box where its font has
no glyph. Before a figure is drawn, its texts are told to be plain, and what the font lacks is
written as its nearest plain form or its number.
"""

import unicodedata
from collections.abc import Callable
from typing import Any

from matplotlib import axis as axis_lib
from matplotlib import category, figure, font_manager, text, ticker

# What writes words along an axis; the others write numbers, powers of ten with mathematics.
_WORDS = (ticker.FixedFormatter, ticker.FuncFormatter, category.StrCategoryFormatter)


def make_plain(fig: figure.Figure):
  """Makes every text of a figure, except numbers along axes, one that can be drawn as it is."""
  numbers = set()
  for axes in fig.axes:
    for axis in (axes.xaxis, axes.yaxis):
      if isinstance(axis.get_major_formatter(), _WORDS):
        _make_axis_plain(axis)
      else:
        numbers.update(axis.get_ticklabels(which='both'))
  for one in fig.findobj(text.Text):
    assert isinstance(one, text.Text)
    if one not in numbers:
      one.set_parse_math(False)
      one.set_text(drawable(one.get_text(), one.get_fontproperties()))


def _make_axis_plain(axis: axis_lib.Axis):
  """Its labels are asked for again whenever it is drawn, so what makes them is wrapped."""
  labels = axis.get_ticklabels()
  formatter: Callable[..., str] = axis.get_major_formatter()
  if not labels:
    return
  properties = labels[0].get_fontproperties()
  ticks = axis.get_majorticklocs()
  written = {float(at): drawable(formatter(at, i), properties) for i, at in enumerate(ticks)}
  axis.set_major_formatter(ticker.FuncFormatter(lambda at, i: written.get(float(at), '')))
  axis.set_major_locator(ticker.FixedLocator(list(ticks)))
  for label in axis.get_ticklabels():
    label.set_parse_math(False)


def drawable(shown: str, properties: Any = None) -> str:
  """A text in characters that the font has: full-width bars become bars, others 'U+6F22'."""
  font = font_manager.get_font(font_manager.findfont(properties or font_manager.FontProperties()))

  def known(characters: str) -> bool:
    return all(c == '\n' or font.get_char_index(ord(c)) for c in characters)

  def form(c: str) -> str:
    plain = unicodedata.normalize('NFKC', c)
    return c if known(c) else plain if known(plain) else f'U+{ord(c):04X}'

  return ''.join(map(form, shown))
