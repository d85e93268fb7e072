"""A model's variables without an optimizer: shapes and placement are those of a training state."""

import jax
import pytest

from moe_jax.devices import partitioning
from moe_jax.models import model_variables
from moe_jax.training import train_state
from tests import tiny


@pytest.mark.parametrize('axes', [{'data': 2, 'expert': 4}, {'fsdp': 2, 'tensor': 2}])
def test_abstract_variables_are_those_of_the_training_state(axes):
  cfg, mesh = tiny.make(model__moe__expert_bias__update_rule='sign'), tiny.mesh(**axes)
  with partitioning.activate(mesh):  # a mesh in force must not be seen by the rows of `init`
    got = model_variables.abstract_variables(cfg.model, mesh)
  assert got == train_state.abstract_state(cfg, mesh).variables
  assert any(not one.sharding.is_fully_replicated for one in jax.tree.leaves(got))
  assert 'router_state' in got and got['router_state']
