import jax.numpy as jnp
import numpy as np

from tests.models.dispatch import operands


def test_dense_is_the_formula():
  x, gates, gate_up, down, cotangent = operands.operands()
  idx = operands.CASES['padded tokens']
  got = operands.run('dense')(x, gates, gate_up, down, cotangent, jnp.array(idx))[0]
  x, gates, gate_up, down = (np.asarray(a, np.float64) for a in (x, gates, gate_up, down))
  want = np.zeros((operands.T, operands.D))
  for t in range(operands.T):
    for gate, expert in zip(gates[t], idx[t]):
      if expert < operands.E:
        a, b = x[t] @ gate_up[expert, :, 0], x[t] @ gate_up[expert, :, 1]
        want[t] += gate * (a / (1 + np.exp(-a)) * b) @ down[expert]
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
