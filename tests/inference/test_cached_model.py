"""Cached decoding, token by token, has the logits of the full forward at every position."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import errors
from moe_jax.inference import cached_model, generate
from moe_jax.inference import sampling as sampling_lib
from moe_jax.models import transformer
from tests import tiny

B, L, SLOTS = 3, 12, 16
LENGTHS = np.array([3, 8, 1], np.int32)  # prompts of different lengths in one batch
# Two layers, of both kinds, and attention whose head sizes all differ.
LATENT = {
  'model__attention__kind': 'mla',
  'model__attention__mla__kv_lora_rank': 6,
  'model__attention__mla__qk_nope_head_dim': 4,
  'model__attention__mla__qk_rope_head_dim': 8,
  'model__attention__mla__v_head_dim': 5,
  'model__attention__rope__layout': 'interleaved',
}
YARN = {
  'model__attention__rope__yarn__factor': 4.0,
  'model__attention__rope__yarn__original_max_seq_len': 8,
  'model__attention__rope__yarn__mscale_all_dim': 0.707,
  'model__attention__rope__yarn__mscale': 0.707,
}
MOE = 'model__moe__'
# 'balanced' and 'skewed' deal by a token's place in the batch, which depends on the length of its
# rows: only row 0 can be compared. 'expert_choice' is not causal, nor DS-MoE's threshold_topk.
FIRST_ROW_ONLY = ('balanced', 'skewed')
CASES = {
  'mha': {'model__attention__num_kv_heads': 2},
  'mqa': {},
  'gqa': {'model__num_heads': 4, 'model__attention__num_kv_heads': 2},
  'mla': LATENT,
  'mla_q_lora_yarn': LATENT | YARN | {'model__attention__mla__q_lora_rank': 7},
  'v3': LATENT
  | {
    f'{MOE}score_func': 'sigmoid',
    f'{MOE}norm_topk_prob': True,
    f'{MOE}routed_scaling_factor': 2.5,
    f'{MOE}num_expert_groups': 4,
    f'{MOE}num_limited_groups': 2,
    f'{MOE}group_score': 'top2_sum',
    f'{MOE}expert_bias__update_rule': 'sign',
  },
  'hash': {f'{MOE}router': 'hash'},
  'sinkhorn': {f'{MOE}router': 'sinkhorn'},
  'replay': {
    f'{MOE}router': 'replay',
    f'{MOE}options__replay_path': 'unread.npz',
    f'{MOE}options__replay_rows': 2,
  },
  'ds_moe_all': {f'{MOE}router': 'ds_moe', f'{MOE}dispatch': 'dense'},
  'ds_moe_threshold': {
    f'{MOE}router': 'ds_moe',
    f'{MOE}dispatch': 'dense',
    f'{MOE}options__inference': 'threshold',
    f'{MOE}options__inference_threshold': 0.8,
    'model__num_dense_layers': 0,
    'model__num_heads': 4,
    'model__attention__num_kv_heads': 2,
    'model__attention__num_experts': 2,
  },
  'ds_moe_topk': {
    f'{MOE}router': 'ds_moe',
    f'{MOE}dispatch': 'dense',
    f'{MOE}options__inference': 'topk',
  },
  'attention_experts': {
    'model__num_dense_layers': 0,
    'model__num_heads': 4,
    'model__attention__num_kv_heads': 2,
    'model__attention__num_experts': 2,
  },
  'balanced': {f'{MOE}router': 'balanced'},
  'skewed': {f'{MOE}router': 'skewed', f'{MOE}options__skew': 0.5},
  'dense_dispatch': {f'{MOE}dispatch': 'dense'},
  'dense_model': {f'{MOE}num_experts': 0},
}
CLOSE = dict(rtol=1e-4, atol=2e-5)  # float32 through two layers, other orders of summation


def make(name, **overrides):
  return tiny.make(**{'model__num_layers': 2} | CASES[name] | overrides).model


def variables(model):
  return {'params': tiny.params(model), 'router_state': tiny.router_state(model)}


TOKENS = np.random.default_rng(0).integers(32, size=(B, L)).astype(np.int32)
AT = np.broadcast_to(np.arange(L, dtype=np.int32), (B, L))


@functools.cache
def full(name):
  model = make(name)
  apply = tiny.jit(transformer.Transformer(model).apply)
  return np.asarray(apply(variables(model), TOKENS, AT, np.ones_like(AT)).logits)


@functools.cache
def prepared(name):
  """(weights, prefill's logits, caches whose other slots hold garbage, step)."""
  model = make(name)
  weights = cached_model.unstack(model, variables(model))

  @tiny.jit
  def start(weights, tokens, length):
    hidden, caches, _ = cached_model.prefill(model, weights, tokens, length, SLOTS)

    def real(a):
      return (jnp.arange(SLOTS) < length[:, None]).reshape(B, SLOTS, *[1] * (a.ndim - 2))

    caches = jax.tree.map(lambda a: jnp.where(real(a), a, 9.0), caches)
    return cached_model.logits_of(model, weights, hidden), caches

  @tiny.jit
  def step(weights, tokens, positions, caches):
    hidden, caches, _ = cached_model.step(model, weights, tokens, positions, caches)
    return cached_model.logits_of(model, weights, hidden), caches

  prompt = np.where(LENGTHS[:, None] > AT, TOKENS, 5)[:, :8]
  logits, caches = start(weights, prompt, LENGTHS)
  return weights, np.asarray(logits), caches, step


# The others are compared under `slow`: each compiles three programs.
QUICK = ('gqa', 'mla', 'v3', 'mla_q_lora_yarn', 'ds_moe_threshold', 'sinkhorn', 'skewed')
MARKED = [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in CASES]


@pytest.mark.parametrize('name', MARKED)
def test_every_position_has_the_logits_of_the_full_forward(name):
  weights, logits, caches, step = prepared(name)
  rows = 1 if name in FIRST_ROW_ONLY else B
  for row, length in enumerate(LENGTHS[:rows]):
    np.testing.assert_allclose(logits[row, :length], full(name)[row, :length], **CLOSE)
  for t in range(L - max(LENGTHS)):
    at = (LENGTHS + t)[:, None]
    tokens = np.take_along_axis(TOKENS, at, axis=1)
    logits, caches = step(weights, tokens, at, caches)
    want = np.take_along_axis(full(name), at[..., None], axis=1)
    np.testing.assert_allclose(
      logits[:rows], want[:rows], **CLOSE, err_msg=f'{t} behind the prompts'
    )


@pytest.mark.parametrize('name', ['gqa', 'mla', 'v3'])
def test_two_tokens_at_once_equal_one_after_the_other(name):
  weights, _, caches, step = prepared(name)
  at = LENGTHS[:, None] + np.arange(2, dtype=np.int32)
  logits, _ = step(weights, np.take_along_axis(TOKENS, at, axis=1), at, caches)
  np.testing.assert_allclose(logits, np.take_along_axis(full(name), at[..., None], axis=1), **CLOSE)


def test_weights_are_rounded_to_the_compute_dtype_only_when_they_are_wider():
  model = dataclasses.replace(make('mla'), dtype='bfloat16')
  weights = cached_model.unstack(model, variables(model))
  projections = weights.layers[0]['kernels']['attention']['projections']
  assert weights.head_rows.dtype == projections.o.dtype == jnp.bfloat16
  assert weights.layers[1]['kernels']['moe']['experts'].down.dtype == jnp.bfloat16
  assert weights.layers[1]['params']['moe']['router'].dtype == jnp.float32
  assert weights.final_norm['scale'].dtype == jnp.float32
  narrow = dataclasses.replace(make('mla'), param_dtype='bfloat16')
  assert cached_model.unstack(narrow, variables(narrow)).head_rows.dtype == jnp.bfloat16


def test_no_weights_are_kept_twice():
  model = make('v3')
  weights = cached_model.unstack(model, variables(model))

  def total(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))

  assert total((weights.embedding, weights.head_rows, weights.final_norm)) + sum(
    total((layer['params'], layer['kernels'])) for layer in weights.layers
  ) == total(variables(model)['params'])


