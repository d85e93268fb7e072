"""The first module that is not finite is named by layer, expert and matrix, with its rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.analysis import first_nonfinite
from tests import tiny

CFG = tiny.make(model__num_mtp_layers=1, train__micro_batch_size=4)
SEED = jnp.uint32(3)


def changed(path, index, value):
  """The tiny weights with some entries of one array set."""
  *names, last = path.split('/')
  params = jax.tree.map(lambda x: x, tiny.params(CFG.model))
  tree = params
  for name in names:
    tree = tree[name]
  tree[last] = tree[last].at[index].set(value)
  return params


def variables(params):
  return {'params': params, 'router_state': {}}


@pytest.mark.parametrize(
  'path, index, where',
  [
    ('embedding', (7, 3), 'embedding at [7, 3]'),
    ('dense_layers/mlp/gate_up', (0, 1, 1, 2), 'layer 0, mlp/gate_up (up) at [1, 2]'),
    ('moe_layers/attention/o', (1, 0, 2, 3), 'layer 2, attention/o at [0, 2, 3]'),
    ('moe_layers/moe/gate_up', (1, 5, 2, 0, 3), 'layer 2, expert 5, moe/gate_up (gate) at [2, 3]'),
    ('moe_layers/moe/down', (0, 6, 2, 1), 'layer 1, expert 6, moe/down at [2, 1]'),
    ('moe_layers/moe/shared/down', (0, 2, 1), 'layer 1, moe/shared/down at [2, 1]'),
    ('mtp_layers/block/moe/router', (0, 2, 1), 'layer 3, block/moe/router at [2, 1]'),
    ('head', (2, 1), 'head at [2, 1]'),
  ],
)
def test_a_weight(path, index, where):
  params = changed(path, index, jnp.nan)
  found = first_nonfinite.in_weights(CFG.model, variables(params))
  assert found == first_nonfinite.Found('weight', where)


def test_the_first_of_several_weights_in_forward_order():
  params = changed('moe_layers/moe/gate_up', (1, 0, 0, 0, 0), jnp.inf)
  params['moe_layers']['attention']['q'] = params['moe_layers']['attention']['q'].at[1].set(jnp.nan)
  params['head'] = params['head'].at[0, 0].set(jnp.nan)
  state = {'moe_layers': {'moe': {'expert_bias': jnp.array([[0.0, 0.0], [jnp.nan, 0.0]])}}}
  found = first_nonfinite.in_weights(CFG.model, {'params': params, 'router_state': state})
  assert found.where == 'layer 2, attention/q at [0, 0, 0]'
  assert first_nonfinite.in_weights(CFG.model, variables(tiny.params(CFG.model))) is None


def test_a_gradient_is_the_one_that_the_backward_pass_met_first():
  grads = jax.tree.map(jnp.zeros_like, tiny.params(CFG.model))
  assert first_nonfinite.in_gradients(CFG.model, grads) is None
  for name in ('embedding', 'head'):
    grads[name] = grads[name].at[0, 0].set(jnp.nan)
  moe = grads['moe_layers']['moe']
  grads['head'] = jnp.zeros_like(grads['head'])
  moe['down'] = moe['down'].at[0, 2, 1, 1].set(jnp.nan).at[1, 3, 0, 1].set(jnp.nan)
  found = first_nonfinite.in_gradients(CFG.model, grads)
  assert found.where == 'layer 2, expert 3, moe/down at [0, 1]'


def test_a_token_outside_of_the_vocabulary():
  rows = tiny.batch()
  assert first_nonfinite.in_batch(CFG.model, rows) is None
  rows['tokens'][3, 2] = 99
  found = first_nonfinite.in_batch(CFG.model, rows)
  assert found == first_nonfinite.Found('batch', 'token 99 at 2, outside of vocab_size=32', (3,))


@pytest.mark.slow  # compiles the watched model
@pytest.mark.parametrize(
  'path, index, value, where',
  [
    (None, None, None, None),
    # gate x up of expert 5 overflows; its first products do not.
    ('moe_layers/moe/gate_up', (1, 5), 1e25, 'layer 2, expert 5, moe/swiglu'),
    ('moe_layers/moe/down', (0, 2), 3e38, 'layer 1, expert 2, moe/down'),
    ('moe_layers/moe/shared/down', (0,), 3e38, 'layer 1, moe/shared'),
    ('moe_layers/attention/o', (1,), 3e38, 'layer 2, attention'),
    ('dense_layers/ffn_norm/scale', (0,), 3e38, 'layer 0, ffn_norm'),
    ('head', (slice(None), 4), 3e38, 'head'),
  ],
)
def test_an_activation(path, index, value, where):
  params = tiny.params(CFG.model) if path is None else changed(path, index, value)
  rows = tiny.batch()
  found = first_nonfinite.in_activations(CFG, tiny.mesh(1), variables(params), rows, SEED)
  if path is None:
    assert found is None
  else:
    assert (found.kind, found.where) == ('activation', where)
    assert found.rows and set(found.rows) <= {0, 2, 4, 6}  # of the first micro-batch


@pytest.mark.parametrize('stack, names', [('moe_layers', 'moe'), ('mtp_layers', 'block/moe')])
def test_an_expert_is_looked_for_in_every_kind_of_layer(stack, names, monkeypatch):
  flags = {f'{stack}/{names}': np.array([[True, False]])}
  monkeypatch.setattr(first_nonfinite, '_watched', lambda *unused: flags)
  asked = []
  monkeypatch.setattr(first_nonfinite, '_expert', lambda *given: asked.append(given[-2:]) or 'it')
  rows = {key: value[:2] for key, value in tiny.batch().items()}
  cfg = tiny.make(model__num_mtp_layers=1)
  found = first_nonfinite.in_activations(cfg, tiny.mesh(1), {}, rows, SEED)
  assert found == first_nonfinite.Found('activation', 'it', (1,))
  assert asked == [((stack, *names.split('/')), 0)]


@pytest.mark.slow
def test_a_whole_step_is_taken_again():
  cfg = tiny.make(train__micro_batch_size=4)
  params = dict(tiny.params(cfg.model))
  state = {'seed': SEED, 'params': params, 'router_state': {}}
  fine = first_nonfinite.replay(cfg, tiny.mesh(1), state, tiny.batch(), 4)
  assert np.isfinite(fine.loss) and fine.grad_norm > 0 and fine.found is None
  params['head'] = params['head'].at[1, 2].set(jnp.inf)
  bad = first_nonfinite.replay(cfg, tiny.mesh(1), state, tiny.batch(), 4)
  assert not np.isfinite(bad.loss) and bad.found.where == 'head at [1, 2]'
