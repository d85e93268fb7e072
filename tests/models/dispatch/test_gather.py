import jax
import jax.numpy as jnp
import pytest

from moe_jax.models.dispatch import gather as gather_lib
from tests import tiny
from tests.models.dispatch import operands


# 5 tokens are the most whose choices count as few.
@pytest.mark.parametrize('t', [1, 5, 6, operands.T])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_kernels_laid_out_for_decoding_equal_dense(t, dtype):
  """Few choices (T K <= 2 E) and many; an unrouted token holds a NaN, which reaches nobody."""
  x, gates, gate_up, down, _ = operands.operands(t=t, dtype=dtype)
  idx = operands.choose(t=t)
  if t > 1:
    idx[0, 1] = idx[-1] = operands.E
    x = x.at[-1].set(jnp.nan)
  laid_out = gather_lib.lay_out(gate_up, down)
  got = tiny.jit(gather_lib.apply)(x, gates, jnp.array(idx), laid_out)
  assert got.dtype == dtype
  wide = [a.astype(jnp.float32) for a in (x, gates, gate_up, down)]
  want = operands.run('dense')(*wide, jnp.zeros((t, operands.D)), jnp.array(idx))[0]
  # 8 bits of mantissa in the activations and in the result.
  tolerance = operands.CLOSE if dtype == jnp.float32 else dict(rtol=0.03, atol=0.03)
  operands.assert_equal_results((got.astype(jnp.float32),), (want,), **tolerance)


def test_few_choices_copy_no_weights():
  """The program needs less memory than the weights of a single expert have."""

  def of(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)

  laid_out = gather_lib.Kernels(of(16, 2, 128, 256), of(16, 256, 128))
  args = (of(2, 256), of(2, 3), jax.ShapeDtypeStruct((2, 3), jnp.int32), laid_out)
  memory = jax.jit(gather_lib.apply).lower(*args).compile().memory_analysis()
  expert = sum(4 * a.size // 16 for a in laid_out)
  assert memory.temp_size_in_bytes < expert
