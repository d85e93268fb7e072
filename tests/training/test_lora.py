import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.devices import partitioning
from moe_jax.training import lora, optimizer_step, train_state, trainable
from tests import tiny
from tests.training import steps

RANK, SCALE = 3, 1.5
LORA = {
  'init_from': 'base',
  'trainable__kind': 'lora',
  'trainable__lora_rank': RANK,
  'trainable__lora_alpha': RANK * SCALE,
}
MLA = {
  **tiny.MLA,
  'model__num_mtp_layers': 1,
}
FFN = ('moe/router', 'moe/gate_up', 'moe/down', 'moe/shared/gate_up', 'moe/shared/down')
DENSE_FFN = ('mlp/gate_up', 'mlp/down')


def named(tree):
  return {
    '/'.join(entry.key for entry in path): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def with_pairs(cfg, seed=1):
  """Weights with pairs whose B is random too."""
  start = functools.partial(lora.started, cfg, rng=jax.random.key(0))
  params = tiny.jit(start)(tiny.params(cfg.model))
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    return jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype) if path[-1].key == 'b' else leaf

  return params | {lora.KEY: jax.tree_util.tree_map_with_path(draw, params[lora.KEY])}


def matrices(name, weight):
  """A stacked leaf as matrices of what they read times what they make, over all other axes."""
  kind = name.split('/')[-1]
  if kind == 'gate_up':
    weight = np.moveaxis(weight, -2, -3)  # [..., gate or up, D, F]
  elif kind == 'o':
    weight = weight.reshape(*weight.shape[:-3], -1, weight.shape[-1])
  elif kind in ('q', 'k', 'v', 'q_b', 'kv_b'):
    weight = weight.reshape(*weight.shape[:-2], -1)
  return weight.reshape(-1, *weight.shape[-2:])


@pytest.mark.parametrize(
  'changes, attention',
  [({}, ('q', 'k', 'v', 'o')), (MLA, ('q_a', 'q_b', 'kv_a', 'kv_b', 'o'))],
  ids=['gqa', 'mla'],
)
def test_every_named_matrix_gets_its_delta(changes, attention):
  cfg = tiny.make(**LORA, **changes)
  params = with_pairs(cfg)
  before = named({key: value for key, value in params.items() if key != lora.KEY})
  after, pairs = named(tiny.jit(lora.merged)(params)), named(params[lora.KEY])
  assert before.keys() == after.keys()
  want = {
    f'{stack}/{part}'
    for stack, ffn in (('dense_layers', DENSE_FFN), ('moe_layers', FFN))
    for part in (*(f'attention/{name}' for name in attention), *ffn)
  }
  assert {name for name in before if not np.array_equal(before[name], after[name])} == want
  assert {*pairs} == {'scale'} | {f'{name}/{side}' for name in want for side in 'ab'}
  assert pairs['scale'] == SCALE
  for name in want:
    found = matrices(name, after[name]) - matrices(name, before[name])
    a, b = pairs[f'{name}/a'], pairs[f'{name}/b']
    if name.endswith('gate_up'):
      a = np.moveaxis(a, -2, -3)
    a = a.reshape(len(found), -1, RANK)
    b = b.reshape(len(found), RANK, -1)
    for delta, left, right in zip(found, a, b, strict=True):
      np.testing.assert_allclose(delta, SCALE * left @ right, atol=1e-5)
    assert len(found) == {'moe/gate_up': 32, 'moe/down': 16}.get(name.split('/', 1)[1], len(found))
    assert 0.7 < np.std(a) * np.sqrt(found.shape[1]) < 1.3  # what A makes is as large as its input


def test_it_starts_as_the_base_and_without_it_nothing_changes():
  cfg = tiny.make(**LORA, model__param_dtype='bfloat16')
  params = tiny.params(cfg.model)
  merged = tiny.jit(lambda p: lora.merged(lora.started(cfg, p, jax.random.key(0))))(params)
  jax.tree.map(np.testing.assert_array_equal, merged, params)
  assert jax.tree.map(lambda x: x.dtype, merged) == jax.tree.map(lambda x: x.dtype, params)
  plain = tiny.make()
  assert lora.started(plain, params, jax.random.key(0)) is params
  assert lora.merged(params) is params


def test_only_pairs_are_trained_and_lie_as_their_matrices():
  cfg = tiny.make(**LORA, mesh__data=1, mesh__fsdp=2, mesh__expert=2)
  abstract = train_state.abstract_state(cfg, partitioning.make_mesh(cfg.mesh, jax.devices()[:4]))
  pairs = abstract.params[lora.KEY]
  number = sum(leaf.size for leaf in jax.tree.leaves(pairs)) - 1
  assert trainable.count(cfg) == number
  moments = [leaf for leaf in jax.tree.leaves(abstract.opt_state) if leaf.shape]
  assert sum(leaf.size for leaf in moments) == 2 * number
  experts = pairs['moe_layers']['moe']['gate_up']
  assert experts['a'].sharding.spec == jax.P(None, 'expert', 'fsdp', None, None)
  assert experts['b'].sharding.spec == jax.P(None, 'expert', None, None, None)
  assert {leaf.dtype for leaf in jax.tree.leaves(pairs)} == {jnp.dtype('float32')}


@pytest.mark.slow
def test_gradients_are_those_of_the_merged_weights_and_the_base_stays(whole):
  """dL/dA = s dL/dW B^T and dL/dB = s A^T dL/dW, here of one expert's down and of the queries."""
  cfg, mesh = tiny.make(**steps.STEP | LORA), steps.one_device()
  start = lora.started(cfg, tiny.params(cfg.model), jax.random.key(0))
  before = jax.device_get(start)
  opt_state = train_state._opt_state(cfg, start)
  state = train_state.TrainState(
    jnp.int32(0), jnp.uint32(0), jax.tree.map(jnp.copy, start), {}, opt_state
  )
  with partitioning.activate(mesh):
    lowered = optimizer_step.make_train_step(cfg, mesh).lower(state, tiny.batch())
  step = lowered.compile(compiler_options={'xla_backend_optimization_level': 0})
  state, first = step(state, tiny.batch())
  np.testing.assert_allclose(first.loss, whole[0].main, rtol=1e-5)
  # Adam's first moment after one step is the gradient times 1 - beta1.
  moments = jax.device_get(state.opt_state[-1][0].mu[lora.KEY])
  full, pairs = jax.device_get(whole[1]), before[lora.KEY]
  for stack, part, kind, place in (
    ('moe_layers', 'moe', 'down', (1, 5)),
    ('dense_layers', 'attention', 'q', (0,)),
  ):
    weight = full[stack][part][kind][place]
    a = pairs[stack][part][kind]['a'][place]
    found = moments[stack][part][kind]
    want = SCALE * a.T @ weight.reshape(len(a), -1)
    got = found['b'][place].reshape(RANK, -1) / (1 - cfg.optim.beta1)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    assert not found['a'][place].any()  # B is 0

  for _ in range(9):
    state, last = step(state, tiny.batch())
  assert last.loss < first.loss - 0.1
  after = jax.device_get(state.params)
  moved = [tree.pop(lora.KEY) for tree in (before, after)]
  jax.tree.map(np.testing.assert_array_equal, before, after)
  assert moved[0].pop('scale') == moved[1].pop('scale') == np.float32(SCALE)
  for a, b in zip(*(jax.tree.leaves(tree) for tree in moved), strict=True):
    assert not np.array_equal(a, b)
