import warnings

import pytest
from matplotlib import figure

from moe_jax.runs import plot_text, plots

NASTY = (
  '$',
  '$x',
  'a$b$c',
  r'$\frac{1',
  r'\$',
  '<｜fim▁hole｜>',
  '漢字',
  'a\nb',
  '\x07',
  '🙂 _^{}',
)


def picture(name: str) -> figure.Figure:
  """A figure with `name` at every place where tokens, labels and names of others stand."""
  fig = figure.Figure(layout='constrained')
  left, middle, right = fig.subplots(1, 3)
  left.plot([1, 2], [1, 1000], label=name)
  left.set_yscale('log')
  left.legend(title=name)
  left.set_title(name)
  left.set_xlabel(name)
  left.annotate(name, (1, 1))
  middle.bar([name, 'b'], [1, 2])
  right.imshow([[1, 2], [3, 4]])
  right.set_yticks([0, 1], labels=[name, 'b'])
  right.text(0, 0, name, family='monospace')
  fig.suptitle(name)
  return fig


@pytest.mark.parametrize('name', NASTY)
def test_every_text_is_drawn_as_it_stands(tmp_path, name):
  fig = picture(name)
  with warnings.catch_warnings():
    warnings.simplefilter('error')  # of missing glyphs, for one
    plots.save(fig, tmp_path / 'a.png')
  want = plot_text.drawable(name)
  shown = [label.get_text() for label in fig.axes[2].get_yticklabels()]
  assert shown == [want, 'b'] == [label.get_text() for label in fig.axes[1].get_xticklabels()]
  assert fig.axes[0].get_title() == want
  # Powers of ten keep their own mathematics.
  powers = fig.axes[0].get_yticklabels()
  assert any(label.get_parse_math() and '10^{' in label.get_text() for label in powers)


def test_what_the_font_lacks_is_written_otherwise():
  assert plot_text.drawable('a$｜▁é\n') == 'a$|▁é\n'
  assert plot_text.drawable('漢') == 'U+6F22'


def test_the_font_of_the_text_decides_what_can_be_drawn(monkeypatch):
  asked = []
  find = plot_text.font_manager.findfont
  monkeypatch.setattr(
    plot_text.font_manager, 'findfont', lambda one: asked.append(one.get_family()) or find(one)
  )
  mono = plot_text.font_manager.FontProperties(family='monospace')
  assert plot_text.drawable('ab', mono) == plot_text.drawable('ab') == 'ab'
  assert asked == [['monospace'], plot_text.font_manager.FontProperties().get_family()]
