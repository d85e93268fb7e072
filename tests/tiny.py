"""The smallest config, batch and weights that still have every part; tests `import tiny`.

Compiling is most of a test's time here: weights come from numpy, `jit` compiles without
optimisation, and `gradients` is compiled once per config for all test modules.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from configs import base
from moe_jax.config import parse, schema
from moe_jax.devices import partitioning
from moe_jax.models import model_variables
from moe_jax.training import objective

SIZES = {
  'model.vocab_size': 32,
  'model.max_seq_len': 16,
  'model.embed_dim': 16,
  'model.mlp_dim': 24,
  'model.num_layers': 3,
  'model.num_dense_layers': 1,
  'model.num_heads': 2,
  'model.attention.num_kv_heads': 1,
  'model.attention.head_dim': 8,
  'model.moe.num_experts': 8,
  'model.moe.num_shared_experts': 1,
  'model.moe.num_experts_per_tok': 2,
  'model.moe.moe_mlp_dim': 8,
  'model.moe.balance.expert_level.weight': 1.0,  # its gradient is as large as the cross-entropy's
  'optim.peak_lr': 1e-2,
  'optim.schedule': 'constant',
  'optim.warmup_steps': 0,
  'train.num_steps': 20,
  'train.batch_size': 8,
}

# Latent attention of that size, as overrides.
MLA = {
  'model__attention__kind': 'mla',
  'model__attention__mla__q_lora_rank': 8,
  'model__attention__mla__kv_lora_rank': 8,
  'model__attention__mla__qk_nope_head_dim': 4,
  'model__attention__mla__qk_rope_head_dim': 4,
  'model__attention__mla__v_head_dim': 6,
}

jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def values(**overrides) -> dict:
  """The tiny config as nested dicts; an override is written `section__sub__key=value`."""
  page = base.get_config()
  overrides = {key.replace('__', '.'): value for key, value in overrides.items()}
  page.update_from_flattened_dict(SIZES | overrides)
  return page.to_dict()


def make(**overrides) -> schema.Config:
  """The tiny config, checked."""
  return parse.from_dict(values(**overrides))


def mesh(num_devices: int | None = None, **axes: int) -> jax.sharding.Mesh:
  """A mesh of that many devices (default: as many as the axes need): mesh(data=2, expert=4)."""
  num_devices = num_devices or math.prod(axes.values())
  page = make(**{f'mesh__{name}': size for name, size in ({'data': 1} | axes).items()})
  return partitioning.make_mesh(page.mesh, jax.devices()[:num_devices])


@functools.cache
def params(model: schema.ModelConfig, seed: int = 0):
  """Weights of a model, large enough (0.3) that routing and attention are far from uniform."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    noise = rng.normal(size=leaf.shape)
    scale = path[-1].key == 'scale'
    return jnp.asarray(1 + 0.1 * noise if scale else 0.3 * noise, leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, model_variables.abstract_params(model))


def row(lengths, length: int = 16, vocab_size: int = 32, seed: int = 0) -> dict[str, np.ndarray]:
  """A packed row of documents of the given lengths, and padding up to `length`."""
  rng = np.random.default_rng(seed)
  documents = [rng.integers(vocab_size, size=n) for n in lengths]
  fill = length - sum(lengths)

  def join(parts, pad):
    return np.concatenate([*parts, np.full(fill, pad)]).astype(np.int32)

  return {
    'tokens': join(documents, 0),
    'targets': join([np.append(d[1:], -1) for d in documents], -1),
    'positions': join([np.arange(n) for n in lengths], 0),
    'segment_ids': join([np.full(n, i + 1) for i, n in enumerate(lengths)], 0),
  }


# Ragged: every row has another number of real tokens, and one is all padding.
LENGTHS = ((16,), (7, 9), (5, 4, 3), (10,), (), (1, 2), (13,), (8, 8))


def batch(lengths=LENGTHS) -> dict[str, np.ndarray]:
  """One row per entry of `lengths`."""
  rows = [row(entry, seed=i) for i, entry in enumerate(lengths)]
  return {key: np.stack([r[key] for r in rows]) for key in objective.BATCH_KEYS}


def num_targets(rows: dict[str, np.ndarray]) -> int:
  return int((rows['targets'] >= 0).sum())


@functools.cache
def router_state(model: schema.ModelConfig, seed: int = 0):
  """A router state far from its start: biases that change selections, tables that are random."""
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(lambda: model_variables.init(model, jax.random.key(0))['router_state'])

  def draw(path, leaf):
    if path[-1].key == 'expert_bias':
      return jnp.asarray(rng.normal(size=leaf.shape) * 0.2 + 1.0, leaf.dtype)
    if leaf.dtype == jnp.int32:  # K different experts
      *lead, k = leaf.shape
      order = np.argsort(rng.random((*lead, model.moe.num_experts)), axis=-1)
      return jnp.asarray(order[..., :k], jnp.int32)
    return jnp.full(leaf.shape, 0.01, leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def gradients(**overrides):
  """(params, batch, router_state={}) -> `objective.gradients` of the tiny config, compiled once."""
  cfg = make(**overrides)
  fn = jit(functools.partial(objective.gradients, cfg))
  return lambda params, rows, state=None: fn(params, state or {}, rows, jnp.uint32(0))


def equations(jaxpr):
  """Every equation, also those of the loops and calls inside."""
  for eqn in jaxpr.eqns:
    yield eqn
    for value in jax.tree.leaves(eqn.params, is_leaf=lambda v: hasattr(v, 'eqns')):
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        yield from equations(inner)


def assert_trees_close(got, want, rtol: float, atol: float = 0.0):
  """Leaf by leaf; `atol` is relative to each leaf's largest wanted magnitude."""
  got, want = (jax.tree_util.tree_leaves_with_path(tree) for tree in (got, want))
  assert len(got) == len(want)
  for (path, a), (_, b) in zip(got, want):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    scale = np.abs(b).max() if math.prod(b.shape) else 0.0
    np.testing.assert_allclose(
      a, b, rtol, atol * scale, err_msg=jax.tree_util.keystr(path), strict=True
    )
