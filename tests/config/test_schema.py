import pytest

from configs import base
from moe_jax.config import parse
from tests import tiny


def test_a_config_is_frozen_and_holds_every_key_of_the_base_page():
  cfg = tiny.make()
  with pytest.raises(AttributeError):
    cfg.train.seed = 1

  def keys(d):
    return {k: keys(v) if isinstance(v, dict) else None for k, v in d.items()}

  assert keys(parse.to_dict(cfg)) == keys(base.get_config().to_dict())


def test_numbers_of_moe_layers():
  model = tiny.make(model__num_layers=5, model__num_dense_layers=2).model
  assert (model.is_moe, model.num_moe_layers) == (True, 3)
  dense = tiny.make(model__moe__num_experts=0, model__num_dense_layers=99).model
  assert (dense.is_moe, dense.num_moe_layers) == (False, 0)
