"""Images to features; none has batch statistics, which federated averages would mix."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax import trees
from moe_jax.federated import settings as settings_lib

Array = jax.Array


class Mlp(nn.Module):
  """Pixels, one hidden layer of `width`."""

  width: int = 64

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    """[rows, height, width, channels] -> [rows, features]."""
    del train
    return nn.relu(nn.Dense(self.width)(x.reshape(len(x), -1)))


class Cnn(nn.Module):
  """Two 3x3 convolutions (32, 64), pooling, a layer of 128, dropout (the paper's, for MNIST)."""

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    """[rows, height, width, channels] -> [rows, 128]."""
    for channels in (32, 64):
      x = nn.relu(nn.Conv(channels, (3, 3), padding='VALID')(x))
    x = nn.Dropout(0.25, deterministic=not train)(nn.max_pool(x, (2, 2), (2, 2)))
    x = nn.relu(nn.Dense(128)(x.reshape(len(x), -1)))
    return nn.Dropout(0.5, deterministic=not train)(x)


class ResNet(nn.Module):
  """A residual network of three stages, 6 `blocks` + 2 layers (arXiv 1512.03385, section 4.2).

  With group norms in place of batch norms; 9 blocks are the paper's ResNet-56.
  """

  blocks: int = 9

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    """[rows, height, width, channels] -> [rows, 64]."""
    del train
    x = nn.relu(_norm(_conv(16, 1)(x)))
    for stage in range(3):
      for block in range(self.blocks):
        stride = 2 if stage and not block else 1
        y = nn.relu(_norm(_conv(16 << stage, stride)(x)))
        y = _norm(_conv(16 << stage, 1)(y))
        if stride > 1:  # the identity, every other place, with zeros for the new channels
          x = jnp.pad(x[:, ::2, ::2], ((0, 0),) * 3 + ((0, x.shape[-1]),))
        x = nn.relu(x + y)
    return x.mean(axis=(1, 2))


def _conv(channels: int, stride: int) -> nn.Conv:
  return nn.Conv(channels, (3, 3), strides=stride, use_bias=False)


def _norm(x: Array) -> Array:
  return nn.GroupNorm(num_groups=8)(x)


ENCODERS = {'mlp': Mlp, 'cnn': Cnn, 'resnet': ResNet}


def init(settings: settings_lib.Settings, key: Array) -> trees.Params:
  """The encoder's parameters."""
  images = jnp.zeros((1, *settings.data.shape), jnp.uint8)
  return ENCODERS[settings.encoder]().init(key, _scaled(settings, images), train=False)['params']


def encode(
  settings: settings_lib.Settings, params: trees.Params, images: Array, dropout: Array | None = None
) -> Array:
  """Bytes [rows, height, width, channels] -> features [rows, width].

  Args:
    settings: of the run.
    params: of the encoder.
    images: as in `partition.Images`.
    dropout: key of the dropout in training; without it nothing is dropped.
  """
  rngs = None if dropout is None else {'dropout': dropout}
  module = ENCODERS[settings.encoder]()
  return module.apply(
    {'params': params}, _scaled(settings, images), train=dropout is not None, rngs=rngs
  )


def _scaled(settings: settings_lib.Settings, images: Array) -> Array:
  return images.astype(jnp.float32) / settings.data.peak
