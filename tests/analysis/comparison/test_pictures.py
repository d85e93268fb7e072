"""The pictures of a comparison: which are drawn, and what is in them."""

import numpy as np
import pytest
from matplotlib import figure

from moe_jax.analysis.comparison import comparison, pictures
from moe_jax.runs import plots
from tests.analysis.comparison import written

ALL = ['differences.png', 'losses.png', 'held_out.png', 'balance.png', 'load.png']


@pytest.fixture
def figures(monkeypatch):
  """{name of the file: figure} of what is drawn."""
  kept = {}
  monkeypatch.setattr(plots, 'save', lambda fig, path: kept.update({path.name: fig}))
  return kept


def test_all_of_them(tmp_path, figures):
  found = comparison.compare(written.two_groups(tmp_path))
  drawn = pictures.draw(found, tmp_path)
  assert [path.name for path, _ in drawn] == ALL == list(figures)
  losses = figures['losses.png'].axes
  assert [axes.get_xlabel() for axes in losses] == list(pictures._SPENT.values())
  tokens = losses[0].get_lines()[1]
  np.testing.assert_allclose(tokens.get_xdata(), found.series['bias'].tokens)
  np.testing.assert_allclose(tokens.get_ydata(), found.series['bias'].values['loss'].mean(axis=0))
  assert tokens.get_color() == pictures.colours(found)['bias'] and len(losses[0].collections) == 2
  load = figures['load.png'].axes[1]
  assert load.get_title(loc='left') == 'bias, seed 0, step 24'
  np.testing.assert_allclose(load.images[0].get_array()[0, 0], 1.5)


def test_a_band_is_the_interval_over_seeds_with_gaps():
  axes = figure.Figure().subplots()
  values = np.asarray([[1.0, 2.0, 4.0], [2.0, 2.0, np.nan], [3.0, 2.0, 4.0]])
  pictures.band(axes, np.arange(3), values, 'arm', 'C0')
  (mean,), (filled,) = axes.get_lines(), axes.collections
  np.testing.assert_allclose(mean.get_ydata(), [2, 2, np.nan])
  # t(0.975, 2) = 4.30265, deviation 1, three seeds.
  assert filled.get_paths()[0].vertices[:, 1].max() == pytest.approx(2 + 4.30265 / 3**0.5)
  pictures.band(axes, np.arange(3), values[:1], 'one seed', 'C1')
  assert len(axes.get_lines()) == 2 and len(axes.collections) == 1


def test_what_is_not_there_is_not_drawn(tmp_path, figures):
  found = comparison.compare([written.run(tmp_path / 'a', held_out=False, routing=False)])
  assert [path.name for path, _ in pictures.draw(found, tmp_path)] == ['losses.png']
