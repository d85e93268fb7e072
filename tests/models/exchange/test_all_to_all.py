import jax.numpy as jnp
import numpy as np

from tests.models.exchange import operands


def reached(idx, limited):
  """[T, P] bool by hand: the copies that fit, `limited` copies from each device to each other."""
  wanted = (np.asarray(idx)[..., None] // (operands.E // operands.P) == np.arange(operands.P)).any(
    1
  )
  sent = np.zeros_like(wanted)
  for device in range(operands.P):
    part = slice(device * operands.T, (device + 1) * operands.T)
    sent[part] = wanted[part] & (np.cumsum(wanted[part], 0) <= limited)
  return sent


def test_what_does_not_fit_is_counted_and_left_out():
  """A factor of 1 gives each pair T S / P = 6 * 3 / 4 rows, rounded up to 5."""
  idx, *rest = operands.choices('one device'), *operands.operands()
  *got, lost = operands.run('all_to_all', factor=1.0)(idx, *rest)
  sent = reached(idx, 5)
  assert (~sent[:, 1]).sum() == operands.P  # the last token of each device
  left = jnp.where(jnp.asarray(sent[:, 1:2]), idx, operands.E)
  for a, b in zip(got, operands.reference(left, *rest)):
    np.testing.assert_allclose(a, b, **operands.CLOSE)
  np.testing.assert_array_equal(lost, [2] * operands.P)  # two choices each


def test_the_receiver_counts_what_it_has_no_room_for():
  idx, *rest = operands.choices('one device'), *operands.operands()
  *got, lost = operands.run('all_gather', room=30)(idx, *rest)
  # Sorted by expert: all 24 tokens of expert 2, the first 6 of expert 3.
  left = idx.at[6:, 1].set(operands.E)
  for a, b in zip(got, operands.reference(left, *rest)):
    np.testing.assert_allclose(a, b, **operands.CLOSE)
  np.testing.assert_array_equal(lost, [0, 18, 0, 0])
