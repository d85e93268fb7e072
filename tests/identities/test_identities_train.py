"""Identities of routing in a whole training step; each one is a bug somebody shipped.

One config has all of it at once, so that a few compiled programs show that remat, accumulation,
unrolled layers and devices change no number. `test_identities.py` has each router by itself.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax import integer_hash
from moe_jax.balance import router_stats
from moe_jax.checkpoints import checkpointer
from moe_jax.config import moe_config
from moe_jax.devices import partitioning
from moe_jax.models import model_variables, transformer
from moe_jax.training import objective, optim, optimizer_step, train_state
from tests import tiny

B, L, E = 8, 16, 8
SMALL = {'model__num_layers': 2, 'model__num_dense_layers': 0, 'model__moe__dispatch': 'dense'}
# Every mechanism that looks beyond one token: bias, groups, capacity, exempt rows, random choices,
# adaptive coefficient, attention mixture, and balance losses over sequences and the whole batch.
_RICH = {
  'score_func': 'sigmoid',
  'norm_topk_prob': True,
  'routed_scaling_factor': 1.5,
  'num_expert_groups': 4,
  'num_limited_groups': 2,
  'group_score': 'top2_sum',
  'num_virtual_devices': 4,
  'expert_bias__update_rule': 'sign',
  'options__input_jitter': 0.1,
  'options__random_second_expert': True,
  'options__logit_norm_scale': 1.0,
  'capacity__policy': 'score',
  'capacity__factor': 1.0,
  'capacity__exempt_fraction': 0.3,
  'balance__adaptive__loss': 'squared_deviation',
  'balance__adaptive__max_coefficient': 0.5,
  'balance__adaptive__decay': 0.5,
}
for _name in moe_config.LOSSES:
  _RICH |= {f'balance__{_name}__weight': 0.1, f'balance__{_name}__scope': 'global_batch'}
_RICH |= {'balance__expert_level__scope': 'sequence', 'balance__gshard__weight': 0.0}
RICH = SMALL | {'model__attention__num_experts': 2}
RICH |= {f'model__moe__{key}': value for key, value in _RICH.items()}

SEED = np.asarray(integer_hash.combine(0, 0))  # of step 0 of a run with seed 0
COEFFICIENTS = np.float32([0.01, 0.03])  # of the two layers


def router_state(cfg):
  state = dict(tiny.router_state(cfg.model)['moe_layers']['moe'])
  return {'moe_layers': {'moe': state | {'loss_coefficient': jnp.asarray(COEFFICIENTS)}}}


@functools.cache
def gradients(**overrides):
  """`objective.gradients` of the rich config and its state, on one device: (loss, gradients)."""
  cfg = tiny.make(**(RICH | overrides))
  fn = tiny.jit(functools.partial(objective.gradients, cfg))
  return fn(tiny.params(cfg.model), router_state(cfg), tiny.batch(), SEED)


def assert_same_loss(got: objective.Loss, want: objective.Loss):
  """Counts are equal, and sums of float32 in another order."""

  def same(path, a, b):
    where = jax.tree_util.keystr(path)
    if np.issubdtype(b.dtype, np.integer):
      np.testing.assert_array_equal(a, b, err_msg=where)
    else:
      np.testing.assert_allclose(a, b, rtol=5e-5, atol=1e-5, err_msg=where)

  jax.tree_util.tree_map_with_path(same, got, want)


def test_the_rich_config_does_all_of_it():
  """Or the tests below would show nothing."""
  loss, grads = gradients()
  assert (loss.stats.dropped.sum(-1) > 5).all()
  assert set(loss.stats.losses) == set(moe_config.LOSSES)
  values = [float(v.sum()) for v in loss.stats.losses.values()]
  assert np.isfinite(values).all() and np.abs(values).min() > 0
  assert loss.stats.attention.active.tolist() == [86 * 2] * 2  # two attention experts, all in use
  for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
    assert np.abs(leaf).max() > 1e-5, path


def test_balance_loss_is_the_weighted_sum_over_losses_and_layers_per_token():
  """The adaptive loss has a coefficient per layer, the others one weight for all."""
  loss, _ = gradients()
  moe, want = tiny.make(**RICH).model.moe, 0.0
  for name, values in loss.stats.losses.items():
    assert values.shape == (2,)
    weight = COEFFICIENTS if name == 'squared_deviation' else moe.loss(name).weight
    want += (weight * values).sum() / 86
  np.testing.assert_allclose(loss.aux, want, rtol=1e-5)
  assert abs(float(loss.aux)) > 0.1


def test_remat_and_unrolled_layers_change_no_number():
  want, want_grads = gradients()
  got, grads = gradients(model__remat='moe_core', model__scan_layers=False)
  assert_same_loss(got, want)
  # Recomputed in other fusions: the last bits of float32 may differ.
  tiny.assert_trees_close(grads, want_grads, rtol=1e-3, atol=1e-5)


def test_8_devices_change_no_number():
  cfg = tiny.make(**RICH)
  mesh = tiny.mesh(data=8)

  def put(tree):
    return jax.device_put(tree, jax.NamedSharding(mesh, jax.P()))

  batch = partitioning.put_batch(tiny.batch(), mesh)
  with partitioning.activate(mesh):
    fn = tiny.jit(functools.partial(objective.gradients, cfg))
    got, grads = fn(put(tiny.params(cfg.model)), put(router_state(cfg)), batch, SEED)
  want, want_grads = gradients()
  assert_same_loss(jax.device_get(got), want)
  tiny.assert_trees_close(grads, want_grads, rtol=1e-3, atol=1e-5)


# eps is large so that Adam does not blow the last bit of a tiny gradient up to a whole step.
STEP = RICH | {
  'train__micro_batch_size': 2,
  'model__remat': 'full',
  'optim__eps': 1e-3,
  'optim__clip_norm': 0.0,
  'optim__weight_decay': 0.5,
}


def fresh(cfg, step=0, seed=0):
  def copy(tree):
    return jax.tree.map(jnp.copy, tree)  # a step donates its state

  params = copy(tiny.params(cfg.model))
  opt_state = optim.optimizer(cfg.optim, cfg.train.num_steps).init(params)
  state = copy(router_state(cfg))
  return train_state.TrainState(jnp.int32(step), jnp.uint32(seed), params, state, opt_state)


@pytest.fixture(scope='module')
def step():
  """The compiled train step, with four micro-batches and full remat."""
  cfg = tiny.make(**STEP)
  mesh = tiny.mesh(data=1)
  with partitioning.activate(mesh):
    lowered = optimizer_step.make_train_step(cfg, mesh).lower(fresh(cfg), tiny.batch())
  return lowered.compile(compiler_options={'xla_backend_optimization_level': 0})


@pytest.fixture(scope='module')
def first(step):
  """(state, metrics) after one step."""
  return step(fresh(tiny.make(**STEP)), tiny.batch())


@pytest.mark.slow  # compiles two more steps
def test_accumulation_under_full_remat_changes_no_number(first):
  state, got = first
  want, want_grads = gradients()
  assert_same_loss(objective.Loss(got.loss, got.mtp_loss, got.aux_loss, got.stats), want)
  # Adam's first moment after one step is (1 - beta1) times the gradient, nothing being clipped.
  mu = optax.tree.get(state.opt_state, 'mu')
  grads = jax.tree.map(lambda m: m / np.float32(1 - 0.9), mu)
  tiny.assert_trees_close(grads, want_grads, rtol=1e-3, atol=1e-5)


def test_bias_moves_once_per_step_by_the_load_of_the_whole_batch(first):
  """Once, though there are four micro-batches and a second forward pass; no decay, no momentum."""
  state, got = first
  cfg = tiny.make(**STEP)
  before = model_variables.moe_state(router_state(cfg))['expert_bias']
  load = np.asarray(got.stats.sums.load, np.float32)
  assert load.shape == (2, E) and (load.sum(-1) == 86 * 2).all()
  want = before + np.float32(1e-3) * np.sign(load.mean(-1, keepdims=True) - load)
  np.testing.assert_array_equal(model_variables.moe_state(state.router_state)['expert_bias'], want)
  assert (np.sign(load.mean(-1, keepdims=True) - load) != 0).any(-1).all()


def test_coefficient_follows_the_drop_rate_of_each_layer(first):
  state, got = first
  load, dropped = (np.asarray(a).sum(-1) for a in (got.stats.sums.load, got.stats.dropped))
  # beta .5; the target is min(.2 d, .5).
  want = 0.5 * COEFFICIENTS + 0.5 * np.minimum(0.2 * dropped / load, 0.5)
  coefficient = model_variables.moe_state(state.router_state)['loss_coefficient']
  np.testing.assert_allclose(coefficient, want, rtol=1e-6)
  assert (want != COEFFICIENTS).all()


def test_optimizer_knows_nothing_of_the_router_state(first):
  paths = [
    jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(first[0].opt_state)
  ]
  assert any('router' in path for path in paths)  # the weights are there
  assert not any(word in path for path in paths for word in ('bias', 'coefficient', 'router_state'))
  mu = optax.tree.get(first[0].opt_state, 'mu')
  assert jax.tree.structure(mu) == jax.tree.structure(first[0].params)


def test_every_step_draws_its_own_noise_and_the_same_step_the_same(step, first):
  cfg = tiny.make(**STEP)
  again = step(fresh(cfg), tiny.batch())
  jax.tree.map(np.testing.assert_array_equal, again[1], first[1])
  later, other = step(fresh(cfg, step=1), tiny.batch()), step(fresh(cfg, seed=1), tiny.batch())
  assert int(later[0].step) == 2
  losses = [float(metrics.loss) for _, metrics in (first, later, other)]
  assert np.ptp(losses[:2]) > 1e-4  # jitter, drops, exempt rows
  assert np.ptp(losses[1:]) > 1e-4  # (seed 0, step 1) is not (seed 1, step 0)


def test_a_balanced_layer_stays_and_the_others_move():
  cfg = tiny.make(model__moe__num_experts=4, model__moe__expert_bias__update_rule='sign')
  load = np.int32([[7, 3, 1, 5], [4, 4, 4, 4]])
  sums = router_stats.Sums(None, load, *[None] * 6)
  stats = router_stats.RouterStats(sums, 0 * load, None, None, {}, None, None)
  state = {'moe_layers': {'moe': {'expert_bias': jnp.full((2, 4), 0.5)}}}

  def move(step):
    return optimizer_step.next_router_state(cfg, state, stats, np.int32(step))

  u = np.float32(1e-3)
  got = model_variables.moe_state(move(19))['expert_bias']  # the last of 20 steps
  np.testing.assert_array_equal(got, np.float32(0.5) + np.float32([[-u, u, u, -u], [0, 0, 0, 0]]))
  jax.tree.map(np.testing.assert_array_equal, move(20), state)  # past update_until = 1
  assert (
    optimizer_step.next_router_state(cfg, state, None, 0) is state
  )  # a dense model has no loads


def test_checkpoints_keep_the_router_state(tmp_path):
  cfg = tiny.make(**STEP)
  state = fresh(cfg, step=5)
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  state = jax.device_put(state, sharding)
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state
  )
  with checkpointer.Checkpointer(tmp_path, cfg.checkpoint) as ckpt:
    assert ckpt.save(5, state, {}, force=True)
  with checkpointer.Checkpointer(tmp_path, None, read_only=True) as ckpt:
    restored = ckpt.restore(abstract).state
  assert set(model_variables.moe_state(restored.router_state)) == {
    'expert_bias',
    'loss_coefficient',
  }
  jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_a_fresh_state_has_one_state_per_moe_layer():
  cfg = tiny.make(model__moe__router='hash', model__moe__balance__adaptive__loss='switch')
  shapes = jax.eval_shape(
    lambda: model_variables.init(cfg.model, jax.random.key(0))['router_state']
  )
  state = model_variables.moe_state(shapes)
  assert {name: leaf.shape for name, leaf in state.items()} == {
    'table': (2, 32, 2),
    'loss_coefficient': (2,),
  }


# Whole models, outside of training.


@functools.cache
def forward(**overrides):
  """Jitted (variables, rows) -> (logits, loads, experts of each layer [layers, B, L, K])."""
  model = transformer.Transformer(tiny.make(**(SMALL | overrides)).model)

  def fn(variables, rows):
    keys = ('tokens', 'positions', 'segment_ids')
    out, seen = model.apply(variables, *(rows[k] for k in keys), mutable=['intermediates'])
    idx = seen['intermediates']['moe_layers']['moe']['expert_idx'][0]
    return out.logits, out.stats, idx

  return tiny.jit(fn)


def variables_of(**overrides):
  cfg = tiny.make(**(SMALL | overrides)).model
  return {'params': tiny.params(cfg), 'router_state': tiny.router_state(cfg)}


LOSS_FREE = {
  'model__moe__score_func': 'sigmoid',
  'model__moe__expert_bias__update_rule': 'sign',
  'model__moe__num_expert_groups': 4,
  'model__moe__num_limited_groups': 2,
  'model__moe__num_virtual_devices': 4,
}
REPLAY = {
  'model__moe__router': 'replay',
  'model__moe__score_func': 'sigmoid',
  'model__moe__options__replay_path': 'x',
  'model__moe__options__replay_rows': B,
  'model__moe__num_virtual_devices': 4,
}


def test_replaying_what_a_model_chose_is_that_model():
  variables = variables_of(**LOSS_FREE)
  logits, stats, idx = forward(**LOSS_FREE)(variables, tiny.batch())
  assert idx.shape == (2, B, L, 2) and (idx[0] != idx[1]).any()
  state = {'moe_layers': {'moe': {'assignments': idx}}}
  replayed = {'params': variables['params'], 'router_state': state}
  got, got_stats, _ = forward(**REPLAY)(replayed, tiny.batch())
  np.testing.assert_array_equal(got, logits)
  jax.tree.map(np.testing.assert_array_equal, got_stats.sums, stats.sums)
  # And it is what was recorded that decides: shifted by one, the loads shift.
  shifted = jnp.where(idx < E, (idx + 1) % E, E)
  replayed['router_state'] = {'moe_layers': {'moe': {'assignments': shifted}}}
  _, got_stats, _ = forward(**REPLAY)(replayed, tiny.batch())
  np.testing.assert_array_equal(got_stats.sums.load, np.roll(stats.sums.load, 1, axis=-1))


def changed(overrides, row, place):
  """[B, L] bool: whose logits change when one token does; every row is one document."""
  rows = tiny.batch(((L,),) * B)
  other = rows | {'tokens': rows['tokens'].copy()}
  other['tokens'][row, place] = (other['tokens'][row, place] + 7) % 32

  def run(rows):
    return np.asarray(forward(**overrides)(variables_of(**overrides), rows)[0])

  return (run(rows) != run(other)).any(-1)


def test_logits_depend_on_earlier_tokens_of_the_row_only():
  """To the last bit, with bias and groups, whatever the other rows and the later tokens are."""
  got = changed(LOSS_FREE, 3, 9)
  want = np.zeros((B, L), bool)
  want[3, 9:] = True
  np.testing.assert_array_equal(got, want)


def test_layers_draw_their_own_noise():
  """Half of the tokens start at expert 0, others in each layer: the layers know their numbers."""
  skewed = {'model__moe__router': 'skewed', 'model__moe__options__skew': 0.5}
  _, _, idx = forward(**skewed)(variables_of(**skewed), tiny.batch(((L,),) * B))
  first, second = np.asarray(idx)[..., 0] == 0
  # Two draws of 128 differ in half of the places: 64 +- 4 * sqrt(128 / 4) = 23.
  assert abs((first != second).sum() - 64) <= 23


def test_logits_of_expert_choice_depend_on_the_future():
  got = changed({'model__moe__router': 'expert_choice'}, 3, 9)
  assert got[3, :9].any() and not got[np.arange(B) != 3].any()
