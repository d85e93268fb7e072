import pytest

from moe_jax import errors
from moe_jax.config import router_traits
from tests import tiny


def moe(**overrides):
  return tiny.make(**{f'model__moe__{key}': value for key, value in overrides.items()}).model.moe


def test_traits_belong_to_the_router_of_a_config():
  assert router_traits.of(moe()).causal
  assert not router_traits.of(moe(router='expert_choice')).causal
  assert 'expert_choice' not in router_traits.names_with('causal')
  assert 'topk' in router_traits.names_with('causal')


def test_routers_without_weights_and_the_others():
  without = {name for name, traits in router_traits.LIBRARY.items() if not traits.has_logits}
  assert without == {'hash'}


@pytest.mark.parametrize(
  'flags',
  [
    dict(has_logits=False, uses_selection=True),
    dict(uses_selection=False, trains_by_selection=True),
  ],
)
def test_traits_that_contradict_each_other_are_refused(flags):
  with pytest.raises(errors.InputError, match='selection scores need logits'):
    router_traits.RouterTraits(causal=True, **flags)


def test_an_unknown_option_names_the_nearest():
  with pytest.raises(errors.InputError, match='input_jitter'):
    router_traits.RouterTraits(causal=True, options=('input_jiter',))


def test_experts_per_token_by_hand():
  # 8 experts, K = 2. DS-MoE trains all 8; its top-K rule keeps 2 at inference.
  plain, dense = moe(), moe(router='ds_moe', options__inference='topk')
  assert router_traits.of(plain).active_experts(plain, True) == 2
  assert router_traits.of(dense).active_experts(dense, True) == 8
  assert router_traits.of(dense).active_experts(dense, False) == 2
  assert router_traits.of(dense).per_token(dense) == 2


def test_room_of_an_expert_by_hand():
  cfg = moe(router='expert_choice')
  bound = router_traits.of(cfg).bound
  # floor(K T / E) = floor(2 x 14 / 8) = 3, and at least one of a chunk of a single token.
  assert (bound.room(cfg, 14), bound.room(cfg, 1)) == (3, 1)
  assert bound.chunk(cfg, 16) == 16  # a row, unless the config says otherwise
  chunked = moe(router='expert_choice', options__chunk_tokens=64)
  assert bound.chunk(chunked, 16) == 64
  assert router_traits.of(moe()).bound is None
