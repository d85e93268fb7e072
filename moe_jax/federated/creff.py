"""CReFF: a head re-trained on features that the server makes from class gradients.

Shang et al., Federated Learning on Heterogeneous and Long-Tailed Data via Classifier Re-Training
with Federated Features (arXiv 2204.13399).
"""

import jax
import jax.numpy as jnp

from moe_jax.federated import heads, losses
from moe_jax.federated import settings as settings_lib

Array = jax.Array
BATCH_SIZE = 32  # of the re-training


def distance(head: heads.Head, features: Array, targets: heads.Head, known: Array) -> Array:
  """Sum over the known classes of 1 - cosine of the features' mean gradient and the target.

  Args:
    head: where the gradients are taken.
    features: [classes, features of a class, width].
    targets: gradients by class.
    known: which of them there are, [classes].
  """

  def gradient(features: Array, label: Array) -> heads.Head:
    number = len(features)
    weights = jnp.full((1, number), 1 / number)
    each = heads.weighted_gradients(head, features, jnp.full(number, label), weights)
    return jax.tree.map(lambda g: g[0], each)

  found = jax.vmap(gradient)(features, jnp.arange(len(features)))
  return (known * (1 - _cosine(found, targets))).sum()


def _cosine(a: heads.Head, b: heads.Head) -> Array:
  """Of kernel and bias as one vector, by class."""

  def dot(a: heads.Head, b: heads.Head) -> Array:
    return jnp.einsum('gwc,gwc->g', a['kernel'], b['kernel']) + (a['bias'] * b['bias']).sum(-1)

  # The floors are inside of the roots: the gradient of a root at 0 is infinite.
  return dot(a, b) / jnp.sqrt(jnp.maximum(dot(a, a), 1e-12) * jnp.maximum(dot(b, b), 1e-12))


def refined(
  settings: settings_lib.Settings,
  head: heads.Head,
  features: Array,
  targets: heads.Head,
  known: Array,
) -> Array:
  """The features after steps down `distance`, [classes, features of a class, width]."""

  def step(features: Array, _: None) -> tuple[Array, None]:
    slope = jax.grad(distance, argnums=1)(head, features, targets, known)
    return features - settings.creff_feature_rate * slope, None

  return jax.lax.scan(step, features, None, length=settings.creff_feature_steps)[0]


def retrained(settings: settings_lib.Settings, features: Array, key: Array) -> heads.Head:
  """A new head, from zero, after epochs of gradient descent over the features.

  Args:
    settings: of the run.
    features: [classes, features of a class, width].
    key: decides their order.
  """
  classes, number, width = features.shape
  rows, labels = features.reshape(-1, width), jnp.repeat(jnp.arange(classes), number)
  size = min(BATCH_SIZE, len(rows))
  steps = len(rows) // size  # what does not fill a batch is another part in each epoch

  def objective(head: heads.Head, batch: Array) -> Array:
    return losses.cross_entropy(heads.logits(head, rows[batch]), labels[batch]).mean()

  def step(head: heads.Head, batch: Array) -> tuple[heads.Head, None]:
    slope = jax.grad(objective)(head, batch)
    return jax.tree.map(lambda w, g: w - settings.creff_rate * g, head, slope), None

  def epoch(head: heads.Head, key: Array) -> tuple[heads.Head, None]:
    order = jax.random.permutation(key, len(rows))[: steps * size]
    return jax.lax.scan(step, head, order.reshape(steps, size))

  zero = {'kernel': jnp.zeros((width, classes)), 'bias': jnp.zeros(classes)}
  return jax.lax.scan(epoch, zero, jax.random.split(key, settings.creff_epochs))[0]
