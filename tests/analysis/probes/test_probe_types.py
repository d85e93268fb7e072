import pytest
from matplotlib import figure

from moe_jax.analysis.probes import probe_types
from tests.analysis import subjects


def test_a_value_per_layer_and_the_extremes_of_many():
  assert probe_types.per_layer([0.2, 0.314], ['layer 1', 'layer 2']) == (
    'layer 1: 0.20, layer 2: 0.31'
  )
  values = [3, 1, 4, 1.5, 9, 2, 6, 5, 3.5]
  names = [f'layer {i}' for i in range(9)]
  found = probe_types.per_layer(values, names, '{:.0f}')
  assert found == 'least and most: layer 1: 1, layer 4: 9'
  assert probe_types.per_layer(values[:8], names[:8]).count('layer') == 8


@pytest.mark.parametrize('number, rows', [(1, 1), (3, 1), (4, 2), (7, 3)])
def test_a_grid_shows_as_many_panels_as_there_are(number, rows):
  fig = figure.Figure()
  axes = probe_types.grid(fig, number)
  assert len(axes) == number and all(one.get_visible() for one in axes)
  assert len(fig.axes) == rows * min(number, 3)
  assert sum(one.get_visible() for one in fig.axes) == number
  # 3.3 inches per column and one for labels; `height` per row and half an inch.
  assert probe_types.panel_size(number, height=2.0) == pytest.approx(
    (3.3 * min(number, 3) + 1, 2.0 * rows + 0.5)
  )


def test_a_context_names_the_moe_layers_by_their_number_in_the_model():
  subject = subjects.subject_of(model__num_layers=4, model__num_dense_layers=2)
  context = probe_types.Context(subject, 10)
  assert (context.first_layer, context.layer_names()) == (2, ['layer 2', 'layer 3'])
