"""A client's round against the sheet's steps, written out with autodiff and a plain loop."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.federated import client, encoders, heads, losses, rounds, settings

# One batch holds all samples, so that neither their order nor the balanced set's draw matters.
CFG = settings.resolve(
  settings.Settings(batch_size=64, epochs=3, threshold=4, correction=0.3, clip_norm=0.5)
)
COUNTS = (6, 4, 2)  # of the first three classes; the third has too few to balance by itself


def samples(images, counts=COUNTS, fill: int = 0) -> client.Samples:
  rows = np.concatenate([np.flatnonzero(images.train_y == c)[:n] for c, n in enumerate(counts)])
  x, y, real = images.train_x[rows], images.train_y[rows], np.ones(len(rows), bool)
  pad = [(0, fill)]
  return client.Samples(
    *(jnp.array(np.pad(a, pad + [(0, 0)] * (a.ndim - 1))) for a in (x, y, real))
  )


def sent(cfg, known=(0, 2, 5), scale=1.0) -> client.Broadcast:
  state = START(cfg)
  rng = np.random.default_rng(1)
  prototypes = jax.tree.map(lambda w: scale * rng.normal(size=w.shape), state.prototypes)
  params = {name: part for name, part in state.params.items()}
  return client.Broadcast(
    params=params,
    gradient_head=params['main'],
    prototypes=jax.tree.map(jnp.float32, prototypes),
    known=jnp.isin(jnp.arange(10), jnp.array(known, int)),
    class_weights=jnp.arange(10) + 1.0,
  )


@functools.cache
def START(cfg):  # noqa: N802
  return jax.jit(functools.partial(rounds.init, cfg))(jax.random.key(0))


@functools.cache
def compiled(cfg):
  return jax.jit(functools.partial(client.update, cfg))


def run(cfg, broadcast, data, key=0):
  return compiled(cfg)(broadcast, {}, data, jax.random.key(key))


def mean_loss(cfg, params, data, balanced=None):
  """Of the batch with both heads; of the balanced samples by the main head on fixed features."""
  if balanced is not None:
    features = encoders.encode(cfg, params['encoder'], data.x[balanced])
    found = heads.logits(params['main'], jax.lax.stop_gradient(features))
    return losses.cross_entropy(found, data.y[balanced]).mean()
  features = encoders.encode(cfg, params['encoder'], data.x)
  found = heads.logits(params['main'], features) + heads.logits(params['extra'], features)
  return losses.cross_entropy(found, data.y).mean()


def written_out(cfg, broadcast, data, balanced):
  """Section 3 of the paper's code, step by step; classes 0 and 1 are balanced by real samples."""
  gradient = jax.jit(jax.grad(functools.partial(mean_loss, cfg)))
  real_gradient = jax.jit(jax.grad(functools.partial(mean_loss, cfg, balanced=np.array(balanced))))
  params = broadcast.params
  velocity = jax.tree.map(np.zeros_like, params)
  for _ in range(cfg.epochs):
    g_real = real_gradient(params, data)['main']
    g_bal = {  # |L| = 2; of the known classes 0, 2 and 5 the last two are not in L
      name: (2 * g_real[name] + 8 * broadcast.prototypes[name][np.array([2, 5])].mean(axis=0)) / 10
      for name in g_real
    }
    local = jax.device_get(gradient(params, data))
    norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(local)))
    assert norm > cfg.clip_norm, 'nothing would be clipped'
    velocity = jax.tree.map(lambda v, g, n=norm: 0.9 * v + g * cfg.clip_norm / n, velocity, local)
    params = jax.tree.map(lambda p, v: np.asarray(p - cfg.learning_rate * v), params, velocity)
    for name, g in g_bal.items():
      factor = np.linalg.norm(local['main'][name]) / np.linalg.norm(g)
      params['main'][name] = params['main'][name] - cfg.learning_rate * 0.3 * factor * g
  return params


def close(a, b, tolerance=2e-5):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=tolerance), a, b)


def test_redgrape_does_what_is_written_out(images):
  # Four of the six samples of class 0 would be drawn: all its samples are the same here.
  data = samples(images)
  data = data._replace(x=data.x.at[:6].set(data.x[0]))
  broadcast = sent(CFG)
  found = run(CFG, broadcast, data)
  close(found.params, written_out(CFG, broadcast, data, [0, 1, 2, 3, 6, 7, 8, 9]))
  assert found.samples == 12 and found.present.tolist() == [True] * 3 + [False] * 7


