"""The MoE layer against its formula, token by token, in numpy."""

import ast
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.devices import partitioning
from moe_jax.models import moe_layer
from moe_jax.models.routers import routing
from tests import tiny

B, L, D = 2, 6, 16
MASK = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], bool)
X = np.random.default_rng(0).normal(size=(B, L, D)).astype(np.float32)
# Rows 3 and 4 of a batch: with 4 virtual devices they live on devices 3 and 0.
TOKENS = routing.Tokens(
  ids=np.zeros((B, L), np.int32), mask=MASK, row=np.int32([3, 4]), seed=np.uint32(0)
)


def layer(train=True, **overrides):
  """(MoEConfig, module, its variables)."""
  cfg = tiny.make(**{f'model__moe__{k}': v for k, v in overrides.items()}).model
  sizes = routing.Sizes(cfg.vocab_size, cfg.max_seq_len)
  module = moe_layer.MoE(cfg.moe, sizes, 0.02, jnp.float32, jnp.float32, train)

  def first(tree):
    return jax.tree.map(lambda leaf: leaf[0], tree['moe_layers']['moe'])

  variables = {'params': first(tiny.params(cfg))}
  if tiny.router_state(cfg):
    variables['router_state'] = first(tiny.router_state(cfg))
  return cfg.moe, module, variables


def apply(module, variables, x=X):
  return tiny.jit(lambda v, x: module.apply(v, x, TOKENS, jnp.int32(0), {}))(variables, x)


def swiglu(x, gate_up, down):
  gate, up = x @ gate_up[:, 0], x @ gate_up[:, 1]
  return (gate / (1 + np.exp(-gate)) * up) @ down


def choose(cfg, logits, bias):
  """(scores [E], chosen [K], gates [K], margin) of one token."""
  if cfg.score_func == 'sigmoid':
    scores = 1 / (1 + np.exp(-logits))
  else:
    scores = np.exp(logits - logits.max())
    scores /= scores.sum()
  order = np.argsort(-(scores + bias))
  kept = order[: cfg.num_experts_per_tok]
  gates = scores[kept] / (scores[kept].sum() if cfg.norm_topk_prob else 1)
  ranked = np.sort(scores + bias)[::-1]
  margin = ranked[cfg.num_experts_per_tok - 1] - ranked[cfg.num_experts_per_tok]
  return scores, kept, gates * cfg.routed_scaling_factor, margin


def survivors(cfg, row):
  """Which choices of a row have room: all first ones in token order, then the second ones."""
  if cfg.capacity.policy == 'none':
    return {(t, i) for t, _, kept, _ in row for i in kept}
  assert cfg.capacity.policy == 'position' and cfg.capacity.group_rows == 1
  room = math.ceil(cfg.capacity.factor * cfg.num_experts_per_tok * L / cfg.num_experts)
  load, found = np.zeros(cfg.num_experts, int), set()
  for rank in range(cfg.num_experts_per_tok):
    for t, _, kept, _ in row:
      if load[kept[rank]] < room:
        load[kept[rank]] += 1
        found.add((t, kept[rank]))
  return found