# The axis of a weight that is split; those of a layer have the stack's axis first.
SPLIT = {
  'embedding': 0,  # vocabulary
  'head': 1,  # vocabulary
  'gate_up': 1,  # experts
  'down': 1,  # experts
  'q': 2,  # heads
  'o': 1,  # heads
  'kv_b': 2,  # heads
}
HEADS = {'model__num_heads': 8, 'model__attention__num_kv_heads': 2}


@pytest.mark.parametrize('name, heads', [('gqa', HEADS), ('v3', {'model__num_heads': 8})])
def test_sharded_parameters_write_the_same_text(name, heads):
  """Experts, heads and vocabulary over 8 devices."""
  model = make(name, **heads)
  mesh = jax.make_mesh((8,), ('model',), axis_types=(jax.sharding.AxisType.Auto,))
  split = set()

  def place(path, leaf):
    axis = SPLIT.get(path[-1].key)
    spec = [None] * leaf.ndim
    if axis is not None and leaf.shape[axis] % 8 == 0:
      spec[axis] = 'model'
      split.add(path[-1].key)
    return jax.device_put(leaf, jax.NamedSharding(mesh, jax.P(*spec)))

  sharded = jax.tree_util.tree_map_with_path(place, variables(model))
  assert split == set(SPLIT) - ({'kv_b'} if name == 'gqa' else set())
  greedy = sampling_lib.Sampling(temperature=0.0)
  prompts = [TOKENS[0, :3].tolist(), TOKENS[1, :6].tolist()]

  def write(v):
    return generate.generate(model, v, prompts, 6, (31,), greedy).tokens

  assert write(sharded) == write(variables(model))


def test_expert_choice_is_refused():
  model = tiny.make(**{f'{MOE}router': 'expert_choice', f'{MOE}dispatch': 'capacity'}).model
  with pytest.raises(errors.InputError, match="router='expert_choice' has no causal decoding"):
    generate.Generator(model, {}, (0,))


def test_every_layer_gets_its_own_weights_and_router_state():
  cfg = tiny.make(model__moe__router='hash', model__moe__balance__expert_level__weight=0.0).model
  params, state = tiny.params(cfg), tiny.router_state(cfg)
  (table,) = jax.tree.leaves(state['moe_layers'])
  assert len(table) == 2 and not np.array_equal(table[0], table[1])
  found = cached_model.unstack(cfg, {'params': params, 'router_state': state}).layers
  assert len(found) == 3 and not jax.tree.leaves(found[0]['router_state'])
  for i in range(2):
    np.testing.assert_array_equal(jax.tree.leaves(found[i + 1]['router_state'])[0], table[i])
    scale = params['moe_layers']['ffn_norm']['scale'][i]
    np.testing.assert_array_equal(found[i + 1]['params']['ffn_norm']['scale'], scale)
