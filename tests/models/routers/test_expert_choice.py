import numpy as np
import pytest

from moe_jax import errors
from moe_jax.models.routers import routing
from tests.models.routers import routes

# Expert choice. Two experts; the scores of expert 0 are written, expert 1 has the rest to 1.


def two_experts(first):
  first = np.asarray(first, np.float32)
  return np.log(np.stack([first, 1 - first], axis=-1))


def taken(cfg, first, **tokens):
  """Which experts take each token: list of rows of strings such as '01'; '' for none."""
  logits = two_experts(first)
  idx = np.asarray(
    routes.route(cfg, logits, routes.tokens_of(*logits.shape[:2], **tokens)).expert_idx
  )
  return [[''.join(str(i) for i in token if i < 2) for token in row] for row in idx.tolist()]


def ec(k=1, **options):
  return routes.make(
    2, k, router='expert_choice', **{f'options__{n}': v for n, v in options.items()}
  )


def test_every_expert_takes_its_best_tokens():
  # floor(K n / E) = floor(1 * 4 / 2) = 2 each. Expert 0: .9 and .8. Expert 1: .6 (.4) and .3 (.7).
  assert taken(ec(), [[0.9, 0.8, 0.7, 0.4]]) == [['0', '0', '1', '1']]
  logits = two_experts([[0.9, 0.55, 0.56, 0.54]])
  got = routes.route(ec(), logits)
  # Expert 0: tokens 0 and 2; expert 1: tokens 3 (.46) and 1 (.45).
  np.testing.assert_array_equal(got.expert_idx[0], [[0, 2], [1, 2], [0, 2], [1, 2]])
  np.testing.assert_allclose(
    got.gates[0], [[0.9, 0], [0.45, 0], [0.56, 0], [0.46, 0]], **routes.EXACT
  )


def test_each_of_four_experts_takes_k_n_over_e_tokens():
  logits = np.random.default_rng(0).normal(size=(1, 8, 4)).astype(np.float32)
  got = routes.route(routes.make(4, 2, router='expert_choice'), logits).expert_idx
  assert np.bincount(np.ravel(got), minlength=4)[:4].tolist() == [4] * 4  # 2 * 8 / 4


def test_a_token_is_taken_by_both_best_first_or_by_none():
  # Three tokens: floor(3 / 2) = 1 each.
  logits = np.array([[[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]]])
  sigmoid = routes.make(2, 1, router='expert_choice', score_func='sigmoid')
  np.testing.assert_array_equal(
    routes.route(sigmoid, logits).expert_idx[0], [[0, 2], [1, 2], [2, 2]]
  )
  both = routes.route(sigmoid, np.array([[[2.0, 2.5], [0.0, 1.0], [1.0, 1.0]]]))
  np.testing.assert_array_equal(both.expert_idx[0], [[1, 0], [2, 2], [2, 2]])


def test_padding_is_not_taken_and_does_not_count():
  # Three real tokens: floor(3 / 2) = 1 each, although padding has the best scores.
  mask = [[1, 1, 1, 0, 0]]
  assert taken(ec(), [[0.6, 0.8, 0.3, 0.99, 0.01]], mask=mask) == [['', '0', '1', '', '']]
  # One token: floor(1 / 2) = 0, but at least 1. None: none.
  assert taken(ec(), [[0.6, 0.8, 0.9]], mask=[[1, 0, 0]]) == [['01', '', '']]
  assert taken(ec(), [[0.6, 0.8, 0.9]], mask=[[0, 0, 0]]) == [['', '', '']]


def test_chunks_compete_by_themselves():
  first = [[0.9, 0.8, 0.7, 0.4], [0.3, 0.2, 0.25, 0.1]]
  # Rows: 2 each. Row 1: expert 0 takes .3 and .25, expert 1 takes .2 and .1.
  assert taken(ec(), first) == [['0', '0', '1', '1'], ['0', '1', '0', '1']]
  # Half rows, 1 each: the better of two.
  assert taken(ec(chunk_tokens=2), first) == [['0', '1', '0', '1'], ['0', '1', '0', '1']]
  # Both rows, 4 each: expert 0 takes all of row 0.
  assert taken(ec(chunk_tokens=8), first) == [['0', '0', '0', '0'], ['1', '1', '1', '1']]
  # One token each: floor(1 / 2), at least 1: all of them twice.
  assert taken(ec(chunk_tokens=1), [[0.9, 0.2]]) == [['01', '10']]


def test_chunks_that_do_not_fit_are_refused_by_name():
  # 16 divides the 8 rows x 16 of the config's batch, but not what an evaluation may hand in.
  with pytest.raises(errors.InputError, match=r'chunk_tokens=16 must divide .* 2 rows x 4; choose'):
    taken(ec(chunk_tokens=16), np.full((2, 4), 0.5))


def test_shuffled_chunks_are_dealt_by_the_noise():
  cfg = ec(chunk_tokens=4, shuffle_chunks=True)
  first = np.random.default_rng(0).uniform(0.05, 0.95, size=(4, 6))
  seen = []
  for seed in range(3):
    tokens = routes.tokens_of(4, 6, seed=seed)
    got = np.asarray(routes.route(cfg, two_experts(first), tokens, layer=1).expert_idx).reshape(
      24, 2
    )
    deal = np.argsort(np.asarray(routing.token_noise(tokens, np.int32(1), salt=3)).ravel())
    want = np.full(24, -1)
    for chunk in deal.reshape(6, 4):
      best = chunk[np.argsort(-first.ravel()[chunk])]
      want[best[:2]], want[best[2:]] = 0, 1  # floor(4 / 2) each
    np.testing.assert_array_equal(got[:, 0], want)
    seen.append(got[:, 0])
  assert (seen[0] != seen[1]).any() and (seen[1] != seen[2]).any()
