import struct

import numpy as np
import pytest

from moe_jax.runs import plots


def png_size(path):
  data = path.read_bytes()
  assert data[:8] == b'\x89PNG\r\n\x1a\n' and data.rstrip().endswith(b'\xaeB`\x82')
  return struct.unpack('>II', data[16:24])


def run(n):
  return [{'step': i, 'loss': 2 + 8 / (i + 1), 'lr': 1e-3} for i in range(n)]


@pytest.mark.parametrize('n', [0, 1, 5, 300])
def test_loss_curve_of_any_length(tmp_path, n):
  path = tmp_path / 'plots/loss.png'
  plots.loss_curve(run(n), path, 'a run', heldout=[(n, 2.5)] if n else None)
  width, height = png_size(path)
  assert width > height > 500
  assert [p.name for p in path.parent.iterdir()] == ['loss.png']


def test_loss_curve_with_gaps(tmp_path):
  metrics = run(100)
  metrics[50]['loss'] = None
  plots.loss_curve(metrics, tmp_path / 'loss.png', 'a run')
  plots.loss_curve([{**m, 'loss': None} for m in metrics], tmp_path / 'none.png', 'no loss at all')
  png_size(tmp_path / 'none.png')


def test_running_median():
  values = np.array([9.0, 8.0, 50.0, 6.0, np.nan, 4.0])
  # Ends keep themselves; [8, 9, 50] -> 9; [6, 8, 50] -> 8; [6, 50] -> 28; [4, 6] -> 5.
  np.testing.assert_array_equal(plots._running_median(values, 1), [9, 9, 8, 28, 5, 4])


@pytest.mark.parametrize('shape', [(1, 1), (2, 8), (8, 63), (30, 160)])
def test_expert_load_of_any_shape(tmp_path, shape):
  load = np.random.default_rng(0).dirichlet(np.ones(shape[1]), size=shape[0])
  plots.expert_load(load, tmp_path / 'load.png', 'a run', first_layer=1)
  width, height = png_size(tmp_path / 'load.png')
  assert 500 < width < 2500 and 300 < height < 2500


def test_expert_load_without_any_token_and_of_wrong_rank(tmp_path):
  plots.expert_load(np.zeros((2, 4)), tmp_path / 'load.png', 'no tokens')
  with pytest.raises(ValueError, match='layers, experts'):
    plots.expert_load(np.zeros(4), tmp_path / 'load.png', 'flat')


def history(layers, steps, *, bias=False, **changed):
  """Routing figures as `router_metrics` has them, improving over the steps."""
  rng = np.random.default_rng(0)
  found = []
  for step in steps:
    max_vio = (0.5 + 5 / step) * (1 + rng.random(layers))
    figures = {key: 0.1 * max_vio for key in plots._OVERVIEW} | {'max_vio': max_vio}
    figures |= {'bias_norm': np.full(layers, 0.01 * step if bias else 0.0)}
    figures |= {'load': rng.integers(0, 99, size=(layers, 8)), **changed}
    found.append((step, figures))
  return found


@pytest.mark.parametrize(
  'layers, steps',
  [(1, [1]), (2, [10, 20, 23]), (27, range(100, 10_100, 100)), (60, [5, 1000])],
)
def test_routing_pictures_of_any_shape(tmp_path, layers, steps):
  runs = history(layers, steps, bias=True)
  plots.routing_overview(runs, tmp_path / 'routing.png', 'a run', first_layer=1)
  plots.routing_heatmap(runs, 'max_vio', tmp_path / 'max_vio.png', 'a run')
  for name in ('routing', 'max_vio'):
    width, height = png_size(tmp_path / f'{name}.png')
    assert 800 < width < 2500 and 300 < height < 2500


def test_routing_pictures_without_any_figure(tmp_path):
  plots.routing_overview([], tmp_path / 'routing.png', 'a run')
  plots.routing_heatmap([], 'max_vio', tmp_path / 'max_vio.png', 'a run')
  png_size(tmp_path / 'routing.png')
  png_size(tmp_path / 'max_vio.png')


@pytest.fixture
def drawn(monkeypatch):
  """Keeps the figures instead of drawing them: a list, filled by every call of `plots`."""
  figures = []
  monkeypatch.setattr(plots, 'save', lambda fig, path: figures.append(fig))
  return figures


def panels(fig) -> dict:
  """Title -> axes of the panels that are shown."""
  return {a.get_title(loc='left'): a for a in fig.axes if a.axison and a.get_title(loc='left')}


def test_overview_leaves_the_bias_out_where_there_is_none(drawn):
  plots.routing_overview(history(3, [1, 2]), 'x.png', 'a run')
  plots.routing_overview(history(3, [1, 2], bias=True), 'x.png', 'a run')
  without, with_bias = map(panels, drawn)
  assert len(without) == 5 and len(with_bias) == 6
  assert set(with_bias) - set(without) == {'norm of the expert bias'}


