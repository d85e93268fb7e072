"""The MoE layer against its formula, token by token, in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moe_jax.models import moe

B, L, D = 2, 6, 16
MASK = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], bool)
X = np.random.default_rng(0).normal(size=(B, L, D)).astype(np.float32)


def layer(**overrides):
  cfg = tiny.make(**{f'model__moe__{k}': v for k, v in overrides.items()})
  module = moe.MoE(cfg.model.moe, 0.02, jnp.float32, jnp.float32)
  stacked = tiny.params(cfg.model)['moe_layers']['moe']
  return cfg.model.moe, module, jax.tree.map(lambda leaf: leaf[0], stacked)


def swiglu(x, gate_up, down):
  gate, up = x @ gate_up[:, 0], x @ gate_up[:, 1]
  return (gate / (1 + np.exp(-gate)) * up) @ down


def formula(cfg, params):
  """(output [B, L, D], load [E], load-balance loss) of the real tokens."""
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  out, load, loss = np.zeros((B, L, D)), np.zeros(cfg.num_experts, int), 0.0
  for b in range(B):
    tokens = np.flatnonzero(MASK[b])
    chosen, mean = np.zeros(cfg.num_experts), np.zeros(cfg.num_experts)
    for t in tokens:
      logits = X[b, t] @ p['router']
      scores = np.exp(logits - logits.max())
      scores /= scores.sum()
      kept = np.argsort(-scores)[: cfg.num_experts_per_tok]
      for i in kept:
        out[b, t] += scores[i] * swiglu(X[b, t], p['gate_up'][i], p['down'][i])
      if cfg.num_shared_experts:
        out[b, t] += swiglu(X[b, t], p['shared']['gate_up'], p['shared']['down'])
      chosen[kept] += 1
      mean += scores / len(tokens)
    load += chosen.astype(int)
    frequency = cfg.num_experts / (cfg.num_experts_per_tok * len(tokens)) * chosen
    loss += len(tokens) * (frequency * mean).sum()
  return out, load, loss


@pytest.mark.parametrize(
  'overrides',
  [
    {'num_shared_experts': 0, 'num_experts_per_tok': 1, 'dispatch': 'dense'},
    {'num_shared_experts': 2, 'num_experts_per_tok': 3},
  ],
)
def test_layer_is_the_formula(overrides):
  cfg, module, params = layer(**overrides)
  out, stats = tiny.jit(module.apply)({'params': params}, X, MASK)
  want, load, loss = formula(cfg, params)
  np.testing.assert_allclose(np.asarray(out)[MASK], want[MASK], rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(stats.load, load)
  assert stats.load.dtype == jnp.int32
  assert stats.load.sum() == MASK.sum() * cfg.num_experts_per_tok
  np.testing.assert_allclose(stats.load_balance_loss, loss, rtol=1e-5)


def test_shared_experts_are_one_ffn_of_their_joint_width():
  cfg, _, params = layer(num_shared_experts=3)
  assert params['shared']['down'].shape == (3 * cfg.moe_mlp_dim, D)
  assert 'shared' not in layer(num_shared_experts=0)[2]


def test_padding_changes_no_figure_and_takes_no_gradient():
  _, module, params = layer()

  def fn(x):
    out, stats = module.apply({'params': params}, x, MASK)
    return jnp.where(MASK[..., None], out, 0).sum() + stats.load_balance_loss, stats

  run = tiny.jit(jax.value_and_grad(fn, has_aux=True))
  (value, stats), grad = run(X)
  other = np.where(MASK[..., None], X, 7.0).astype(np.float32)
  (value2, stats2), grad2 = run(other)
  assert value == value2
  jax.tree.map(np.testing.assert_array_equal, stats, stats2)
  np.testing.assert_array_equal(np.asarray(grad)[MASK], np.asarray(grad2)[MASK])
  assert not np.asarray(grad)[~MASK].any()
