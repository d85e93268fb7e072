"""Trains a network on several splits and seeds of one graph in one compiled program.

`fit` maps `_one_run` over runs, `together` of them side by side by vmap: one at a time suits the
caches of a CPU, all at once an accelerator. A run ends early for itself: the weighted F1 of its
validation nodes chooses the epoch whose predictions count. As in the code of ReNode's authors: Adam
at 0.0075, times 0.95 per epoch after epoch 20, at least 1e-4; 40 to 200 epochs, patience 20.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from moe_jax import errors
from moe_jax.graphs import class_losses, metrics, networks, structs


@dataclasses.dataclass(frozen=True)
class Settings:
  """How networks are trained; the defaults are those of ReNode's authors."""

  hidden: int = 32
  dropout: float = 0.5
  epochs: int = 200
  least_epochs: int = 40
  patience: int = 20  # epochs without a better validation F1
  loss: str = 'cross_entropy'

  def check(self):
    """Raises errors.InputError for what cannot be trained."""
    errors.require(
      self.loss in class_losses.LOSSES,
      f'loss={self.loss!r} must be one of {", ".join(class_losses.LOSSES)}'
      f'{errors.did_you_mean(self.loss, class_losses.LOSSES)}',
    )
    errors.require(
      self.epochs >= 1 and self.hidden >= 1 and self.patience >= 1,
      f'epochs={self.epochs}, hidden={self.hidden} and patience={self.patience} must be at least 1',
    )
    errors.require(
      self.hidden % networks.HEADS == 0,
      f'hidden={self.hidden} must be a multiple of {networks.HEADS}, the heads of GAT',
    )
    errors.require(0 <= self.dropout < 1, f'dropout={self.dropout} must be at least 0 and below 1')


class Schedule(NamedTuple):
  """Learning rates; another one needs no other compiled program."""

  learning_rate: float = 0.0075
  decay: float = 0.95  # of the rate per epoch; 1 for a constant rate
  decay_after: int = 20  # epochs
  least_rate: float = 1e-4

  def rate(self, epoch: jax.Array) -> jax.Array:
    """Returns the learning rate of an epoch, the first being 1."""
    decayed = self.learning_rate * self.decay ** jnp.maximum(epoch - self.decay_after, 0)
    return jnp.maximum(decayed, self.least_rate)


OFFICIAL = Schedule()  # of ReNode's authors


class Runs(NamedTuple):
  """What differs between runs; every array begins with [runs]."""

  seeds: jax.Array  # [runs] of weights and dropout
  train: jax.Array  # [runs, nodes] bool
  valid: jax.Array  # [runs, nodes] bool
  weights: jax.Array  # [runs, nodes] of labelled nodes' losses, 1 without ReNode


class Fitted(NamedTuple):
  """What the runs gave; every array begins with [runs]."""

  predicted: jax.Array  # [runs, nodes] classes at the best epoch
  best_epoch: jax.Array  # [runs]
  epochs: jax.Array  # [runs] trained
  train_accuracy: jax.Array  # [runs] after the last epoch
  loss: jax.Array  # [runs] of the last epoch, with dropout


class _State(NamedTuple):
  epoch: jax.Array
  params: Any
  optimizer: Any
  best: jax.Array  # weighted F1 of validation
  best_epoch: jax.Array
  predicted: jax.Array
  train_accuracy: jax.Array
  loss: jax.Array


def fit(
  name: str,
  prepared: tuple[structs.Operator, jax.Array],
  labels: jax.Array,
  num_classes: int,
  runs: Runs,
  settings: Settings,
  schedule: Schedule = OFFICIAL,
  together: int = 1,
) -> Fitted:
  """Trains a network once per run.

  Args:
    name: a key of `networks.NETWORKS`.
    prepared: what that network's `prepare` gave.
    labels: [nodes] classes, -1 where unknown.
    num_classes: number of classes.
    runs: splits, weights and seeds.
    settings: how to train.
    schedule: at which rates.
    together: runs that are trained side by side.

  Raises:
    errors.InputError: settings that cannot be trained.
  """
  settings.check()
  errors.require(together >= 1, f'together={together} must be at least 1')
  together = min(together, runs.seeds.shape[0])
  operator, x = prepared
  return _fit(name, operator, x, labels, runs, schedule, num_classes, settings, together)


