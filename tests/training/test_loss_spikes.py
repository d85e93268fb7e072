"""The rule for loss spikes beside a loop of numpy, and a step that it skips."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import errors
from moe_jax.devices import partitioning
from moe_jax.training import loss_spikes, optimizer_step, train_state
from tests import tiny


def by_hand(losses, norms, step, window, sigma):
  """Whether step `step` is skipped, with lists."""
  finite = [i for i in range(step) if np.isfinite(losses[i]) and np.isfinite(norms[i])][-window:]
  if len(finite) < max(2, window // 2):
    return False
  return any(
    values[step] - np.mean([values[i] for i in finite])
    > sigma * np.std([values[i] for i in finite], ddof=1)
    for values in (losses, norms)
  )


def test_the_rule_is_the_loop():
  rng = np.random.default_rng(0)
  losses, norms = 4 + 0.1 * rng.standard_normal(60), 1 + 0.1 * rng.standard_normal(60)
  losses[[2, 30, 31, 50]], norms[40], losses[35], norms[36] = 9.0, 4.0, np.nan, np.inf
  losses[57] = 0.0  # far below is no spike
  state, step = loss_spikes.recent(8).init({}), jax.jit(loss_spikes.with_figures)
  got = []
  for loss, norm in zip(losses.astype(np.float32), norms.astype(np.float32)):
    got.append(bool(loss_spikes.is_spike(state, loss, norm, 6.0)))
    state = step(state, loss, norm)
  want = [by_hand(losses, norms, i, 8, 6.0) for i in range(60)]
  assert got == want and got[30] and got[40] and got[50] and not got[2] and not got[57]
  assert int(state.seen) == 58


def test_figures_by_hand():
  """Of 1, 2, 3 the mean is 2 and the deviation 1 (with n - 1): two of them above are 4."""
  losses, norms = jnp.array([1.0, 2, 3, 99, 99, 99]), jnp.array([10.0, 20, 30, 0, 0, 0])

  def found(seen, loss, norm):
    state = loss_spikes.RecentFigures(losses, norms, jnp.int32(seen))
    return bool(loss_spikes.is_spike(state, jnp.float32(loss), jnp.float32(norm), 2.0))

  assert [found(3, loss, 0) for loss in (3.9, 4.1)] == [False, True]
  assert [found(3, 0, norm) for norm in (39, 41)] == [False, True]
  assert not found(2, 50, 500)  # less than half of the window was seen


def test_a_spike_is_skipped_and_lasting_ones_are_not():
  cfg = tiny.make(optim__spike_sigma=6.0, optim__spike_window=4, train__max_skipped_steps=1)
  mesh = tiny.mesh(1)
  with partitioning.activate(mesh):
    state = train_state.init_state(cfg, mesh)
    step = jax.jit(optimizer_step.step_function(cfg))
    batch = partitioning.put_batch(tiny.batch(), mesh)

    def after(state, figures):
      kept = jax.tree.map(
        lambda node: figures if isinstance(node, loss_spikes.RecentFigures) else node,
        state.opt_state,
        is_leaf=lambda node: isinstance(node, loss_spikes.RecentFigures),
      )
      return step(state.replace(opt_state=kept), batch)

    def window(loss, norm):
      return loss_spikes.RecentFigures(jnp.full(4, loss), jnp.full(4, norm), jnp.int32(4))

    quiet = window(0.0, 99.0)
    _, metrics = after(state, quiet)
    applied, metrics = after(state, window(metrics.loss, metrics.grad_norm))  # no higher than these
    assert int(metrics.skipped.total) == 0
    skipped, metrics = after(state, quiet)
    assert int(metrics.skipped.total) == 1
    jax.tree.map(np.testing.assert_array_equal, skipped.params, state.params)
    (figures,) = [n for n in skipped.opt_state if isinstance(n, loss_spikes.RecentFigures)]
    assert float(figures.losses[0]) == float(metrics.loss) and int(figures.seen) == 5
    again, metrics = after(skipped, quiet)  # one more in a row than may be skipped
    assert int(metrics.skipped.total) == 1 and int(metrics.skipped.in_row) == 0
    assert not np.array_equal(again.params['head'], state.params['head'])
    assert not np.array_equal(applied.params['head'], state.params['head'])


def test_without_the_rule_the_state_is_what_it_was():
  leaves = {}
  for sigma in (0.0, 6.0):
    cfg = tiny.make(optim__spike_sigma=sigma)
    leaves[sigma] = len(jax.tree.leaves(train_state.abstract_state(cfg, tiny.mesh(1))))
  assert leaves[6.0] == leaves[0.0] + 3


def test_a_rule_that_may_skip_nothing_is_refused():
  with pytest.raises(errors.InputError, match='spike_sigma=6.0 skips steps'):
    tiny.make(optim__spike_sigma=6.0, train__max_skipped_steps=0)
