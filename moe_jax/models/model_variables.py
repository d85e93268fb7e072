"""A model's variables: their initialisation, and the routers' part of them in and out."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta

from moe_jax import trees
from moe_jax.config import schema
from moe_jax.devices import partitioning
from moe_jax.models import decoder_block, token_prediction, transformer
from moe_jax.models.attention import multi_head
from moe_jax.models.routers import routing

Array = jax.Array


def init(cfg: schema.ModelConfig, rng: Array) -> dict[str, Any]:
  """Variables: `params`, whose leaves are boxed with logical axis names, and `router_state`.

  A weight's numbers are decided by the seed, its name inside its layer and the layer's number. So
  models that differ in their routers or experts start from the same weights everywhere else.
  """
  empty = dataclasses.replace(cfg, num_layers=0, num_dense_layers=0)
  zeros = jnp.zeros((1, 1), jnp.int32)
  variables = {
    'params': dict(transformer.Transformer(empty).init(rng, zeros, zeros, zeros)['params'])
  }
  variables['router_state'] = {}
  for kind in decoder_block.stacks(cfg):
    for collection, tree in _init_stack(cfg, kind, rng).items():
      variables[collection][kind.name] = tree
  if cfg.num_mtp_layers:
    kind = decoder_block.Stack('mtp_layers', cfg.is_moe, cfg.num_layers, cfg.num_mtp_layers)
    for collection, tree in _init_stack(cfg, kind, rng).items():
      variables[collection][kind.name] = tree
  return variables


def _init_stack(cfg: schema.ModelConfig, kind: decoder_block.Stack, rng: Array) -> dict[str, Any]:
  zeros = jnp.zeros((1, 1), jnp.int32)
  x = jnp.zeros((1, 1, cfg.embed_dim), jnp.dtype(cfg.dtype))
  tokens = routing.Tokens(zeros, zeros > 0, zeros[0], jnp.uint32(0))
  ctx = multi_head.Context(zeros, zeros)

  def init_layer(number: Array) -> trees.Variables:
    # 0 is left to the weights outside of the layers.
    key = jax.random.fold_in(rng, number + 1)
    own = decoder_block.LayerInputs(None, number, {})
    if kind.name == 'mtp_layers':
      ahead = token_prediction.Ahead(x, zeros, zeros > 0)
      return token_prediction.MTPLayer(cfg, kind.is_moe, True).init(key, x, own, ahead, ctx, tokens)
    return decoder_block.Block(cfg, kind.is_moe, True).init(key, x, own, ctx, tokens)

  stacked = jax.vmap(init_layer)(kind.first + jnp.arange(kind.length))
  is_staged = kind == decoder_block.staged(cfg)
  axis = {nn.PARTITION_NAME: 'stage_layers' if is_staged else 'layers'}
  return {k: meta.add_axis(v, 0, axis) for k, v in stacked.items()}


def moe_state(router_state: trees.RouterState) -> dict[str, Array]:
  """The routers' variables, leaves [MoE layers, ...] with multi-token prediction's last."""
  main = router_state.get('moe_layers', {}).get('moe', {})
  ahead = router_state.get('mtp_layers', {}).get('block', {}).get('moe', {})
  return {k: jnp.concatenate([v, ahead[k]]) if ahead else v for k, v in main.items()}


def with_moe_state(cfg: schema.ModelConfig, state: Mapping[str, Array]) -> dict[str, Any]:
  """The inverse of `moe_state`: collection `router_state` of the whole model."""
  if not state:
    return {}

  def split(cut):
    return {'moe': {k: v[cut] for k, v in state.items()}}

  found: dict[str, Any] = {'moe_layers': split(slice(cfg.num_moe_layers))}
  if cfg.num_mtp_layers:
    found['mtp_layers'] = {'block': split(slice(cfg.num_moe_layers, None))}
  return found


def moe_params(params: trees.Params) -> dict[str, Any]:
  """The parameters of the MoE layers, leaves [MoE layers, ...], multi-token prediction's last."""
  main = params['moe_layers']['moe']
  if 'mtp_layers' not in params:
    return main
  return jax.tree.map(
    lambda *leaves: jnp.concatenate(leaves), main, params['mtp_layers']['block']['moe']
  )


def abstract_params(cfg: schema.ModelConfig) -> Any:
  """Shapes and dtypes of the parameters, as nested dicts of ShapeDtypeStruct; allocates nothing."""
  return partitioning.unbox(jax.eval_shape(lambda: init(cfg, jax.random.key(0))['params']))


def abstract_variables(
  cfg: schema.ModelConfig,
  mesh: jax.sharding.Mesh,
  more: Callable[[trees.Params], trees.Params] = lambda params: params,
) -> dict[str, Any]:
  """Shape, dtype and sharding of what `init` makes, which is all that loading a model needs.

  `more` gives the parameters that a run keeps, from those of the model with their logical axes.
  """

  def make() -> dict[str, Any]:
    variables = init(cfg, jax.random.key(0))
    return {**variables, 'params': more(variables['params'])}

  with partitioning.without_mesh():  # the rows that shapes are made from are not to be split
    boxed = jax.eval_shape(make)

  def struct_of(x, s):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)

  return jax.tree.map(struct_of, partitioning.unbox(boxed), partitioning.shardings(boxed, mesh))
