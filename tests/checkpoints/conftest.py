"""Checkpoints that several files of these tests read, and none changes."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

from moe_jax.checkpoints import checkpointer
from moe_jax.config import schema
from tests.checkpoints import streams


@pytest.fixture(scope='session')
def tree():
  return streams.make_tree()


@pytest.fixture(scope='session')
def streamed(tmp_path_factory, tree) -> pathlib.Path:
  path = tmp_path_factory.mktemp('streamed') / 'checkpoints'
  streams.write(path, tree)
  return path


@pytest.fixture(scope='session')
def saved(tmp_path_factory, tree) -> pathlib.Path:
  """The same tree, saved as a training run saves."""
  path = tmp_path_factory.mktemp('saved') / 'checkpoints'
  with checkpointer.Checkpointer(path, schema.CheckpointConfig(1, 1, 0)) as ckpt:
    ckpt.save(0, jax.tree.map(jnp.asarray, tree), streams.META)
  return path
