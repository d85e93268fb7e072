import struct

import numpy as np
import pytest

from moe_jax import plots


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