@functools.partial(jax.jit, static_argnames=('name', 'num_classes', 'settings', 'together'))
def _fit(
  name: str,
  operator: structs.Operator,
  x: jax.Array,
  labels: jax.Array,
  runs: Runs,
  schedule: Schedule,
  num_classes: int,
  settings: Settings,
  together: int,
) -> Fitted:
  sizes = networks.Sizes(settings.hidden, num_classes, settings.dropout)
  module = networks.NETWORKS[name].module(sizes)

  def one(run: Runs) -> Fitted:
    known = jnp.maximum(labels, 0)
    return _one_run(module, operator, x, known, run, schedule, num_classes, settings)

  return jax.lax.map(one, runs, batch_size=together)


def loss_of_labelled(
  logits: jax.Array, labels: jax.Array, train: jax.Array, weights: jax.Array, kind: str
) -> jax.Array:
  """Returns sum_v w_v loss_v over labelled nodes v, over their number (ReNode, equations 6 and 7).

  Args:
    logits: [nodes, classes].
    labels: [nodes] classes.
    train: [nodes] bool.
    weights: [nodes].
    kind: of `class_losses.LOSSES`.
  """
  members = jax.nn.one_hot(labels, logits.shape[-1]) * train[:, None]
  losses = class_losses.per_node(kind, logits, labels, members.sum(0))
  return jnp.sum(jnp.where(train, weights * losses, 0)) / jnp.sum(train)


def _one_run(
  module: Any,
  operator: structs.Operator,
  x: jax.Array,
  labels: jax.Array,
  run: Runs,
  schedule: Schedule,
  num_classes: int,
  settings: Settings,
) -> Fitted:
  """`fit` of a single run, whose arrays are without [runs]."""
  start_key, dropout_key = jax.random.split(jax.random.key(run.seeds))
  params = module.init(start_key, operator, x, train=False)
  adam = optax.scale_by_adam()

  def loss_fn(params: Any, epoch: jax.Array) -> jax.Array:
    keys = {'dropout': jax.random.fold_in(dropout_key, epoch)}
    logits = module.apply(params, operator, x, train=True, rngs=keys)
    return loss_of_labelled(logits, labels, run.train, run.weights, settings.loss)

  def step(state: _State) -> _State:
    epoch = state.epoch + 1
    loss, gradient = jax.value_and_grad(loss_fn)(state.params, epoch)
    direction, optimizer = adam.update(gradient, state.optimizer)
    rate = schedule.rate(epoch)
    params = jax.tree.map(lambda p, d: p - rate * d, state.params, direction)
    predicted = module.apply(params, operator, x, train=False).argmax(-1).astype(jnp.int32)
    score, _ = metrics.f1(predicted, labels, run.valid, num_classes)
    better = score > state.best
    return _State(
      epoch,
      params,
      optimizer,
      jnp.where(better, score, state.best),
      jnp.where(better, epoch, state.best_epoch),
      jnp.where(better, predicted, state.predicted),
      metrics.accuracy(predicted, labels, run.train),
      loss,
    )

  def goes_on(state: _State) -> jax.Array:
    stale = state.epoch - state.best_epoch > settings.patience
    return (state.epoch < settings.epochs) & ~(stale & (state.epoch > settings.least_epochs))

  zero = jnp.zeros((), jnp.int32)
  start = _State(
    zero, params, adam.init(params), jnp.float32(-1), zero, jnp.zeros_like(labels, jnp.int32),
    jnp.float32(0), jnp.float32(0),
  )  # fmt: skip
  end = jax.lax.while_loop(goes_on, step, start)
  return Fitted(end.predicted, end.best_epoch, end.epoch, end.train_accuracy, end.loss)
