"""Reductions written term by term."""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.devices import unrolled


def test_terms_are_combined_from_the_first_to_the_last():
  # ((7 - 1) - 2) - 3: subtraction shows the order.
  assert unrolled.reduce(jnp.subtract, lambda i: jnp.array([7, 1, 2, 3])[i], 4) == 1


def test_few_terms_pay():
  assert unrolled.pays(16) and not unrolled.pays(17)


def test_it_is_a_chain_and_no_reduction():
  def total(a):
    return unrolled.reduce(jnp.add, lambda i: a[:, i], a.shape[1])

  a = np.arange(12.0).reshape(4, 3)
  np.testing.assert_array_equal(total(a), a.sum(axis=1))
  assert 'reduce_sum' not in str(jax.make_jaxpr(total)(a))
