import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.devices import partitioning
from moe_jax.models.dispatch import DISPATCHES
from moe_jax.models.exchange import ragged
from moe_jax.models.experts import backends, grouped_kernels, grouped_products
from tests.models.exchange import operands


def test_a_ragged_buffer_is_shared_by_the_senders():
  """A factor of 1 leaves T S = 18 rows on device 1: those of devices 0, 1 and 2."""
  idx, *rest = operands.choices('one device'), *operands.operands()
  *got, lost = operands.run('ragged_all_to_all', factor=1.0)(idx, *rest)
  left = jnp.where(jnp.arange(operands.P * operands.T)[:, None] < 18, idx, operands.E)
  for a, b in zip(got, operands.reference(left, *rest)):
    np.testing.assert_allclose(a, b, **operands.CLOSE)
  np.testing.assert_array_equal(lost, [0, 0, 0, 2 * operands.T])


def test_rows_that_no_kernel_writes_do_not_matter(monkeypatch):
  """A grouped kernel leaves anything, here NaN, in the rows behind its last group."""
  clean = grouped_kernels.ragged_dot_products()

  def spoiled(leg):
    def fn(x, w, sizes):
      behind = jnp.arange(len(x))[:, None] >= sizes.sum()
      return jnp.where(behind, jnp.nan, leg(x, w, sizes))

    return fn

  def strict(x, g, sizes):  # multiplies what it must not see, as a masked tile does
    behind = jnp.arange(len(x))[:, None] >= sizes.sum()
    return clean.tgmm(x, g, sizes) + 0 * jnp.where(behind, x.sum() * g.sum(), 0).sum()

  legs = grouped_kernels.Products('spoiled', spoiled(clean.gmm), spoiled(clean.gmm_t), strict)
  monkeypatch.setitem(backends.BACKENDS, 'spoiled', lambda: grouped_products.GroupedExperts(legs))
  idx, *rest = operands.choices('padding'), *operands.operands()
  room = idx.size + 7

  def fn(*args):
    return DISPATCHES['dropless'](*args[:2], idx, *args[2:], 'spoiled', room)

  out, vjp = jax.vjp(fn, *rest[:4])
  for a, b in zip((out, *vjp(rest[4])), operands.reference(idx, *rest)):
    np.testing.assert_allclose(a, b, **operands.CLOSE)


def test_the_emulated_ragged_all_to_all_by_hand():
  """Device i sends i + 1 rows to device 0 and one to device 1, into buffers of 12 rows."""
  operand = jnp.arange(operands.P * 8.0).reshape(operands.P * 8, 1)
  sent = np.array([[i + 1, 1, 0, 0] for i in range(operands.P)], np.int32)
  lands = np.cumsum(sent, axis=0) - sent

  def part(rows, first, size, offset, comes):
    out = jnp.full((12, 1), -1.0)
    args = (a[0] for a in (first, size, offset, comes))
    return ragged.emulated(rows, out, *args, axis_name='expert')

  first = np.cumsum(sent, axis=1) - sent
  with partitioning.activate(operands.MESH()):
    fn = jax.jit(partitioning.per_shard(part, (operands.ROWS,) * 5, operands.ROWS))
    got = np.asarray(fn(operand, first, sent, lands, sent.T)).reshape(operands.P, 12)
  base = np.arange(operands.P) * 8
  want = np.concatenate([base[i] + np.arange(i + 1) for i in range(operands.P)])
  np.testing.assert_array_equal(got[0], [*want, -1, -1])
  np.testing.assert_array_equal(got[1], [*(base + np.arange(operands.P) + 1), *[-1] * 8])
  assert (got[2:] == -1).all()


def test_offsets_of_a_full_buffer_by_hand(monkeypatch):
  """Three devices, room for 3 rows each; this is device 2, whose rows come last."""
  monkeypatch.setattr(jax.lax, 'axis_index', lambda axis: 2)
  count = jnp.array([[1, 2, 0], [3, 1, 2], [1, 4, 1]])  # from, to
  # Device 0 has been filled by (1, 2 of 3), device 1 by (2, 1), device 2 holds (0, 2, 1).
  got = ragged._offsets(count, 3)
  wanted = ([0, 1, 5], [0, 0, 1], [3, 3, 2], [0, 0, 2], [0, 2, 1], [3, 4, 5])
  for array, want in zip(got, wanted, strict=True):
    assert array.tolist() == want