def test_a_first_round_and_lambda_zero_are_the_plain_step_with_two_heads(images):
  data, first = samples(images), sent(CFG, known=())
  plain = run(dataclasses.replace(CFG, method='head_only'), first, data).params
  close(run(CFG, first, data).params, plain, 0)
  close(run(dataclasses.replace(CFG, correction=0.0), sent(CFG), data).params, plain, 0)
  with pytest.raises(AssertionError):
    close(run(CFG, sent(CFG), data).params, plain)


def test_a_client_with_all_classes_uses_no_prototype(images):
  cfg = dataclasses.replace(CFG, threshold=1)
  everything = samples(images, (1,) * 10)
  known = range(10)
  one, other = (run(cfg, sent(cfg, known, scale), everything).params for scale in (1.0, 50.0))
  close(one, other, 0)
  lacking = samples(images, (2,) + (1,) * 8)  # as many samples, but none of the last class
  one, other = (run(cfg, sent(cfg, known, scale), lacking).params for scale in (1.0, 50.0))
  with pytest.raises(AssertionError):
    close(one, other)


def test_prototypes_are_those_of_the_received_model(images):
  data, broadcast = samples(images, fill=3), sent(CFG)
  found = run(CFG, broadcast, data)
  features = encoders.encode(CFG, broadcast.params['encoder'], data.x)
  means, counts = heads.class_means(data.y, data.real, 10)
  expected = heads.weighted_gradients(broadcast.params['main'], features, data.y, means)
  close(found.gradients, expected)
  assert counts.tolist() == [6, 4, 2] + [0] * 7
  each = losses.cross_entropy(heads.logits(broadcast.params['main'], features), data.y)
  np.testing.assert_allclose(found.loss, each[:12].mean(), rtol=1e-5)


def test_what_fills_up_a_client_changes_nothing(images):
  cfg = dataclasses.replace(CFG, batch_size=12)
  data, filled = samples(images), samples(images, fill=13)  # one batch, and two that are empty
  data, filled = (d._replace(x=d.x.at[:6].set(d.x[0])) for d in (data, filled))
  close(run(cfg, sent(cfg), filled).params, run(cfg, sent(cfg), data).params)


def test_an_epoch_takes_every_sample_once():
  real = jnp.arange(11) < 8
  rows, used = client.batches(real, 3, 4, jax.random.key(0))
  assert rows.shape == used.shape == (9, 4)
  for epoch in range(3):
    part = slice(3 * epoch, 3 * epoch + 3)
    assert sorted(rows[part][used[part]].tolist()) == list(range(8))
    assert used[part].sum(axis=1).tolist() == [4, 4, 0]
  assert len({tuple(rows[i].tolist()) for i in (0, 3, 6)}) > 1, 'the same order in each epoch'


def test_the_balanced_set_has_threshold_samples_of_each_class_that_has_enough(images):
  data = samples(images, (9, 3, 4, 0, 5), fill=4)
  counts = jnp.array([9, 3, 4, 0, 5] + [0] * 5)
  found = client.balanced_set(data, counts, 4, jax.random.key(0))
  assert found.classes.tolist() == [True, False, True, False, True] + [False] * 5
  assert found.weights.shape == (40,) and found.x.shape == (40, 8, 8, 1)
  np.testing.assert_allclose(found.weights.reshape(10, 4), found.classes[:, None] * np.ones(4) / 12)
  of_class = {
    c: {bytes(np.asarray(x)) for x in data.x[(data.y == c) & data.real]} for c in range(5)
  }
  for c in (0, 2, 4):
    drawn = {bytes(np.asarray(x)) for x in found.x[4 * c : 4 * c + 4]}
    assert len(drawn) == 4 and drawn <= of_class[c]
  other = client.balanced_set(data, counts, 4, jax.random.key(1))
  assert (found.x[:4] != other.x[:4]).any()
  short = client.balanced_set(
    samples(images, (2, 1)), jnp.array([2, 1] + [0] * 8), 4, jax.random.key(0)
  )
  assert not short.classes.any() and not short.weights.any()
