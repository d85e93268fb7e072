"""What the tests of training share: its fixtures are in conftest.py."""

import jax
import jax.numpy as jnp

from moe_jax.devices import partitioning
from moe_jax.training import objective, optim, train_state, trainable
from tests import tiny

# eps is large so that Adam does not blow the last bit of a tiny gradient up to a whole step.
STEP = {'train__micro_batch_size': 2, 'optim__eps': 1e-3, 'optim__clip_norm': 0.0}
# The smallest dense model: where the loop matters and the model does not.
DENSE = {'model__moe__num_experts': 0, 'model__num_layers': 1, 'train__batch_size': 2}


def one_device():
  return partitioning.make_mesh(tiny.make(mesh__data=1).mesh, jax.devices()[:1])


def fresh(cfg):
  params = jax.tree.map(jnp.copy, tiny.params(cfg.model))  # the step donates its state
  trained = trainable.select(cfg, params)
  opt_state = optim.optimizer(cfg.optim, cfg.train.num_steps).init(trained)
  return train_state.TrainState(jnp.int32(0), jnp.uint32(0), params, {}, opt_state)


def put(mesh):
  return lambda batch: partitioning.put_batch(objective.inputs(batch), mesh)
