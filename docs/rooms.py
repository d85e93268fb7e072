"""Draws docs/pictures/rooms.png: the decoder with its MoE layer, and the rooms of the library.

Run:  python -m docs.rooms

The rooms and their order are those of the table in `tests/test_imports.py`.
"""

import ast
import pathlib
from collections.abc import Sequence

import matplotlib
import matplotlib.figure
from matplotlib import patches
from matplotlib.backends import backend_agg

ROOT = pathlib.Path(__file__).parents[1]
PICTURE = ROOT / 'docs' / 'pictures' / 'rooms.png'
INK, LINE = '#1f2430', '#5b6475'
MODEL, MOE, EXPERT, ROOM, OUTSIDE = '#e8ecf7', '#fdeecb', '#f6c667', '#dcebe1', '#eeeeee'


def floors() -> tuple[tuple[str, ...], ...]:
  """The rooms of the library, those that need least first: FLOORS of tests/test_imports.py."""
  tree = ast.parse((ROOT / 'tests' / 'test_imports.py').read_text(encoding='utf-8'))
  for node in tree.body:
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == 'FLOORS':
      return ast.literal_eval(node.value)
  raise ValueError('tests/test_imports.py has no table FLOORS')


def _box(axes, x, y, width, height, text='', color=MODEL, size=9, bold=False, edge=LINE):
  style = patches.BoxStyle('round', pad=0, rounding_size=0.06)
  axes.add_patch(
    patches.FancyBboxPatch((x, y), width, height, boxstyle=style, fc=color, ec=edge, lw=1)
  )
  weight = 'bold' if bold else 'normal'
  at = (x + width / 2, y + height / 2)
  axes.text(*at, text, ha='center', va='center', size=size, color=INK, weight=weight)


def _arrow(axes, start: Sequence[float], end: Sequence[float], **style):
  style = {'arrowstyle': '-|>', 'color': LINE, 'lw': 1.2, 'shrinkA': 0, 'shrinkB': 0} | style
  axes.annotate('', end, start, arrowprops=style)


def _decoder(axes):
  """The decoder, bottom to top; the residual stream goes round each sublayer."""
  x, width, middle = 0.55, 2.2, 1.65
  _box(axes, x, 0.55, width, 0.45, 'token embedding')
  _box(axes, x - 0.3, 1.35, width + 0.6, 3.0, color='white')
  axes.text(x + width + 0.4, 4.18, 'x layers', size=8, color=LINE, ha='left', va='center')
  _box(axes, x, 1.9, width, 0.65, 'RMSNorm, attention\nMLA or MHA, GQA, MQA')
  _box(axes, x, 3.1, width, 0.65, 'RMSNorm, FFN\ndense, or MoE', color=MOE)
  _box(axes, x, 4.7, width, 0.45, 'RMSNorm, output head')
  _box(axes, x, 5.5, width, 0.45, 'logits of the next tokens', size=8, color='white')
  for low, high in ((1.0, 1.9), (2.55, 3.1), (3.75, 4.7), (5.15, 5.5)):
    _arrow(axes, (middle, low), (middle, high))
  for low, high in ((1.62, 2.78), (2.9, 4.05)):
    axes.plot([middle, x - 0.15, x - 0.15, middle], [low, low, high, high], color=LINE, lw=1.2)
    axes.text(middle, high, '+', size=11, ha='center', va='center', color=INK)


def _moe_layer(axes):
  """The MoE layer: shared experts see every token, the router picks K of E routed ones."""
  left, bottom, width, height = 4.0, 1.05, 4.3, 4.2
  _box(axes, left, bottom, width, height, color='#fff9ec')
  axes.plot([2.75, left], [3.42, 3.42], color=LINE, lw=1, ls=':')
  axes.text(left + 1.0, bottom + height - 0.22, 'MoE layer', weight='bold', size=10, color=INK)
  _box(axes, 4.25, 3.55, 0.95, 0.6, 'shared\nexpert', color=EXPERT, size=8)
  for i, text in enumerate(('1', '2', '3', '...', 'E')):
    color = EXPERT if i in (0, 2, 4) else 'white'
    _box(axes, 5.45 + 0.54 * i, 3.55, 0.45, 0.6, text, color=color, size=8)
  axes.text(6.87, 4.28, 'K of E routed', size=8, color=LINE, ha='left', va='bottom')
  _box(axes, 5.45, 2.7, 2.61, 0.45, 'dispatch (devices: exchange)', size=8)
  _box(axes, 5.45, 1.95, 2.61, 0.45, 'router: scores, selection, gates', color=MOE, size=8)
  axes.text(6.75, 1.32, 'tokens [B, L, D]', size=8, color=LINE, ha='center', va='center')
  _arrow(axes, (6.75, 1.45), (6.75, 1.95))
  _arrow(axes, (6.75, 2.4), (6.75, 2.7))
  _arrow(axes, (4.72, 4.8), (4.72, 5.6))
  for i in (0, 2, 4):
    _arrow(axes, (6.75, 3.15), (5.68 + 0.54 * i, 3.55), lw=0.9)
  axes.plot([6.1, 4.72], [1.32, 1.32], color=LINE, lw=1.2)
  _arrow(axes, (4.72, 1.32), (4.72, 3.55))
  axes.text(4.72, 4.72, '+', size=12, ha='center', va='center', color=INK)
  axes.plot([4.72, 4.72], [4.15, 4.62], color=LINE, lw=1.2)
  axes.plot([6.75, 6.75, 4.85], [4.15, 4.72, 4.72], color=LINE, lw=1.2)
  axes.text(4.95, 4.58, 'weighted by the gates', size=8, color=LINE, ha='left', va='top')


def _rooms(axes):
  """The floors of the library, bottom to top."""
  left, width, step = 9.2, 5.1, 0.5
  rows = [(names, ROOM) for names in floors()]
  rows += [(('experiments: commands and studies',), OUTSIDE)]
  for i, (names, color) in enumerate(rows):
    each = width / len(names)
    for j, name in enumerate(names):
      at = (left + j * each + 0.03, 0.55 + i * step)
      _box(axes, *at, each - 0.06, step - 0.1, name, color, size=7.5)
  top = 0.55 + len(rows) * step
  axes.text(left, top + 0.13, 'Rooms of moe_jax', weight='bold', size=10, color=INK)
  _arrow(axes, (left + width + 0.22, top - 0.1), (left + width + 0.22, 0.6))
  at = (left + width + 0.38, 0.55 + len(rows) * step / 2)
  axes.text(*at, 'imports', size=8, color=LINE, rotation=270, ha='center', va='center')


def draw() -> matplotlib.figure.Figure:
  """The whole picture."""
  with matplotlib.rc_context({'font.family': 'DejaVu Sans'}):
    figure = matplotlib.figure.Figure(figsize=(11.4, 4.9))
    backend_agg.FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 15), ylim=(0.2, 6.4))
    axes.axis('off')
    axes.text(0.25, 6.15, 'Decoder', weight='bold', size=10, color=INK, va='center')
    _decoder(axes)
    _moe_layer(axes)
    _rooms(axes)
  return figure


def main():
  """Writes the picture."""
  draw().savefig(PICTURE, dpi=150, metadata={'Software': None})


if __name__ == '__main__':
  main()