def formula(cfg, variables):
  """(output [B, L, D], figures) of the real tokens."""
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), variables['params'])
  bias = np.asarray(variables.get('router_state', {}).get('expert_bias', 0.0), np.float64)
  e, devices = cfg.num_experts, cfg.num_virtual_devices
  out, load, dropped = np.zeros((B, L, D)), np.zeros(e, int), np.zeros(e, int)
  sent, margin, loss = np.zeros((devices, devices), int), 0.0, 0.0
  for b in range(B):
    tokens = np.flatnonzero(MASK[b])
    choices = [choose(cfg, X[b, t] @ p['router'], bias) for t in tokens]
    row = [(t, *choice[:3]) for t, choice in zip(tokens, choices)]
    found = survivors(cfg, row)
    chosen = np.zeros(e)
    for t, scores, kept, gates in row:
      for i, gate in zip(kept, gates):
        chosen[i] += 1
        if (t, i) in found:
          out[b, t] += gate * swiglu(X[b, t], p['gate_up'][i], p['down'][i])
        else:
          dropped[i] += 1
      if cfg.num_shared_experts:
        out[b, t] += swiglu(X[b, t], p['shared']['gate_up'], p['shared']['down'])
      for device in {i * devices // e for i in kept if (t, i) in found}:
        sent[TOKENS.row[b] % devices, device] += 1
      loss += scores @ _frequency(cfg, row)
    load += chosen.astype(int)
    margin += sum(choice[3] for choice in choices)
  return out, dict(load=load, dropped=dropped, sent=sent, margin=margin, loss=loss)


def _frequency(cfg, row):
  """E / (K T) times the tokens of a row that chose each expert."""
  chosen = np.bincount(np.concatenate([kept for _, _, kept, _ in row]), minlength=cfg.num_experts)
  return cfg.num_experts / (cfg.num_experts_per_tok * len(row)) * chosen


@pytest.mark.parametrize(
  'overrides',
  [
    {'num_shared_experts': 0, 'num_experts_per_tok': 1, 'dispatch': 'dense'},
    {'num_shared_experts': 2, 'num_experts_per_tok': 3, 'num_virtual_devices': 4},
    {
      'norm_topk_prob': True,
      'routed_scaling_factor': 2.5,
      'score_func': 'sigmoid',
      'expert_bias__update_rule': 'sign',
      'num_virtual_devices': 4,
    },
    {
      # C = ceil(.8 * 2 * 6 / 8) = 2 of a row; gates are those of before the drop.
      'norm_topk_prob': True,
      'capacity__policy': 'position',
      'capacity__factor': 0.8,
      'dispatch': 'capacity',
      'num_virtual_devices': 4,
    },
  ],
  ids=['top1_without_shared', 'top3', 'v3', 'capacity'],
)
def test_layer_is_the_formula(overrides):
  cfg, module, variables = layer(**overrides)
  out, stats = apply(module, variables)
  want, figures = formula(cfg, variables)
  np.testing.assert_allclose(np.asarray(out)[MASK], want[MASK], rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(stats.sums.load, figures['load'])
  np.testing.assert_array_equal(stats.dropped, figures['dropped'])
  np.testing.assert_array_equal(stats.tokens_sent, figures['sent'])
  for counts in (stats.sums.load, stats.dropped, stats.tokens_sent):
    assert counts.dtype == jnp.int32
  np.testing.assert_allclose(stats.margin, figures['margin'], rtol=1e-4)
  np.testing.assert_allclose(stats.losses['expert_level'], figures['loss'], rtol=1e-5)
  assert stats.sums.load.sum() == MASK.sum() * cfg.num_experts_per_tok
  assert (figures['dropped'].sum() > 0) == (cfg.capacity.policy != 'none')


def test_bias_of_that_case_changes_the_choice():
  """Or the test above could not tell whether it is read."""
  cfg, _, variables = layer(score_func='sigmoid', expert_bias__update_rule='sign')
  without = formula(cfg, {'params': variables['params']})[1]['load']
  assert (formula(cfg, variables)[1]['load'] != without).any()


def test_shared_experts_are_one_ffn_of_their_joint_width():
  cfg, _, variables = layer(num_shared_experts=3)
  assert variables['params']['shared']['down'].shape == (3 * cfg.moe_mlp_dim, D)
  assert 'shared' not in layer(num_shared_experts=0)[2]['params']


def test_a_router_without_logits_has_no_weights():
  assert 'router' not in layer(router='hash')[2]['params']
  assert layer()[2]['params']['router'].shape == (D, 8)


def test_weights_do_not_depend_on_the_router():
  """Models that differ in their routing start from the same experts."""

  def start(**overrides):
    _, module, _ = layer(**overrides)

    def init(key):
      return module.init(key, X, TOKENS, jnp.int32(0), {})['params']

    return partitioning.unbox(tiny.jit(init)(jax.random.key(0)))

  want, got = start(), start(router='hash')
  assert set(want) - set(got) == {'router'}
  for name in got:
    jax.tree.map(np.testing.assert_array_equal, got[name], want[name])


def test_padding_changes_no_figure_and_takes_no_gradient():
  _, module, variables = layer(
    options__input_jitter=0.1,
    options__random_second_expert=True,
    capacity__policy='batch_priority',
    capacity__factor=0.8,
  )

  def fn(x):
    out, stats = module.apply(variables, x, TOKENS, jnp.int32(0), {})
    return jnp.where(MASK[..., None], out, 0).sum() + sum(stats.losses.values()), stats

  run = tiny.jit(jax.value_and_grad(fn, has_aux=True))
  (value, stats), grad = run(X)
  other = np.where(MASK[..., None], X, 7.0).astype(np.float32)
  (value2, stats2), grad2 = run(other)
  assert value == value2
  jax.tree.map(np.testing.assert_array_equal, stats, stats2)
  np.testing.assert_array_equal(np.asarray(grad)[MASK], np.asarray(grad2)[MASK])
  assert not np.asarray(grad)[~MASK].any()


def test_the_layer_reads_in_one_sitting():
  """At most 150 lines and 8 branches: what decides something has a function of its own."""
  source = pathlib.Path(moe_layer.__file__).read_text(encoding='utf-8')
  (layer,) = (node for node in ast.parse(source).body if getattr(node, 'name', '') == 'MoE')
  assert layer.end_lineno - layer.lineno + 1 <= 150
  assert sum(isinstance(node, (ast.If, ast.IfExp)) for node in ast.walk(layer)) <= 8


def test_margin_by_hand():
  """Only the first counts: then padding, no choice, and no other expert within reach."""
  infinity = np.inf
  scores = [[0.5, 0.3, -infinity], [0.9, 0.1, 0.2], [0.4, 0.1, 0.2], [0.4, -infinity, -infinity]]
  idx, mask = np.array([[[0], [0], [3], [0]]]), np.array([[True, False, True, True]])
  decision = routing.Routing(np.ones((1, 4, 1)), idx, None)
  got = moe_layer._margin(decision, jnp.asarray([scores]), mask)
  np.testing.assert_allclose(got, 0.2, rtol=1e-6)
  assert moe_layer._margin(decision, None, mask) == 0
