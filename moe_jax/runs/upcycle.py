"""A mixture of experts made of a dense checkpoint: sparse upcycling (arXiv 2212.05055).

Embedding, head, norms and attention are copied, the router is new, and the experts are pieces of
the dense FFN (Skywork-MoE, arXiv 2406.06563, section 4). With experts of a fraction 1 / m of the
dense width, each holds one of m slices of the hidden dimension, and the slices of a copy start with
the same router weights, a virtual group (He et al., arXiv 2410.07524): equal scores stay together
in the top K, so that a token gets whole copies. Shared experts hold the first slices.

The routed slices' down kernels are multiplied by (routed slices) / routed_scaling_factor. So the
model starts as the dense one, exactly, wherever the gates of a token add up to
routed_scaling_factor: with norm_topk_prob, or where the router's own gates do (hash, ds_moe). Raw
probabilities add up to less, and the routed part of the output starts that much smaller.

Axis letters: W width of a dense FFN, m = W / F slices.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import errors, trees
from moe_jax.config import moe_config, router_traits, schema
from moe_jax.devices import partitioning
from moe_jax.models import model_variables

Array = jax.Array

# What decides the weights that are copied, or how they are used.
_EQUAL = (
  'vocab_size',
  'tie_embeddings',
  'embed_dim',
  'num_layers',
  'num_heads',
  'norm_eps',
  'attention.kind',
  'attention.num_kv_heads',
  'attention.head_dim',
  'attention.num_experts',
  'attention.rope',
  'attention.mla',
)


class Layout(NamedTuple):
  """How the routed and shared experts of a layer hold the dense FFN."""

  slices: int  # m
  shared: int  # slices that the shared experts hold, the first ones
  copies: int  # of the other slices, among the routed experts: expert copy * routed + slice

  @property
  def routed(self) -> int:
    """Slices of one copy in the routed experts."""
    return self.slices - self.shared

  def __str__(self) -> str:
    shared = f' + {self.shared} shared' if self.shared else ''
    plural = 'copy' if self.copies == 1 else 'copies'
    return f'{self.copies} {plural} of {self.routed} of {self.slices} slices{shared}'


def plan(dense: schema.ModelConfig, model: schema.ModelConfig) -> Layout:
  """The layout of `model`'s experts in terms of `dense`'s FFN.

  Raises:
    errors.InputError: the dense model does not fit into the other one; says what would.
  """
  errors.require(
    not dense.is_moe,
    f'--from holds a model with model.moe.num_experts={dense.moe.num_experts}; upcycling starts '
    'from a dense run, with num_experts=0',
  )
  errors.require(
    model.is_moe,
    'config.model.moe.num_experts=0 makes a dense model; give the config of the MoE to be trained',
  )
  for where, one in (('--from holds a model with ', dense), ('', model)):
    errors.require(
      not one.num_mtp_layers,
      f'{where}config.model.num_mtp_layers={one.num_mtp_layers} must be 0: upcycling copies the '
      'FFNs of the layers, and knows nothing of modules of multi-token prediction; '
      + ('start from a run without them' if where else 'set it to 0, or train them later'),
    )
  _check_equal(dense, model)
  moe, width = model.moe, dense.mlp_dim
  fits = [width // m for m in range(1, 17) if width % m == 0]
  errors.require(
    width % moe.moe_mlp_dim == 0,
    f'config.model.moe.moe_mlp_dim={moe.moe_mlp_dim} must divide the FFN width of the dense model, '
    f'{width}; for example {", ".join(map(str, fits))}',
  )
  slices, shared = width // moe.moe_mlp_dim, moe.num_shared_experts
  errors.require(
    shared < slices,
    f'config.model.moe.num_shared_experts={shared} must be below the slices of the dense FFN, '
    f'{width} / moe_mlp_dim={moe.moe_mlp_dim} = {slices}, or nothing is left to route; lower it or '
    'moe_mlp_dim',
  )
  routed = slices - shared
  for name in ('num_experts', 'num_experts_per_tok'):
    value = getattr(moe, name)
    legal = sorted({max(value // routed, 1) * routed, (value // routed + 1) * routed})
    errors.require(
      value % routed == 0,
      f'config.model.moe.{name}={value} must be a multiple of {routed}, the routed slices of one '
      f'copy of the dense FFN ({slices} slices, {shared} shared); choose '
      f'{" or ".join(map(str, legal))}',
    )
  _check_whole_copies(moe, routed)
  return Layout(slices, shared, moe.num_experts // routed)


def _check_equal(dense: schema.ModelConfig, model: schema.ModelConfig):
  for group in (*_EQUAL, *(('mlp_dim',) if model.num_dense_layers else ())):
    values, known = (_fields(cfg, group) for cfg in (model, dense))
    for name, value in values.items():
      errors.require(
        value == known[name],
        f'config.model.{name}={value} must be that of the dense model in --from, {known[name]}; '
        f'pass --config.model.{name}={known[name]}',
      )


def _fields(cfg: schema.ModelConfig, name: str) -> dict[str, Any]:
  """The value of a field by its name, or of every field of a group by theirs."""
  value = functools.reduce(getattr, name.split('.'), cfg)
  if not dataclasses.is_dataclass(value):
    return {name: value}
  own = (_fields(cfg, f'{name}.{field.name}') for field in dataclasses.fields(value))
  return {key: one for fields in own for key, one in fields.items()}


def _check_whole_copies(moe: moe_config.MoEConfig, routed: int):
  """Refuses routing that would tear the slices of a copy apart from the first step on."""
  errors.require(
    routed == 1 or router_traits.of(moe).ties_stay_together,
    f'config.model.moe.router={moe.router!r} does not keep the {routed} routed slices of a copy '
    f'together; choose {", ".join(router_traits.names_with("ties_stay_together"))}, or experts of '
    'the dense width',
  )
  size = moe_config.group_size(moe.num_experts, moe.num_expert_groups)
  errors.require(
    moe.num_expert_groups == 1 or size % routed == 0,
    f'config.model.moe.num_expert_groups={moe.num_expert_groups} makes groups of {size} experts; a '
    f'group must hold whole copies, of {routed} routed slices each; choose fewer groups, or 1',
  )


def upcycle(
  dense: schema.ModelConfig,
  dense_params: trees.Params,
  model: schema.ModelConfig,
  *,
  noise: float,
  rng: Array,
) -> Any:
  """The parameters of the MoE.

  Args:
    dense: the dense model.
    dense_params: its parameters.
    model: the MoE.
    noise: Gaussian noise on the routed experts' kernels, as a multiple of the standard deviation of
      the layer's dense kernel; 0 = exact copies.
    rng: key of the new router's weights, those of a fresh model, and of the noise.

  Returns:
    Parameters of the structure and dtypes of `model_variables.abstract_params(model)`.

  Raises:
    errors.InputError: see `plan`.
  """
  layout = plan(dense, model)
  first = model.num_dense_layers
  params = {key: value for key, value in dense_params.items() if key != 'dense_layers'}
  if first:
    params['dense_layers'] = jax.tree.map(lambda a: a[:first], dense_params['dense_layers'])
  rest = jax.tree.map(lambda a: a[first:], dense_params['dense_layers'])
  mlp = rest.pop('mlp')
  # Layer n of a fresh model draws from the number n + 1.
  noise_rng = jax.random.fold_in(rng, model.num_layers + 1)
  experts = _experts(layout, mlp, noise, noise_rng, model.moe.routed_scaling_factor)
  params['moe_layers'] = {**rest, 'moe': {**experts, **_router(layout, model, rng)}}
  return jax.tree.map(
    lambda s, a: a.astype(s.dtype), model_variables.abstract_params(model), params
  )


def _experts(
  layout: Layout, mlp: dict[str, Array], noise: float, rng: Array, scaling_factor: float
) -> dict[str, Any]:
  """gate_up [layers, D, 2, W] and down [layers, W, D] of the FFNs -> those of experts."""
  gate_up, down = mlp['gate_up'], mlp['down']
  layers, d, width = gate_up.shape[0], gate_up.shape[1], gate_up.shape[3]
  shared_width = layout.shared * width // layout.slices
  slices = (layout.slices, width // layout.slices)
  cut = {
    'gate_up': jnp.moveaxis(gate_up.reshape(layers, d, 2, *slices), 3, 1),  # [layers, m, D, 2, F]
    'down': down.reshape(layers, *slices, d),
  }
  experts = {}
  for i, (name, kernel) in enumerate(cut.items()):
    kernel = kernel[:, layout.shared :].astype(jnp.float32)
    kernel = jnp.tile(kernel, (1, layout.copies, *(1,) * (kernel.ndim - 2)))
    if noise:
      std = mlp[name].astype(jnp.float32).std(axis=tuple(range(1, mlp[name].ndim)))
      draw = jax.random.normal(jax.random.fold_in(rng, i), kernel.shape)
      kernel += noise * std.reshape(-1, *(1,) * (kernel.ndim - 1)) * draw
    experts[name] = kernel
  experts['down'] *= layout.routed / scaling_factor
  if layout.shared:
    experts['shared'] = {'gate_up': gate_up[..., :shared_width], 'down': down[:, :shared_width]}
  return experts


def _router(layout: Layout, model: schema.ModelConfig, rng: Array) -> dict[str, Array]:
  """The new router [layers, D, E], with equal columns for the slices of a copy."""
  fresh = partitioning.unbox(model_variables.init(model, rng))['params']['moe_layers']['moe']
  if 'router' not in fresh:
    return {}
  columns = np.arange(model.moe.num_experts) // layout.routed * layout.routed
  return {'router': fresh['router'][..., columns]}