def test_heat_map_puts_steps_across_and_layers_down(drawn):
  runs = [(10, {'drop_rate': np.array([0.0, 0.1])}), (30, {'drop_rate': np.array([0.2, 0.3])})]
  plots.routing_heatmap([*runs, (35, runs[0][1])], 'drop_rate', 'x.png', 'a run', first_layer=4)
  (axes,) = panels(drawn[0]).values()
  (mesh,) = axes.collections
  cells = mesh.get_array().reshape(2, 3)
  np.testing.assert_array_equal(cells, [[0.0, 0.2, 0.0], [0.1, 0.3, 0.1]])
  edges = mesh.get_coordinates()
  np.testing.assert_array_equal(edges[0, :, 0], [0, 20, 32.5, 37.5])  # half-way between the steps
  np.testing.assert_array_equal(edges[:, 0, 1], [3.5, 4.5, 5.5])
  assert axes.get_ylim() == (5.5, 3.5)  # the first layer on top
  assert [a.get_ylabel() for a in drawn[0].axes] == ['layer', 'share']


def test_unknown_values_are_masked_and_constant_ones_written(drawn):
  unknown = {'expert_similarity': np.array([np.nan, np.nan])}
  runs = [(1, unknown), (2, {'expert_similarity': np.array([0.5, 0.25])})]
  plots.routing_heatmap(runs, 'expert_similarity', 'x.png', 'a run')
  plots.routing_heatmap([(1, unknown)], 'expert_similarity', 'x.png', 'a run')
  plots.routing_heatmap([(1, {'loss_switch': np.ones(2)})], 'loss_switch', 'x.png', 'a run')
  mask = [np.ma.getmaskarray(panels(f).popitem()[1].collections[0].get_array()) for f in drawn]
  np.testing.assert_array_equal(mask[0].reshape(2, 2), [[True, False], [True, False]])
  assert mask[1].all() and not mask[2].any()
  texts = [[t.get_text() for t in panels(f).popitem()[1].texts] for f in drawn]
  assert texts == [[], [], ['1 throughout']]


def test_scale_is_not_set_by_a_few_outliers():
  rng = np.random.default_rng(0)
  bulk = rng.random((10, 100))
  assert plots._scale(bulk) == (bulk.min(), bulk.max(), 'neither')
  bulk[0, 0] = 50
  low, high, extend = plots._scale(bulk)
  assert low == bulk.min() and 0.9 < high < 1 and extend == 'max'
  bulk[1, 1] = -50
  assert plots._scale(bulk)[2] == 'both'
  bulk[0, 0] = 0.5
  assert plots._scale(bulk)[1:] == (np.delete(bulk.ravel(), 0).max(), 'min')
  assert plots._scale(np.full((2, 2), np.nan)) == (0, 1, 'neither')
  rare = np.zeros((10, 100))
  rare[3, 5] = 0.01
  assert plots._scale(rare) == (0, 0.01, 'neither')


def test_step_labels_do_not_run_into_each_other(drawn):
  ticks = []
  for steps in ([100, 200, 260], [100, 200, 203]):
    plots.routing_heatmap(history(2, steps), 'max_vio', 'x.png', 'a run')
    ticks.append(list(drawn[-1].axes[0].get_xticks()))
  assert ticks[0] == [100, 200, 260]
  assert 203 not in ticks[1]


def test_figures_that_are_not_per_layer_are_refused(tmp_path):
  with pytest.raises(ValueError, match='one number per layer'):
    plots.routing_heatmap(history(2, [1, 2]), 'load', tmp_path / 'x.png', 'a run')
  with pytest.raises(KeyError, match='max_violation'):
    plots.routing_heatmap(history(2, [1, 2]), 'max_violation', tmp_path / 'x.png', 'a run')


@pytest.mark.parametrize('devices', [1, 2, 8, 32])
def test_tokens_sent_of_any_size(tmp_path, devices):
  matrix = np.random.default_rng(0).integers(0, 10**6, size=(devices, devices))
  plots.tokens_sent(matrix, tmp_path / 'sent.png', 'a run with a rather long title for its width')
  width, height = png_size(tmp_path / 'sent.png')
  assert 500 < width < 2500 and 500 < height < 2500


def test_tokens_sent_writes_every_cell_and_colours_only_traffic(drawn):
  plots.tokens_sent(np.array([[900, 10], [2_000_000, 700]]), 'x.png', 'a run')
  axes = drawn[0].axes[0]
  cells = {t.get_position(): t.get_text() for t in axes.texts}  # (to, from)
  assert cells == {(0, 0): '900', (1, 0): '10', (0, 1): '2.00M', (1, 1): '700'}
  (image,) = axes.images
  np.testing.assert_array_equal(np.ma.getmaskarray(image.get_array()), np.eye(2, dtype=bool))
  assert image.get_clim() == (0, 2_000_000)
  plots.tokens_sent(np.ones((17, 17)), 'x.png', 'a run')
  assert not drawn[1].axes[0].texts


def test_tokens_sent_without_traffic_and_of_wrong_shape(tmp_path):
  plots.tokens_sent(np.zeros((4, 4)), tmp_path / 'sent.png', 'no tokens')
  png_size(tmp_path / 'sent.png')
  for shape in ((2, 4, 4), (3, 4), (0, 0)):
    with pytest.raises(ValueError, match='devices, devices'):
      plots.tokens_sent(np.zeros(shape), tmp_path / 'sent.png', 'wrong')


@pytest.mark.parametrize(
  'count, text', [(0, '0'), (950, '950'), (1234, '1.23k'), (56_789, '56.8k'), (4.2e9, '4.20G')]
)
def test_short_counts(count, text):
  assert plots._short(count) == text
