"""The picture of differences against tokens: what is drawn where."""

import numpy as np
from matplotlib import figure

from moe_jax.analysis import difference_curves, difference_pictures, paired
from moe_jax.runs import plots


def panel(mean, title='a − b', verdict=paired.UNDECIDED):
  at = np.geomspace(1e4, 3e6, len(mean))
  values = np.asarray(mean) + np.asarray([[-0.01], [0.0], [0.01]])
  return difference_pictures.Panel(title, difference_curves.Curve(at, values, at[-1]), verdict)


def drawn(monkeypatch, panels, **options):
  """The figure that would be written."""
  kept = []
  monkeypatch.setattr(plots, 'save', lambda fig, path: kept.append(fig))
  difference_pictures.draw('unused.png', panels, **options)
  assert isinstance(kept[0], figure.Figure)
  return kept[0]


def test_band_crossover_and_verdict_are_drawn(monkeypatch):
  (axes,) = drawn(monkeypatch, [panel([9.0, *np.linspace(0.3, -0.2, 29)])]).axes
  zero, mean, interval, point = axes.get_lines()
  assert set(zero.get_ydata()) == {0} and len(mean.get_xdata()) == 30
  low, high = interval.get_xdata()
  assert low < point.get_xdata()[0] < high and axes.get_xscale() == 'log'
  (note,) = axes.texts
  assert note.get_text().startswith('not distinguishable\ncrosses at ')
  assert len(axes.collections) == 1  # the band
  assert axes.get_ylim()[1] < 2  # the first tenth does not set the scale


def test_without_a_crossover_there_is_none(monkeypatch):
  fig = drawn(monkeypatch, [panel([0.3, 0.2, 0.2], verdict=paired.CONTRADICTED)] * 4, columns=3)
  assert len(fig.axes) == 6 and not fig.axes[4].axison  # four panels in two rows of three
  assert len(fig.axes[0].get_lines()) == 2
  assert fig.axes[0].texts[0].get_text() == paired.CONTRADICTED
  assert fig.axes[0].get_lines()[1].get_color() == difference_pictures.COLOURS[paired.CONTRADICTED]


def test_it_is_written(tmp_path):
  difference_pictures.draw(tmp_path / 'a.png', [panel([0.2, -0.1, -0.2])])
  assert (tmp_path / 'a.png').read_bytes()[:4] == b'\x89PNG'
