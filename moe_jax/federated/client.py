"""What a client does in a round: prototypes at the received model, then local steps in one scan."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import trees
from moe_jax.federated import encoders, heads, losses
from moe_jax.federated import settings as settings_lib

Array = jax.Array


class Samples(NamedTuple):
  """One client's data, as in `partition.Clients`."""

  x: Array  # [rows, height, width, channels]
  y: Array  # [rows]
  real: Array  # [rows]


class Broadcast(NamedTuple):
  """What the server sends to every client of a round."""

  params: trees.Params  # encoder, main and, where it is shared, extra
  gradient_head: heads.Head  # where class gradients are taken: the main head; of CReFF its own
  prototypes: heads.Head  # gradients of the main head by class
  known: Array  # [classes], which of them there are
  class_weights: Array  # [classes], of the ratio loss


class Update(NamedTuple):
  """What a client sends back."""

  params: trees.Params
  samples: Array  # how many it has
  loss: Array  # mean cross-entropy of the received model on all of them
  gradients: heads.Head  # mean gradient of the gradient head by class
  present: Array  # [classes], which of them it has


class Pick(NamedTuple):
  """The balanced set of a round: equally many samples of each class that has enough."""

  x: Array  # [classes * threshold, height, width, channels]
  y: Array  # [classes * threshold]
  weights: Array  # [classes * threshold], whose sum is 1, or 0 where no class has enough
  classes: Array  # [classes], which have enough


class Batches(NamedTuple):
  """What the steps of a round take."""

  rows: Array  # [steps, batch_size], numbers of samples
  used: Array  # [steps, batch_size], which of them count
  keys: Array  # [steps], of the dropout


def update(
  settings: settings_lib.Settings,
  sent: Broadcast,
  own: trees.Params,
  samples: Samples,
  key: Array,
) -> Update:
  """A client's round (RedGrape, section 3; the other methods leave parts out).

  Args:
    settings: of the run.
    sent: what the server sent.
    own: parameters that the client keeps for itself: {'extra': ...} or nothing.
    samples: the client's data.
    key: decides order, dropout and the balanced set.
  """
  received, pick, steps = begin(settings, sent, own, samples, key)

  def scanned(carry: tuple[trees.Params, trees.Params], batch: Batches):
    return step(settings, sent, samples, pick, carry, batch), None

  still = jax.tree.map(jnp.zeros_like, received.params)
  (trained, _), _ = jax.lax.scan(scanned, (received.params, still), steps)
  return received._replace(params=trained)


def begin(
  settings: settings_lib.Settings,
  sent: Broadcast,
  own: trees.Params,
  samples: Samples,
  key: Array,
) -> tuple[Update, Pick, Batches]:
  """What `update` does before its steps; its `Update` still has the received parameters."""
  params = sent.params | own
  order_key, pick_key, step_key = jax.random.split(key, 3)
  features = encoders.encode(settings, params['encoder'], samples.x)
  means, counts = heads.class_means(samples.y, samples.real, settings.data.classes)
  found = losses.cross_entropy(heads.logits(params['main'], features), samples.y)
  rows, used = batches(samples.real, settings.epochs, settings.batch_size, order_key)
  received = Update(
    params=params,
    samples=samples.real.sum(),
    loss=(found * samples.real).sum() / samples.real.sum(),
    gradients=heads.weighted_gradients(sent.gradient_head, features, samples.y, means),
    present=counts > 0,
  )
  pick = balanced_set(samples, counts, settings.threshold, pick_key)
  return received, pick, Batches(rows, used, jax.random.split(step_key, len(rows)))


