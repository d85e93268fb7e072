"""What the tests of checkpoints share."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.checkpoints import integrity, stream_writer

META = {'config': {'train': {'ramp': (1, 2)}}, 'tokenizer': 'digest'}
GATE_UP = 'params/moe_layers/gate_up'
LAYERS, EXPERTS, EMBED, FFN = 2, 8, 16, 8


def make_tree() -> dict[str, Any]:
  """Weights as a model has them, without an optimizer."""
  rng = np.random.default_rng(0)

  def normal(*shape):
    return rng.standard_normal(shape).astype(np.float32)

  moe = {
    'gate_up': normal(LAYERS, EXPERTS, EMBED, 2, FFN).astype(jnp.bfloat16),
    'scale': normal(LAYERS, EMBED),
    'table': rng.integers(0, 99, (LAYERS, 40)).astype(np.int32),
  }
  params = {'embed': normal(24, EMBED), 'bias': normal(EXPERTS).astype(jnp.bfloat16)}
  extra = {'count': np.array(7, np.int32), 'mask': np.array([True, False, True])}
  return {'params': {**params, 'moe_layers': moe}, 'router_state': extra, 'empty': {}}


def named(tree: Any) -> dict[str, np.ndarray]:
  return {integrity.leaf_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def write_all(writer: stream_writer.Writer, tree: Any, skip: str = ''):
  """As a converter does: matrices of experts, transposed; the rest whole."""
  for name, x in named(tree).items():
    if name == GATE_UP:
      for layer, expert, half in np.ndindex(LAYERS, EXPERTS, 2):
        matrix = np.ascontiguousarray(x[layer, expert, :, half].T)  # [F, D], as in a source file
        if skip != f'{name}/{expert}':
          writer.write(name, (layer, expert, slice(None), half), matrix.T)
    elif name != skip:
      writer.write(name, (), x)


def write(path: pathlib.Path, tree: Any, step: int = 0, **kwargs):
  with stream_writer.Writer(path, step, tree, META) as writer:
    write_all(writer, tree, **kwargs)


def abstract(tree: Any, sharding: Any = None) -> Any:
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
