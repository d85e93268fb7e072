import numpy as np
import pytest

from tests.models.routers import routes


@pytest.mark.parametrize('skew', [0.0, 0.3, 1.0])
def test_skewed_gives_expert_0_its_share(skew):
  cfg = routes.make(5, 3, router='skewed', options__skew=skew)
  idx = np.asarray(routes.route(cfg, np.zeros((40, 100, 5))).expert_idx).reshape(-1, 3)
  share = (idx[:, 0] == 0).mean()
  assert share == skew if skew in (0, 1) else abs(share - skew) < 4 * np.sqrt(0.3 * 0.7 / 4000)
  assert (idx[:, 1:] > 0).all()  # nobody else goes there
  assert all(len(set(token)) == 3 for token in idx.tolist())
  load = np.bincount(idx.ravel(), minlength=5)[1:]
  assert load.max() - load.min() < 0.05 * load.mean()  # the others are dealt evenly
