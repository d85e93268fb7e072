"""Training state (weights, router state, optimizer state): its shapes, at step 0, from weights."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from moe_jax import trees
from moe_jax.config import schema
from moe_jax.devices import compile_options, partitioning
from moe_jax.models import model_variables
from moe_jax.training import lora, optim, trainable, value_head

Array = jax.Array
Batch = dict[str, Array]


class TrainState(struct.PyTreeNode):
  """Everything that a step changes."""

  step: Array  # [] int32, optimizer steps done
  seed: Array  # [] uint32, fixed; with the step it decides the random choices of routing
  params: trees.Params
  router_state: trees.RouterState  # the optimizer never sees it
  opt_state: trees.Tree
  # Weights that a policy is held near, shaped as `params`; None without such a term.
  reference: trees.Params | None = None

  @property
  def variables(self) -> dict[str, Any]:
    """What the model is applied with; pairs of LoRA are merged, and no value head is there."""
    params = lora.merged(value_head.without(self.params))
    return {'params': params, 'router_state': self.router_state}


def _init(cfg: schema.Config, rng: Array) -> TrainState:
  """A fresh state whose leaves are boxed with logical axis names."""
  with partitioning.without_mesh():  # the rows that shapes are made from are not to be split
    variables = model_variables.init(cfg.model, rng)
  variables['params'] = trainable.started(cfg, variables['params'], rng)
  opt_state = _opt_state(cfg, variables['params'])
  # Not the number train.seed itself: a constant in the step's program would compile per seed.
  seed = jax.random.bits(rng, (), jnp.uint32)
  return TrainState(
    jnp.zeros((), jnp.int32),
    seed,
    opt_state=opt_state,
    reference=variables['params'] if has_reference(cfg) else None,
    **variables,
  )


def has_reference(cfg: schema.Config) -> bool:
  """Whether a run keeps the weights of a reference beside those that it trains."""
  return cfg.objective.kind == 'policy' and cfg.objective.policy.kl_weight > 0


def _opt_state(cfg: schema.Config, params: trees.Params) -> trees.Tree:
  """The optimizer's state at step 0, of the trained weights only."""
  rests = value_head.may_rest(cfg)
  optimizer = optim.optimizer(cfg.optim, cfg.train.num_steps, rests=rests)
  return optimizer.init(trainable.select(cfg, params))


def abstract_state(cfg: schema.Config, mesh: partitioning.Mesh) -> TrainState:
  """Shape, dtype and sharding of every leaf; allocates nothing."""
  return laid_out(boxed_state(cfg), mesh, zero1=cfg.mesh.zero1)


def boxed_state(cfg: schema.Config) -> TrainState:
  """Shape, dtype and logical axes of every leaf; of `cfg` data, loss and mesh are not read."""
  return jax.eval_shape(lambda: _init(cfg, jax.random.key(0)))


def laid_out(boxed: TrainState, mesh: partitioning.Mesh, *, zero1: bool) -> TrainState:
  """The leaves of `boxed_state` with their sharding on a mesh."""
  shapes, shardings = partitioning.unbox(boxed), partitioning.shardings(boxed, mesh)
  if zero1:

    def further(s, x):
      return partitioning.split_further(s, x.shape) if x.ndim else s

    opt_state = jax.tree.map(further, shardings.opt_state, shapes.opt_state)
    shardings = shardings.replace(opt_state=opt_state)

  def struct_of(x, s):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)

  return jax.tree.map(struct_of, shapes, shardings)


def trained_shardings(cfg: schema.Config, mesh: partitioning.Mesh) -> trees.Tree:
  """Sharding of every trained weight, see `trainable.select`."""
  boxed = jax.eval_shape(lambda: trainable.select(cfg, _init(cfg, jax.random.key(0)).params))
  return partitioning.shardings(boxed, mesh)


def init_state(cfg: schema.Config, mesh: jax.sharding.Mesh) -> TrainState:
  """The state at step 0, made on the mesh from `train.seed`."""
  out = jax.tree.map(lambda x: x.sharding, abstract_state(cfg, mesh))
  create = jax.jit(
    lambda rng: partitioning.unbox(_init(cfg, rng)),
    out_shardings=out,
    compiler_options=compile_options.for_first_state(mesh),
  )
  return create(jax.random.key(cfg.train.seed))


def state_from(cfg: schema.Config, mesh: jax.sharding.Mesh, params: trees.Params) -> TrainState:
  """The state at step 0 with these weights, which lie on the mesh, in place of random ones."""
  out = jax.tree.map(lambda x: x.sharding, abstract_state(cfg, mesh))

  def create(rng: Array, params: trees.Params) -> TrainState:
    # What the given weights replace is dead code to the compiler.
    state = partitioning.unbox(_init(cfg, rng))
    params = trainable.overlaid(state.params, params)
    reference = None if state.reference is None else params
    return state.replace(params=params, opt_state=_opt_state(cfg, params), reference=reference)

  create = jax.jit(
    create,
    out_shardings=out,
    donate_argnums=1,
    compiler_options=compile_options.for_first_state(mesh),
  )
  return create(jax.random.key(cfg.train.seed), params)
