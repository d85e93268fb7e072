import pytest

from moe_jax.models import decoder_block
from tests import tiny


@pytest.mark.parametrize(
  'layers, dense, experts, want',
  [
    (5, 2, 8, [('dense_layers', False, 0, 2), ('moe_layers', True, 2, 3)]),
    (3, 0, 8, [('moe_layers', True, 0, 3)]),
    (3, 1, 0, [('dense_layers', False, 0, 3)]),  # without experts every layer is dense
  ],
)
def test_stacks_follow_each_other_and_an_empty_one_is_left_out(layers, dense, experts, want):
  cfg = tiny.make(
    model__num_layers=layers, model__num_dense_layers=dense, model__moe__num_experts=experts
  )
  assert [tuple(stack) for stack in decoder_block.stacks(cfg.model)] == want


@pytest.mark.parametrize(
  'router, inference, train, want',
  [
    ('ds_moe', 'threshold', False, 0.3),
    ('ds_moe', 'threshold', True, 0.0),  # training weighs every expert
    ('ds_moe', 'topk', False, 0.0),
    ('topk', 'threshold', False, 0.0),
  ],
)
def test_only_the_threshold_rule_prunes_attention_experts(router, inference, train, want):
  cfg = tiny.make(
    model__moe__router=router,
    model__moe__options__inference=inference,
    model__moe__options__inference_threshold=0.3,
  )
  block = decoder_block.Block(cfg.model, is_moe=True, train=train)
  assert block._attention_threshold() == want
