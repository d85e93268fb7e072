"""The pictures of a comparison: which are drawn, and what is in them."""

import numpy as np
import pytest

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


def test_what_is_not_there_is_not_drawn(tmp_path, figures):
  found = comparison.compare([written.run(tmp_path / 'a', held_out=False, routing=False)])
  assert [path.name for path, _ in pictures.draw(found, tmp_path)] == ['losses.png']
