import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tests.models.dispatch import operands


@pytest.mark.parametrize('t, k, e', [(200, 1, 3), (1, 1, 1)])
def test_dropless_equals_dense_for_other_shapes(t, k, e):
  idx = jnp.array(
    operands.padded(operands.choose(t, k, range(e)), every=7, e=e)
    if t > 1
    else operands.choose(t, k, range(e))
  )
  args = (*operands.operands(t, k, e), idx)
  operands.assert_equal_results(
    operands.run('dropless')(*args), operands.run('dense')(*args), **operands.CLOSE
  )


def test_all_tokens_on_one_expert_over_several_blocks():
  args = (*operands.operands(200, 1, 3), jnp.ones((200, 1), jnp.int32))
  got = operands.run('dropless')(*args)
  operands.assert_equal_results(got, operands.run('dense')(*args), **operands.CLOSE)
  for weight in got[3:]:
    assert not np.asarray(weight)[[0, 2]].any()  # unused experts: exactly 0


def float_scatters(fn, *args):
  """Scatters of more than one row of floats; XLA for CPU expands them all, so HLO hides them."""
  found = []
  for eqn in tiny.equations(fn.trace(*args).jaxpr.jaxpr):
    if eqn.primitive.name.startswith('scatter'):
      operand, indices, _ = (v.aval for v in eqn.invars)
      many = np.prod(indices.shape[:-1]) > 1
      if many and jnp.issubdtype(operand.dtype, jnp.floating):
        found.append(eqn)
  return found


@pytest.mark.parametrize('backend', ['ragged_dot', 'tokamax_xla'])
def test_dropless_scatters_no_activation(backend):
  """On accelerators; the loop of `blocks` adds up in the order of experts, always."""
  args = (*operands.operands(), jnp.array(operands.CASES['random']))
  assert not float_scatters(operands.run('dropless', backend), *args)

  # The detector sees what autodiff would make of a gather.
  def gather(x):
    return x[args[-1].reshape(-1)].sum()

  assert float_scatters(jax.jit(jax.grad(gather)), args[0])
