"""The one-pass kernel for latent attention, interpreted, against the plain form."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.devices import hardware
from moe_jax.models.attention import latent as latent_lib
from moe_jax.models.attention.kernels import latent_decode

CLOSE = {'float32': dict(rtol=1e-4, atol=1e-5), 'bfloat16': dict(rtol=2e-2, atol=2e-2)}


def operands(rows, heads, width, rope, slots, dtype='float32'):
  keys = jax.random.split(jax.random.key(0), 4)
  shapes = (rows, heads, width), (rows, heads, rope), (rows, slots, width), (rows, slots, rope)
  return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes)]


@pytest.mark.parametrize(
  'heads, width, rope, slots, splits, dtype',
  [
    (5, 32, 16, 200, 1, 'float32'),  # heads that do not fill a product, slots that fill no block
    (16, 64, 16, 700, 3, 'float32'),
    (40, 32, 16, 130, 2, 'bfloat16'),  # two groups of heads
    (16, 32, 16, 64, 4, 'float32'),  # splits behind the last slot
  ],
)
def test_kernel_equals_the_plain_form(heads, width, rope, slots, splits, dtype):
  # The first slot only, the last of a block, the first of the next, somewhere, all.
  positions = jnp.array([0, 63, min(64, slots - 1), slots // 2, slots - 1], jnp.int32)
  args = operands(len(positions), heads, width, rope, slots, dtype)
  # What lies behind a row's position must not be looked at.
  behind = jnp.arange(slots) > positions[:, None]
  args[2:] = [jnp.where(behind[..., None], jnp.nan, a) for a in args[2:]]
  got = latent_decode.attend(*args, positions, 0.2, splits=splits, interpret=True)
  args[2:] = [jnp.where(behind[..., None], 0, a) for a in args[2:]]
  want = latent_decode.reference(*args, positions, 0.2)
  assert got.dtype == want.dtype == jnp.dtype(dtype)

  def as_float(a):
    return np.asarray(a, np.float64)

  np.testing.assert_allclose(as_float(got), as_float(want), **CLOSE[dtype])


def test_the_number_of_splits_fills_the_device_with_work_for_each():
  assert latent_decode.num_splits(64, 8192) == 5  # 64 x 5 programs or more
  assert latent_decode.num_splits(1, 8192) == 32  # of four blocks of 64 slots
  assert latent_decode.num_splits(1, 100) == 1
  assert latent_decode.num_splits(10_000, 8192) == 1


def test_widths_and_dtypes_that_the_kernel_takes():
  assert latent_decode.suits(512, 64, jnp.bfloat16)
  for wrong in ((500, 64, jnp.bfloat16), (512, 8, jnp.bfloat16), (512, 64, jnp.float32)):
    assert not latent_decode.suits(*wrong)


def test_one_token_on_a_gpu_is_left_to_the_kernel(monkeypatch):
  """As `latent.absorbed` calls it: the same values, and 'reference' does not."""
  rows, heads, nope, value, slots = 3, 4, 8, 6, 70
  q_nope, q_rope = operands(rows, heads, nope, 16, 1)[:2]
  latent, rope_key = operands(rows, heads, 32, 16, slots)[2:]
  positions = jnp.array([[0], [5], [69]], jnp.int32)

  def random(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)

  up = latent_lib.Absorbed(random(8, heads, nope, 32), random(9, heads, 32, value))
  q = latent_lib.Queries(q_nope[:, None], q_rope[:, None])
  cache = latent_lib.LatentCache(latent, rope_key)

  def settings(impl):
    return types.SimpleNamespace(softmax_scale=0.3, impl=impl)

  calls = []
  attend = latent_decode.attend

  def interpreted(*args):
    calls.append(args)
    return attend(*args, interpret=True)

  want = latent_lib.absorbed(q, cache, up, positions, settings('auto'))
  monkeypatch.setattr(latent_decode, 'attend', interpreted)
  monkeypatch.setattr(latent_decode, 'suits', lambda *args: True)  # float32 serves this test
  monkeypatch.setattr(hardware, 'platform', lambda: 'gpu')
  got = latent_lib.absorbed(q, cache, up, positions, settings('auto'))
  assert len(calls) == 1
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
  latent_lib.absorbed(q, cache, up, positions, settings('reference'))
  two = jnp.concatenate([positions, positions], axis=1)
  longer = jax.tree.map(lambda a: jnp.concatenate([a, a], axis=1), q)
  latent_lib.absorbed(longer, cache, up, two, settings('auto'))
  assert len(calls) == 1
