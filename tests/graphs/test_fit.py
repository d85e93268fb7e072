import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax import errors
from moe_jax.graphs import block_model, fit, metrics, networks, splits

SETTINGS = fit.Settings(hidden=4, epochs=20, least_epochs=2, patience=3)
SCHEDULE = fit.Schedule(learning_rate=0.02, decay=0.9, decay_after=3, least_rate=0.015)


@functools.cache
def case():
  """A block graph, what GCN is given of it, and two runs."""
  data = block_model.sample(60, 0, num_classes=3, signal=2.0)
  chosen = [splits.balanced(data.labels, seed, 4, 4) for seed in (0, 1)]
  weights = np.random.default_rng(0).uniform(0.5, 1.5, (2, 60)).astype(np.float32)
  runs = fit.Runs(
    np.array([5, 6]),
    np.stack([split.train for split in chosen]),
    np.stack([split.valid for split in chosen]),
    weights,
  )
  prepared = networks.NETWORKS['gcn'].prepare(data.graph, jnp.asarray(data.features))
  return data, prepared, runs


def step_by_step(settings, run):
  """The epochs of a run in a Python loop, with optax's Adam in place of ours."""
  data, (operator, x), runs = case()
  seed, train, valid, weights = (leaf[run] for leaf in runs)
  module = networks.GCN(networks.Sizes(settings.hidden, 3, settings.dropout))
  start, dropout = jax.random.split(jax.random.key(seed))
  params = module.init(start, operator, x, train=False)
  adam = optax.inject_hyperparams(optax.adam)(SCHEDULE.learning_rate)
  state = adam.init(params)
  nodes = np.flatnonzero(train)

  @jax.jit
  def gradient(params, epoch):
    def loss(params):
      rngs = {'dropout': jax.random.fold_in(dropout, epoch)}
      logits = module.apply(params, operator, x, train=True, rngs=rngs)[nodes]
      return jnp.mean(
        weights[nodes] * optax.softmax_cross_entropy_with_integer_labels(logits, data.labels[nodes])
      )

    return jax.value_and_grad(loss)(params)

  evaluate = jax.jit(lambda params: module.apply(params, operator, x, train=False).argmax(-1))
  best, best_epoch, best_said, loss = -1.0, 0, None, 0.0
  for epoch in range(1, settings.epochs + 1):
    loss, grads = gradient(params, epoch)
    rate = SCHEDULE.learning_rate * SCHEDULE.decay ** max(epoch - SCHEDULE.decay_after, 0)
    state.hyperparams['learning_rate'] = max(rate, SCHEDULE.least_rate)
    updates, state = adam.update(grads, state)
    params = optax.apply_updates(params, updates)
    said = evaluate(params)
    score = float(metrics.f1(said, data.labels, valid, 3)[0])
    if score > best:
      best, best_epoch, best_said = score, epoch, said
    if epoch > settings.least_epochs and epoch - best_epoch > settings.patience:
      break
  return np.asarray(best_said), best_epoch, epoch, float(loss)


def test_runs_side_by_side_are_loops_over_their_epochs():
  data, prepared, runs = case()
  found = fit.fit('gcn', prepared, data.labels, 3, runs, SETTINGS, SCHEDULE, together=2)
  for run in (0, 1):
    said, best_epoch, epochs, loss = step_by_step(SETTINGS, run)
    assert int(found.epochs[run]) == epochs and int(found.best_epoch[run]) == best_epoch
    assert (np.asarray(found.predicted[run]) == said).all()
    assert float(found.loss[run]) == pytest.approx(loss, rel=1e-4)
  assert len(set(found.epochs.tolist())) == 2, 'no run goes on while another has ended'


def test_the_loss_of_labelled_nodes_by_hand():
  logits = jnp.log(jnp.array([[0.5, 0.5], [0.25, 0.75], [0.9, 0.1]]))
  train, weights = jnp.array([True, True, False]), jnp.array([0.5, 1.5, 9.0])
  found = fit.loss_of_labelled(logits, jnp.array([0, 1, 1]), train, weights, 'cross_entropy')
  # Two labelled nodes, whatever their weights sum to.
  assert float(found) == pytest.approx((0.5 * np.log(2) + 1.5 * np.log(4 / 3)) / 2, rel=1e-5)
  # Class sizes are those of labelled nodes: 1 and 1, so re-weighting changes nothing.
  again = fit.loss_of_labelled(logits, jnp.array([0, 1, 1]), train, weights, 're_weight')
  assert float(again) == pytest.approx(float(found))


def test_the_rate_by_hand():
  rates = [float(fit.Schedule().rate(jnp.int32(epoch))) for epoch in (1, 20, 21, 22, 200)]
  want = [0.0075, 0.0075, 0.0075 * 0.95, 0.0075 * 0.95**2, 1e-4]
  np.testing.assert_allclose(rates, want, rtol=1e-6)


def test_what_cannot_be_trained_is_refused():
  data, prepared, runs = case()
  for change, words in (
    ({'loss': 'focus'}, "loss='focus' must be one of .*; did you mean 'focal'"),
    ({'hidden': 6}, 'hidden=6 must be a multiple of 4'),
    ({'epochs': 0}, 'epochs=0'),
    ({'dropout': 1.0}, 'dropout=1.0 must be'),
  ):
    with pytest.raises(errors.InputError, match=words):
      fit.fit('gcn', prepared, data.labels, 3, runs, fit.Settings(**change))
  with pytest.raises(errors.InputError, match='together=0'):
    fit.fit('gcn', prepared, data.labels, 3, runs, SETTINGS, together=0)
