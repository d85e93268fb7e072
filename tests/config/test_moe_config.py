import pytest

from moe_jax.config import moe_config
from tests import tiny


@pytest.mark.parametrize(
  'experts, groups, want', [(8, 1, 8), (8, 4, 2), (8, 3, 3), (63, 8, 8), (64, 8, 8), (5, 5, 1)]
)
def test_a_group_is_a_block_and_only_the_last_one_is_smaller(experts, groups, want):
  assert moe_config.group_size(experts, groups) == want
  assert (groups - 1) * want < experts <= groups * want


def test_every_loss_is_found_by_its_name():
  moe = tiny.make(model__moe__balance__switch__weight=0.25).model.moe
  assert moe.loss('switch').weight == 0.25 and moe.loss('switch').scope == 'micro_batch'
  assert moe.loss('expert_level').weight == 1.0  # of tests/tiny.py
  for name in moe_config.LOSSES:
    assert isinstance(moe.loss(name), moe_config.LossConfig)
