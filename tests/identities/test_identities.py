"""Identities of one MoE layer, for every router; each one is a bug somebody shipped.

One compiled layer per case serves most of them: what changes is the input, the weights, the rows
that are real, or the step. `test_identities_train.py` has those of a whole training step.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from moe_jax import integer_hash
from moe_jax.balance import balance_losses, router_stats
from moe_jax.devices import partitioning
from moe_jax.models import layers, moe_layer, transformer
from moe_jax.models.routers import routing
from tests import tiny

E, B, L, D = 8, 8, 16, 16
# Every router, score function, kind of capacity and dispatch; 8 virtual devices of one expert each.
CASES = {
  'topk': {},
  'v3': {
    'score_func': 'sigmoid',
    'norm_topk_prob': True,
    'routed_scaling_factor': 2.5,
    'num_expert_groups': 4,
    'num_limited_groups': 2,
    'group_score': 'top2_sum',
    'expert_bias__update_rule': 'sign',
  },
  'skywork': {
    'norm_topk_prob': True,
    'options__logit_norm_scale': 1.0,
    'balance__adaptive__loss': 'squared_deviation',
    'capacity__policy': 'batch_priority',
    'capacity__factor': 1.0,
  },
  'gshard': {
    'norm_topk_prob': True,
    'options__random_second_expert': True,
    'capacity__policy': 'position',
    'capacity__factor': 1.0,
    'dispatch': 'capacity',
  },
  'switch': {
    'num_experts_per_tok': 1,
    'options__input_jitter': 0.1,
    'capacity__policy': 'position',
    'capacity__factor': 0.5,
    'capacity__group_rows': 0,
    'dispatch': 'capacity',
  },
  'score': {
    'num_experts_per_tok': 1,
    'capacity__policy': 'score',
    'capacity__factor': 0.8,
    'capacity__group_rows': 2,
  },
  'device': {
    'num_virtual_devices': 4,
    'capacity__policy': 'device',
    'capacity__factor': 0.5,
    'capacity__group_rows': 0,
    'capacity__exempt_fraction': 0.3,
    'dispatch': 'dense',
  },
  'hash': {'router': 'hash', 'dispatch': 'dense'},
  'expert_choice': {
    'router': 'expert_choice',
    'options__chunk_tokens': 8,
    'dispatch': 'capacity',
  },
  'shuffled': {
    'router': 'expert_choice',
    'options__chunk_tokens': 32,
    'options__shuffle_chunks': True,
    'dispatch': 'capacity',
  },
  'ds_moe': {'router': 'ds_moe', 'dispatch': 'dense'},
  'sinkhorn': {'router': 'sinkhorn', 'dispatch': 'dense'},
  'balanced': {'router': 'balanced', 'dispatch': 'dense'},
  'skewed': {'router': 'skewed', 'options__skew': 0.5, 'dispatch': 'dense'},
  'replay': {
    'router': 'replay',
    'options__replay_path': 'x',
    'options__replay_rows': 5,
    'dispatch': 'dense',
  },
}
# Tokens of different rows compete: what a row gets depends on the rows it is computed with.
ACROSS_ROWS = ('switch', 'score', 'device', 'shuffled')
# A token's choice, or whether it is kept, depends on other tokens.
COMPETING = (*ACROSS_ROWS, 'skywork', 'gshard', 'expert_choice', 'sinkhorn')

BATCH = tiny.batch()
MASK = BATCH['segment_ids'] > 0
REAL = int(MASK.sum())
X = np.random.default_rng(0).normal(size=(B, L, D)).astype(np.float32)
TOKENS = routing.Tokens(BATCH['tokens'], MASK, np.arange(B, dtype=np.int32), np.uint32(0))
FULL = TOKENS._replace(mask=np.ones_like(MASK))


class Result(NamedTuple):
  out: np.ndarray  # [B, L, D]
  stats: router_stats.RouterStats
  expert_idx: np.ndarray  # [B, L, K], as chosen, before anything is dropped
  state: Any  # the routers' variables after the call


@functools.cache
def model_of(case, **overrides):
  settings = {'num_virtual_devices': E} | CASES.get(case, {}) | overrides
  return tiny.make(**{f'model__moe__{k}': v for k, v in settings.items()}).model


def module_of(case, train=True, kind=moe_layer.MoE, **overrides):
  cfg = model_of(case, **overrides)
  sizes = routing.Sizes(cfg.vocab_size, cfg.max_seq_len)
  return kind(cfg.moe, sizes, 0.02, jnp.float32, jnp.float32, train)


def variables_of(case, **overrides):
  """Weights and state of the first MoE layer of the tiny model."""
  cfg = model_of(case, **overrides)

  def first(tree):
    return jax.tree.map(lambda leaf: leaf[0], tree['moe_layers']['moe'])

  state = tiny.router_state(cfg)
  return {'params': first(tiny.params(cfg)), 'router_state': first(state) if state else {}}


def _apply(module, variables, x, tokens, layer):
  collections = ['intermediates', 'router_state']
  (out, stats), new = module.apply(variables, x, tokens, layer, {}, mutable=collections)
  return Result(out, stats, new['intermediates']['expert_idx'][0], new.get('router_state', {}))


@functools.cache
def compiled(case, train=True, **overrides):
  return tiny.jit(functools.partial(_apply, module_of(case, train, **overrides)))


def run(case, x=X, tokens=TOKENS, layer=0, variables=None, train=True, **overrides) -> Result:
  variables = variables or variables_of(case, **overrides)
  got = compiled(case, train, **overrides)(variables, x, tokens, np.int32(layer))
  return jax.tree.map(np.asarray, got)


def assert_same_books(got, want, case=''):
  """Counts are equal; sums of float32 in another order, to a few units in the last place."""

  def same(path, a, b):
    where = f'{case} {jax.tree_util.keystr(path)}'
    if np.issubdtype(b.dtype, np.integer):
      np.testing.assert_array_equal(a, b, err_msg=where)
    else:
      np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5, err_msg=where)

  jax.tree_util.tree_map_with_path(same, got, want)


def expected_load(case):
  """Assignments that the real tokens of TOKENS make."""
  if case == 'ds_moe':
    return REAL * E
  if case == 'expert_choice':  # chunks of 8 places: floor(K n / E), at least 1, for n > 0
    real = MASK.reshape(-1, 8).sum(1)
  elif case == 'shuffled':  # 4 chunks of 32 of the 128 places, dealt by the noise
    deal = np.argsort(np.asarray(routing.token_noise(TOKENS, np.int32(0), salt=3)).ravel())
    real = MASK.ravel()[deal].reshape(-1, 32).sum(1)
  else:
    return REAL * model_of(case).moe.num_experts_per_tok
  return E * np.where(real > 0, np.maximum(real * 2 // E, 1), 0).sum()


@pytest.mark.parametrize('case', CASES)
def test_every_assignment_of_a_real_token_is_counted_and_kept_or_dropped(case):
  got, cfg = run(case), model_of(case).moe
  load, dropped = got.stats.sums.load, got.stats.dropped
  assert got.stats.sums.num_tokens == REAL
  assert load.sum() == expected_load(case)
  np.testing.assert_array_equal(load, np.bincount(got.expert_idx[MASK].ravel(), minlength=9)[:8])
  assert (got.expert_idx[~MASK] == E).all()
  if cfg.num_virtual_devices == E:
    # One expert per device: a token is sent to a device once for each assignment that is kept.
    np.testing.assert_array_equal(got.stats.tokens_sent.sum(0) + dropped, load)
  may_drop = cfg.capacity.policy != 'none' or cfg.options.random_second_expert
  assert (dropped.sum() > 0) == may_drop and (dropped <= load).all()


@pytest.mark.parametrize('case', CASES)
def test_applying_a_layer_never_changes_its_state(case):
  jax.tree.map(np.testing.assert_array_equal, run(case).state, variables_of(case)['router_state'])


@pytest.mark.parametrize('case', [case for case in CASES if case not in ACROSS_ROWS])
def test_micro_batches_add_up_to_the_batch(case):
  """Rows {i, i + 4} first, with their numbers, and nothing but padding after them."""
  want, parts = run(case), []
  for i in range(4):
    rows = np.array([i, i + 4, 0, 0, 0, 0, 0, 0])
    real = MASK[rows] & (np.arange(B) < 2)[:, None]
    tokens = TOKENS._replace(ids=TOKENS.ids[rows], mask=real, row=rows.astype(np.int32))
    got = run(case, X[rows], tokens)
    np.testing.assert_array_equal(got.expert_idx[:2], want.expert_idx[[i, i + 4]])
    # Neighbours in a block of a matrix product may change the last bit.
    np.testing.assert_allclose(got.out[:2], want.out[[i, i + 4]], rtol=1e-5, atol=1e-6)
    parts.append(got.stats)
  total = jax.tree.map(lambda *a: sum(a), *parts)

  def in_scope(stats):
    return stats.replace(
      losses={
        k: v for k, v in stats.losses.items() if model_of(case).moe.loss(k).scope == 'sequence'
      }
    )

  assert_same_books(in_scope(total), in_scope(want.stats))


def test_cases_across_rows_do_depend_on_the_batch_they_are_in():
  """Or they would belong in the test above: with half of the rows, others are chosen or dropped."""
  half = TOKENS._replace(mask=MASK & (np.arange(B) % 2 == 0)[:, None])
  for case in ACROSS_ROWS:
    assert np.abs(run(case, tokens=half).out - run(case).out)[half.mask].max() > 0.01, case


def mesh_of_8():
  return tiny.mesh(data=8)


@pytest.mark.parametrize('case', CASES)
def test_8_devices_equal_1(case):
  """One row per device; what competes across rows competes across devices."""
  mesh = mesh_of_8()
  split, whole = jax.NamedSharding(mesh, partitioning.BATCH_SPEC), jax.NamedSharding(mesh, jax.P())
  x = jax.device_put(X, split)
  rows = jax.NamedSharding(mesh, jax.P(partitioning.ROW_AXES))
  tokens = jax.device_put(TOKENS, routing.Tokens(split, split, rows, whole))
  variables = jax.device_put(variables_of(case), whole)
  with partitioning.activate(mesh):
    got = tiny.jit(functools.partial(_apply, module_of(case)))(variables, x, tokens, jnp.int32(0))
  want = run(case)
  np.testing.assert_array_equal(got.expert_idx, want.expert_idx)
  np.testing.assert_allclose(got.out, want.out, rtol=1e-5, atol=1e-5)
  assert_same_books(jax.tree.map(np.asarray, got.stats), want.stats, case)


def decisions(case, kind):
  """How many sorts, top-ks and draws against a gate a layer computes, forward and backward."""
  module, variables = module_of(case, kind=kind), variables_of(case)

  def loss(params, x):
    out, stats = module.apply(variables | {'params': params}, x, TOKENS, jnp.int32(0), {})
    return out.sum() + sum(stats.losses.values())

  jaxpr = jax.make_jaxpr(jax.grad(loss))(variables['params'], X).jaxpr
  names = [eqn.primitive.name for eqn in tiny.equations(jaxpr)]
  # Random bits may be drawn again, they are the same; but not to be compared with a gate again.
  compared = module.cfg.options.random_second_expert
  return names.count('sort'), names.count('top_k'), names.count('xor') if compared else 0


@pytest.mark.parametrize('case', CASES)
def test_no_decision_is_made_twice_under_remat(case):
  """A second one, over scores rounded otherwise, could send gradients to experts that never ran."""
  names = transformer.SAVED_NAMES['full']
  policy = jax.checkpoint_policies.save_only_these_names(*names)
  want = decisions(case, moe_layer.MoE)
  assert decisions(case, nn.remat(moe_layer.MoE, policy=policy)) == want
  if case not in ('hash', 'balanced', 'ds_moe', 'skewed', 'replay'):  # which decide nothing
    everything = nn.remat(moe_layer.MoE, policy=jax.checkpoint_policies.nothing_saveable)
    assert decisions(case, everything) > want  # the count can tell


PERMUTATION = np.array([3, 2, 0, 1, 6, 7, 5, 4])  # groups and devices of 2 stay together
NEW_NAME = np.append(np.argsort(PERMUTATION), E)  # old expert -> new one; E is nowhere


def permuted(variables):
  """The same layer, whose expert i is the old expert PERMUTATION[i]."""
  params = dict(variables['params'])
  for name, axis in (('router', 1), ('gate_up', 0), ('down', 0)):
    if name in params:
      params[name] = jnp.take(params[name], PERMUTATION, axis=axis)
  state = dict(variables['router_state'])
  for name, value in state.items():
    if name == 'expert_bias':
      state[name] = value[PERMUTATION]
    elif value.dtype == jnp.int32:
      state[name] = NEW_NAME.astype(np.int32)[value]
  return {'params': params, 'router_state': state}


@pytest.mark.parametrize('case', [case for case in CASES if case not in ('balanced', 'skewed')])
def test_experts_have_no_names(case):
  """But for the routers that deal by number. Their order moves the loads along, and no output."""
  want, got = run(case), run(case, variables=permuted(variables_of(case)))
  np.testing.assert_array_equal(got.stats.sums.load, want.stats.sums.load[PERMUTATION])
  np.testing.assert_array_equal(got.stats.dropped, want.stats.dropped[PERMUTATION])
  even = case in ('ds_moe', 'expert_choice', 'shuffled')
  assert (np.ptp(want.stats.sums.load) == 0) == even
  # Sums over experts in another order.
  np.testing.assert_allclose(got.out[MASK], want.out[MASK], rtol=1e-4, atol=1e-5)
  for name, value in want.stats.losses.items():
    # A hash has K equal scores, and its first choice is the one with the lower number.
    if case != 'hash' or name not in ('switch', 'gshard'):
      np.testing.assert_allclose(got.stats.losses[name], value, rtol=1e-4, atol=1e-4, err_msg=name)


def changed(case, row, place, seed=1):
  """[B, L] bool: whose outputs change when one token does; all tokens are real."""
  x, ids = X.copy(), FULL.ids.copy()
  x[row, place] = 3 * np.random.default_rng(seed).normal(size=D)
  ids[row, place] = (ids[row, place] + seed) % 32
  after = run(case, x, FULL._replace(ids=ids))
  return (after.out != run(case, tokens=FULL).out).any(-1)


@pytest.mark.parametrize('case', [case for case in CASES if case not in COMPETING])
def test_a_token_changes_nobody_else(case):
  """Exactly: the residual stream of other rows and of earlier and later tokens keeps every bit."""
  for row, place in ((3, 7), (0, 15), (7, 0)):
    want = np.zeros((B, L), bool)
    want[row, place] = True
    np.testing.assert_array_equal(changed(case, row, place), want)


def test_expert_choice_leaks_the_future_inside_a_chunk_and_shuffling_scatters_it():
  reached = sum(changed('expert_choice', 3, 7, seed) for seed in range(1, 6))
  assert reached[3, :7].any()  # earlier tokens of the chunk, places 0 to 7
  reached[3, :8] = 0
  assert not reached.any()  # nobody else
  reached = sum(changed('shuffled', 3, 7, seed) for seed in range(1, 6))
  assert reached[np.arange(B) != 3].any()  # other rows: the chunk's tokens come from anywhere


def test_position_capacity_is_causal_for_single_choices_and_score_is_not():
  for seed in range(1, 6):
    reached = changed('switch', 3, 7, seed)  # all rows are one group
    assert not reached[:3].any() and not reached[3, :7].any()
  assert sum(changed('switch', 3, 7, seed) for seed in range(1, 6)).sum() > 5  # later ones: yes
  reached = sum(changed('score', 3, 7, seed) for seed in range(1, 6))
  assert reached[2].any() or reached[3, :7].any()  # earlier tokens of the group, rows 2 and 3
  assert not reached[[0, 1, 4, 5, 6, 7]].any()
  # Second choices queue behind all first ones: with K = 2 a later token can push one out.
  reached = sum(changed('gshard', 3, 14, seed) for seed in range(1, 9))
  assert reached[3, :14].any() and not reached[np.arange(B) != 3].any()


def differ(a, b):
  return np.abs(a.out - b.out).max() > 1e-3


def test_random_choices_are_functions_of_step_layer_row_and_place():
  for case in ('switch', 'gshard', 'shuffled', 'skewed', 'device'):

    def step(n):
      return FULL._replace(seed=np.asarray(integer_hash.combine(0, n)))  # as the train step does

    first = run(case, tokens=step(0))
    jax.tree.map(np.testing.assert_array_equal, run(case, tokens=step(0)), first)
    assert differ(run(case, tokens=step(1)), first), case
    other_layer = run(case, tokens=step(0), layer=1)
    assert differ(other_layer, first) or case == 'device', case  # exempt rows are so in all layers
    other_rows = run(case, tokens=step(0)._replace(row=TOKENS.row + B))
    assert differ(other_rows, first), case
  # The same token twice in a row: every place draws for itself.
  same = run('switch', np.tile(X[:, :1], (1, L, 1)), FULL)
  scores = run('skewed', tokens=FULL).expert_idx[..., 0] == 0
  assert same.stats.sums.score.std() > 0 and 0.3 < scores.mean() < 0.7


# Evaluation.


@pytest.mark.parametrize('case', ['gshard', 'switch'])
def test_evaluation_never_drops_nor_jitters(case):
  """It is the layer without its capacity, random choices and jitter."""
  plain = dict(capacity__policy='none', dispatch='dropless', options__input_jitter=0.0)
  got = run(case, train=False)
  assert got.stats.dropped.sum() == 0 and differ(got, run(case))
  want = run(case, **plain, options__random_second_expert=False)
  np.testing.assert_allclose(got.out, want.out, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(got.expert_idx, want.expert_idx)


def test_evaluation_drops_if_asked():
  train = run('score')
  got = run('score', train=False, capacity__at_eval=True)
  np.testing.assert_array_equal(got.stats.dropped, train.stats.dropped)
  np.testing.assert_array_equal(got.out, train.out)
  assert train.stats.dropped.sum() > 0


# Gradients.


def grads(case, x, tokens, losses, **overrides):
  """(gradients of each of `losses` (Result -> [n]), leaves [n, ...]; expert_idx)."""
  module, variables = module_of(case, **overrides), variables_of(case, **overrides)

  def fn(params, x, tokens):
    got = _apply(module, variables | {'params': params}, x, tokens, jnp.int32(0))
    return losses(got), got.expert_idx

  grad, idx = tiny.jit(jax.jacrev(fn, has_aux=True))(variables['params'], x, tokens)
  return jax.tree.map(np.asarray, grad), np.asarray(idx)


@pytest.mark.parametrize('case', ['topk', 'v3'])
def test_gradients_reach_the_router_and_the_chosen_experts_and_nothing_else(case):
  few = TOKENS._replace(mask=MASK & (np.arange(B) == 0)[:, None] & (np.arange(L) < 2))
  weigh = np.random.default_rng(5).normal(size=(B, L, D)) * few.mask[..., None]
  grad, idx = grads(case, X, few, lambda got: (got.out * weigh).sum())
  used = np.zeros(E, bool)
  used[np.unique(idx[few.mask])] = True
  assert 2 <= used.sum() <= 4
  for name in ('gate_up', 'down'):
    reached = np.abs(grad[name]).reshape(E, -1).max(-1)
    np.testing.assert_array_equal(reached > 1e-4, used)
    assert (reached[~used] == 0).all()
  reached = np.abs(grad['router']).max(0)
  # A softmax ties all columns together; a sigmoid's are apart, and normalising joins the chosen.
  np.testing.assert_array_equal(reached > 1e-6, used | (case == 'topk'))
  assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(grad['shared']))


def test_dropped_assignments_pass_no_gradient_and_balance_losses_reach_only_the_router():
  """Sixteen equal tokens per row, of which the first is kept: capacity ceil(.05 * 16 / 8) = 1."""
  x = np.tile(X[:, :1], (1, L, 1))

  def losses(got):
    return jnp.stack([got.out.sum(), got.out[:, 0].sum(), sum(got.stats.losses.values())])

  tight = dict(capacity__policy='position', capacity__factor=0.05, dispatch='dense')
  grad, _ = grads('topk', x, FULL, losses, num_experts_per_tok=1, **tight)
  for name in ('gate_up', 'down', 'router'):
    whole, first, _ = grad[name]
    assert np.abs(whole).max() > 1e-3
    np.testing.assert_allclose(whole, first, rtol=1e-4, atol=1e-5, err_msg=name)
  whole, first, _ = grad['shared']['down']  # which sees all of them
  np.testing.assert_allclose(whole, 16 * first, rtol=1e-4, atol=1e-5)
  by_losses = jax.tree.map(lambda leaf: leaf[2], grad)
  assert np.abs(by_losses.pop('router')).max() > 1e-3
  assert not any(leaf.any() for leaf in jax.tree.leaves(by_losses))


# Perfect balance, and dense equivalents.


@pytest.mark.parametrize('score_func', ['softmax', 'sigmoid'])
def test_a_balanced_router_with_uniform_scores_has_the_declared_losses(score_func):
  variables = variables_of('balanced', score_func=score_func)
  variables['params'] = variables['params'] | {'router': jnp.zeros((D, E))}
  got = run('balanced', tokens=FULL, variables=variables, score_func=score_func)
  np.testing.assert_array_equal(got.stats.sums.load, np.full(E, B * L * 2 // E))
  assert router_stats.max_vio(got.stats.sums.load) == 0
  cfg = model_of('balanced', score_func=score_func).moe
  for name, value in got.stats.losses.items():
    want = balance_losses.value_at_balance(name, cfg)
    if name == 'mutual_information':
      want = 0.0  # uniform scores balance too, but nobody is certain
    # float32 sums of 128 tokens: 1e-5 of the entropies, ln 8 = 2, that cancel.
    np.testing.assert_allclose(value / (B * L), want, rtol=1e-5, atol=3e-5, err_msg=name)


DENSE = dict(num_shared_experts=0, routed_scaling_factor=float(E))


def test_an_undecided_dense_mixture_is_one_wide_ffn():
  """Scores 1 / E, times a factor E: the sum of all experts, an FFN of width E F."""
  params = variables_of('ds_moe', **DENSE)['params'] | {'router': jnp.zeros((D, E))}
  got = run('ds_moe', variables={'params': params, 'router_state': {}}, **DENSE)
  gate_up, down = params['gate_up'], params['down']
  wide = {
    'gate_up': jnp.moveaxis(gate_up, 0, 2).reshape(D, 2, -1),
    'down': down.reshape(-1, D),
  }
  ffn = layers.FeedForward(wide['down'].shape[0], 0.02, jnp.float32, jnp.float32)
  want = tiny.jit(lambda x: ffn.apply({'params': wide}, x))(X)
  np.testing.assert_allclose(got.out[MASK], want[MASK], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  'case, overrides',
  [
    ('ds_moe', {'options__inference': 'threshold', 'options__inference_threshold': 0.0}),
    ('ds_moe', {'options__inference': 'topk', 'num_experts_per_tok': E}),
    ('topk', {'num_experts_per_tok': E, 'dispatch': 'dense'}),
  ],
)
def test_sparse_inference_that_keeps_all_is_dense_training(case, overrides):
  want = run('ds_moe', tokens=FULL)
  got = run(case, tokens=FULL, train=False, **overrides)
  np.testing.assert_array_equal(got.out, want.out)
  np.testing.assert_array_equal(got.stats.sums.load, want.stats.sums.load)


def test_replaying_what_a_layer_chose_is_that_layer():
  """Five recorded rows serve eight: rows 5 to 7 are copies of 0 to 2."""
  x, tokens = X[np.arange(B) % 5], FULL._replace(ids=FULL.ids[np.arange(B) % 5])
  want = run('topk', x, tokens, dispatch='dense')
  state = {'assignments': jnp.asarray(want.expert_idx[:5])}
  got = run('replay', x, tokens, variables=variables_of('topk') | {'router_state': state})
  np.testing.assert_array_equal(got.out, want.out)
  jax.tree.map(np.testing.assert_array_equal, got.stats.sums, want.stats.sums)