def balanced_set(samples: Samples, counts: Array, threshold: int, key: Array) -> Pick:
  """Draws `threshold` samples of every class that has at least so many.

  Args:
    samples: the client's data.
    counts: its samples of each class, [classes].
    threshold: how many.
    key: decides which.
  """
  classes, slots = len(counts), min(threshold, len(samples.y))
  enough = counts >= threshold
  member = (samples.y == jnp.arange(classes)[:, None]) & samples.real
  order = jnp.argsort(jnp.where(member, jax.random.uniform(key, samples.y.shape), 2), axis=1)
  rows = order[:, :slots].ravel()
  weights = jnp.repeat(enough / jnp.maximum(enough.sum() * slots, 1), slots)
  return Pick(samples.x[rows], jnp.repeat(jnp.arange(classes), slots), weights, enough)


def batches(real: Array, epochs: int, size: int, key: Array) -> tuple[Array, Array]:
  """Row numbers of each step, [steps, size], in a new order each epoch, and which of them count."""
  steps = -(-len(real) // size)

  def epoch(key: Array) -> tuple[Array, Array]:
    order = jnp.argsort(jnp.where(real, jax.random.uniform(key, real.shape), 2))
    fill = steps * size - len(real)
    return jnp.pad(order, (0, fill)), jnp.pad(real[order], (0, fill))

  rows, used = jax.vmap(epoch)(jax.random.split(key, epochs))
  return rows.reshape(-1, size), used.reshape(-1, size)


def step(
  settings: settings_lib.Settings,
  sent: Broadcast,
  samples: Samples,
  pick: Pick,
  carry: tuple[trees.Params, trees.Params],
  batch: Batches,
) -> tuple[trees.Params, trees.Params]:
  """(parameters, velocity) after one batch; both as they were, if none of its rows counts.

  Args:
    settings: of the run.
    sent: what the server sent.
    samples: the client's data.
    pick: its balanced set.
    carry: before the step.
    batch: one of the steps of `begin`.
  """
  (params, velocity), (rows, used, key), rules = carry, batch, settings.rules
  local_key, pick_key = jax.random.split(key)

  def objective(params: trees.Params) -> Array:
    features = encoders.encode(settings, params['encoder'], samples.x[rows], local_key)
    found = heads.logits(params['main'], features)
    if rules.extra_head:
      found += heads.logits(params['extra'], features)
    each = losses.loss(rules.loss, found, samples.y[rows], sent.class_weights, settings.focal_gamma)
    return (each * used).sum() / jnp.maximum(used.sum(), 1)

  local = jax.grad(objective)(params)
  squares = jax.tree.map(lambda g: (g**2).sum(), local)
  norm = jnp.sqrt(jax.tree.reduce(jnp.add, squares))
  clip = settings.clip_norm / jnp.maximum(norm, settings.clip_norm)
  velocity = jax.tree.map(lambda v, g: settings.momentum * v + clip * g, velocity, local)
  stepped = jax.tree.map(lambda p, v: p - settings.learning_rate * v, params, velocity)
  if rules.corrects:
    direction, is_there = _direction(settings, sent, params, pick, pick_key)
    scale = settings.learning_rate * settings.correction * is_there
    stepped |= {'main': heads.corrected(stepped['main'], direction, local['main'], scale)}
  is_step = used.any()  # a client of fewer batches than the longest waits
  return jax.tree.map(lambda new, old: jnp.where(is_step, new, old), (stepped, velocity), carry)


def _direction(
  settings: settings_lib.Settings, sent: Broadcast, params: trees.Params, pick: Pick, key: Array
) -> tuple[heads.Head, Array]:
  """The balanced gradient at the current model; there is none before prototypes have come."""
  rules, received = settings.rules, sent.known.any()
  real, in_real = jax.tree.map(jnp.zeros_like, params['main']), jnp.zeros_like(pick.classes)
  if rules.real:
    features = encoders.encode(settings, params['encoder'], pick.x, key)
    each = heads.weighted_gradients(params['main'], features, pick.y, pick.weights[None])
    real, in_real = jax.tree.map(lambda g: g[0], each), pick.classes
  known = sent.known if rules.prototypes else jnp.zeros_like(sent.known)
  direction, is_there = heads.balanced_gradient(real, in_real, sent.prototypes, known)
  return direction, is_there & received
