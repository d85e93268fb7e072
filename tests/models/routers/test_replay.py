import numpy as np

from moe_jax.models.routers import ROUTERS, routing
from tests.models.routers import routes


def test_replay_reads_its_rows():
  cfg = routes.make(router='replay', options__replay_path='x', options__replay_rows=2)
  # Two recorded rows of 4 places; choice 4 is nowhere.
  recorded = np.array(
    [[[0, 1], [3, 4], [2, 1], [0, 3]], [[1, 2], [4, 4], [3, 0], [0, 1]]], np.int32
  )
  tokens = routes.tokens_of(3, 3, row=[1, 2, 5], mask=[[1, 1, 1], [1, 1, 0], [1, 1, 1]])
  got = routes.route(
    cfg, np.tile(routes.LOGITS, (3, 1, 1)), tokens, state={'assignments': recorded}
  )
  # Rows 1 and 5 read row 1, row 2 reads row 0; places 0 to 2.
  np.testing.assert_array_equal(got.expert_idx[0], recorded[1, :3])
  np.testing.assert_array_equal(got.expert_idx[1], [[0, 1], [3, 4], [4, 4]])
  np.testing.assert_array_equal(got.expert_idx[2], recorded[1, :3])
  # Gates are today's scores: token 0 experts 1 and 2, token 1 none, token 2 experts 3 and 0.
  np.testing.assert_allclose(got.gates[0], [[0.3, 0.2], [0, 0], [0.25, 0.125]], **routes.EXACT)


def test_replay_starts_nowhere():
  cfg = routes.make(router='replay', options__replay_path='x', options__replay_rows=2)
  state = ROUTERS['replay'].init_state(cfg, routing.Sizes(32, 5), None)
  np.testing.assert_array_equal(state['assignments'], np.full((2, 5, 2), 4))
