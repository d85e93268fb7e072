import jax.numpy as jnp
import numpy as np

from tests import tiny
from tests.models.dispatch import operands


def test_capacity_needs_no_more_slots_than_the_fullest_expert_has_tokens():
  idx = operands.choose_few()
  slots = int(np.bincount(idx.ravel(), minlength=operands.E)[: operands.E].max())
  assert slots < operands.T
  args = (*operands.operands(k=operands.E), jnp.array(idx))
  got = operands.run('capacity', slots=slots)(*args)
  operands.assert_equal_results(got, operands.run('dense')(*args), **operands.CLOSE)


def test_capacity_fills_its_slots_in_token_order():
  # Two slots: of the tokens 0, 1, 2, ... that chose expert 3 first and 1 second, 0 and 1 fit.
  args = operands.operands()
  idx = operands.CASES['all tokens on the same']
  fitting = np.where(np.arange(operands.T)[:, None] < 2, idx, operands.E)
  got = operands.run('capacity', slots=2)(*args, jnp.array(idx))
  operands.assert_equal_results(
    got, operands.run('dense')(*args, jnp.array(fitting)), **operands.CLOSE
  )


def test_capacity_holds_no_row_per_token_and_column():
  """Its cost is that of the slots: nothing of [T, K, anything] or [T * K, anything], K = E."""
  t, slots = 21, 6
  args = (*operands.operands(t, operands.E), jnp.array(operands.choose_few()))
  traced = operands.run('capacity', slots=slots).trace(*args)
  shapes = {
    v.aval.shape
    for eqn in tiny.equations(traced.jaxpr.jaxpr)
    for v in eqn.outvars
    if jnp.issubdtype(v.aval.dtype, jnp.floating)
  }
  assert (operands.E, slots, operands.D) in shapes and (operands.E, slots, 2, operands.F) in shapes
  assert not [s for s in shapes if (len(s) > 2 and t in s) or (len(s) > 1 and t * operands.E in s)]
