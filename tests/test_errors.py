from moe_jax import errors


def test_did_you_mean_names_the_nearest_known_word():
  known = ['peak_lr', 'eps', 'schedule']
  assert errors.did_you_mean('peak_lrr', known) == "; did you mean 'peak_lr'?"
  assert errors.did_you_mean('qqqqqq', known) == ''
