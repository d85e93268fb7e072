import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import errors
from moe_jax.inference import sampling as sampling_lib


def test_draws_follow_the_models_distribution():
  """Frequencies of many draws against the softmax: `_draw` alone, without a model."""
  probs = jnp.array([0.5, 0.3, 0.2])
  keys = sampling_lib.row_keys(np.uint32(0), 4000, 0)
  logits = jnp.broadcast_to(jnp.log(probs), (4000, 3))
  draws = sampling_lib.draw(logits, sampling_lib.Sampling(), keys)
  # Standard error of a share is at most sqrt(.25 / 4000) = .008
  np.testing.assert_allclose(np.bincount(draws) / 4000, probs, atol=0.03)


LOGITS = jnp.log(jnp.array([[0.1, 0.4, 0.15, 0.35], [0.7, 0.1, 0.1, 0.1]]))


def kept(**sampling):
  """Which tokens keep a finite logit."""
  return np.isfinite(sampling_lib.filter_logits(LOGITS, sampling_lib.Sampling(**sampling))).tolist()


def test_no_filter_keeps_the_logits():
  np.testing.assert_array_equal(sampling_lib.filter_logits(LOGITS, sampling_lib.Sampling()), LOGITS)


def test_temperature_divides():
  got = sampling_lib.filter_logits(LOGITS, sampling_lib.Sampling(temperature=0.5))
  np.testing.assert_allclose(got, 2 * LOGITS, rtol=1e-6)


def test_top_k():
  first, _ = kept(top_k=2)
  assert first == [False, True, False, True]
  assert kept(top_k=1) == [[False, True, False, False], [True, False, False, False]]
  assert kept(top_k=4) == kept(top_k=99) == kept() == [[True] * 4] * 2


def test_top_p_keeps_the_fewest_that_reach_it():
  # Sorted .4, .35, .15, .1 add up to .4, .75, .9, 1; the second row is .7 and then ties.
  assert kept(top_p=0.39) == [[False, True, False, False], [True, False, False, False]]
  assert kept(top_p=0.41) == [[False, True, False, True], [True, False, False, False]]
  assert kept(top_p=0.76)[0] == [False, True, True, True]
  assert kept(top_p=0.91)[0] == [True] * 4
  assert kept(top_p=1e-6) == kept(top_k=1)


def test_top_p_works_on_what_top_k_and_temperature_leave():
  # top_k = 2 leaves .4, .35: of .75 the first is .53, which reaches .5.
  assert kept(top_k=2, top_p=0.5)[0] == [False, True, False, False]
  assert kept(top_p=0.5)[0] == [False, True, False, True]
  # Temperature 1/8: .4^8 / (.4^8 + .35^8 + ...) = .74
  assert kept(temperature=0.125, top_p=0.7)[0] == [False, True, False, False]


def test_temperature_0_ignores_the_filters_and_the_key():
  sampling = sampling_lib.Sampling(temperature=0.0, top_p=0.1)
  np.testing.assert_array_equal(sampling_lib.draw(LOGITS, sampling, None), [1, 0])


@pytest.mark.parametrize(
  'field, value, rule',
  [
    ('temperature', -0.1, '0, which takes the most likely'),
    ('temperature', 1e-38, '0, which takes the most likely'),  # logits over it would be infinite
    ('temperature', float('inf'), '0, which takes the most likely'),
    ('temperature', float('nan'), '0, which takes the most likely'),
    ('top_k', -1, 'at least 0'),
    ('top_p', 0.0, 'above 0 and at most 1'),
    ('top_p', 1.5, 'above 0 and at most 1'),
    ('seed', -1, 'at least 0'),
    ('min_p', 1.0, 'at least 0 and below 1'),
    ('min_p', -0.1, 'at least 0 and below 1'),
    ('repetition_penalty', 0.9, 'at least 1'),
  ],
)
def test_sampling_out_of_range(field, value, rule):
  with pytest.raises(errors.InputError, match=rf'--{field}={value} must be {rule}'):
    sampling_lib.Sampling(**{field: value})


def test_min_p_is_relative_to_the_likeliest():
  # .4 is the likeliest: 0.3 * .4 = .12 leaves .1 out; 0.9 * .4 = .36 leaves .35 out too.
  assert kept(min_p=0.3)[0] == [False, True, True, True]
  assert kept(min_p=0.9)[0] == [False, True, False, False]
  assert kept(min_p=0.1) == [[True] * 4] * 2
  # On the tempered distribution: temperature 1/2 squares, .15^2 / .4^2 = .14
  assert kept(temperature=0.5, min_p=0.15)[0] == [False, True, False, True]


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
  logits = jnp.array([[2.0, -2.0, 3.0, -3.0]])
  seen = jnp.array([[True, True, False, False]])
  np.testing.assert_allclose(sampling_lib.penalise(logits, seen, 2.0), [[1.0, -4.0, 3.0, -3.0]])


def test_a_row_s_key_depends_on_seed_row_and_number_only():
  def data(*args):
    return np.asarray(jax.random.key_data(sampling_lib.row_keys(*args)))

  few, many = data(np.uint32(3), 2, 5), data(np.uint32(3), 7, 5)
  np.testing.assert_array_equal(few, many[:2])
  assert len({key.tobytes() for key in many}) == 7
  assert not np.array_equal(few, data(np.uint32(4), 2, 5))
  assert not np.array_equal(few, data(np.uint32(3), 2, 6))
  np.testing.assert_array_equal(data(np.uint32(3), 2, np.array([5, 5])), few)


def test_any_of_the_end_tokens_ends_a_text():
  found = [sampling_lib.ends(jnp.array([1, 2, 3, 1]), ids).tolist() for ids in ((1, 3), [2], ())]
  assert found == [[True, False, True, True], [False, True, False, False], [False] * 4]
