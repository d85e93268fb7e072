import functools

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.models.routers import gshard, routing
from tests import tiny
from tests.models.routers import routes

# GShard's second expert.


@functools.partial(tiny.jit, static_argnums=0)
def kept_second(cfg, gates, seed):
  decision = routing.Routing(gates, jnp.zeros(gates.shape, jnp.int32), None)
  tokens = routes.tokens_of(*gates.shape[:2])._replace(seed=seed)
  return gshard.keeps_second(cfg, decision, tokens, jnp.int32(0))


@pytest.mark.parametrize('factor', [1.0, 2.5])
def test_second_expert_is_kept_with_probability_twice_its_gate(factor):
  n = 10_000  # per gate
  second = np.array([0.0, 0.1, 0.25, 0.4, 0.5, 0.7], np.float32)
  gates = np.stack([1 - second, second], axis=-1)[:, None].repeat(n, 1) * np.float32(factor)
  kept = np.asarray(kept_second(routes.make(routed_scaling_factor=factor), gates, np.uint32(0)))
  assert kept[..., 0].all()
  share, want = kept[..., 1].mean(1), np.minimum(1, 2 * second)
  # Binomial: four standard deviations; exactly 0 and 1 at the ends.
  assert (np.abs(share - want) <= 4 * np.sqrt(want * (1 - want) / n)).all()
  again = np.asarray(kept_second(routes.make(routed_scaling_factor=factor), gates, np.uint32(1)))
  # Drawn anew each step: on average 2 p (1 - p) = (.32 + .5 + .32) / 6 = .19 differ.
  assert (again != kept)[..., 1].mean() == pytest.approx(0.19, abs=0.01)
