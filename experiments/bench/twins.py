"""The dense twin: the model that a mixture of experts is measured against."""

import dataclasses

from moe_jax import errors
from moe_jax.config import rules, schema


def dense_twin(cfg: schema.Config) -> schema.Config:
  """The same run with a dense FFN in place of every MoE layer, with equal activated FLOPs.

  An MoE layer becomes an FFN as wide as its shared experts and the K that a token visits together.
  All dense layers of a model have one width: where the model has dense layers already, it is the
  mean over the layers, so that the FLOPs of the whole model are equal, up to rounding that mean.
  The router has no counterpart.

  Raises:
    errors.InputError: the model has no experts, or experts of attention, which need them.
  """
  model, moe = cfg.model, cfg.model.moe
  errors.require(
    model.is_moe,
    f'config.model.moe.num_experts={moe.num_experts} is a dense model already, which has no dense '
    'twin; give a config with experts',
  )
  activated = (moe.num_shared_experts + moe.num_experts_per_tok) * moe.moe_mlp_dim
  width = model.num_moe_layers * activated + model.num_dense_layers * model.mlp_dim
  dense = dataclasses.replace(
    model,
    mlp_dim=round(width / model.num_layers),
    num_dense_layers=0,
    moe=dataclasses.replace(moe, num_experts=0, num_shared_experts=0),
  )
  twin = dataclasses.replace(cfg, model=dense)
  rules.validate(twin)
  return twin
