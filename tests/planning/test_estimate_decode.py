import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import pages, parse
from moe_jax.planning import (
  estimate,
  estimate_decode,
  flops,
  planner,
)
from tests.planning import requests


def test_decode_reads_weights_and_caches():
  plan = planner.plan(dataclasses.replace(requests.request(), decode=True, rows=8))
  model = requests.request().cfg.model
  elements = flops.kv_cache_elements_per_token(model) * model.max_seq_len
  assert plan.breakdown['caches'] == elements * jnp.dtype(model.dtype).itemsize
  one = estimate_decode.flops_per_token(model) * 8 / 8  # rows, devices
  assert plan.flops_per_device == plan.computed_flops_per_device == one
  assert plan.traffic_bytes > plan.breakdown['caches']
  assert np.isfinite(plan.step_seconds_bound) and plan.how == planner.ESTIMATED


def decoded(page: str, exchange: str = 'all_gather', **mesh: int):
  """(model, estimate) of a step with one row per device."""
  values = pages.values(page)
  values.mesh.update({'data': 1} | mesh)
  cfg = parse.from_dict(values.to_dict())
  devices = int(np.prod([*mesh.values(), 1]))
  sizes = estimate.abstract_mesh(cfg.mesh, devices)
  return cfg.model, estimate_decode.estimate(cfg, sizes, devices, exchange)


@pytest.mark.parametrize('mesh', [{}, dict(data=8), dict(data=64), dict(fsdp=64)])
def test_a_row_reads_its_own_experts_and_not_those_of_others(mesh):
  model, found = decoded('deepseek_v2_lite', **mesh)
  count, caches = flops.count_parameters(model), found.arguments['caches']
  # 6 of 64 experts, all other weights, 2 bytes each; of the embedding the row of a token. Norms and
  # routers have 4 bytes.
  weights = count.total - count.embedding - count.routed_experts * 58 / 64
  weights += count.norms + count.router
  assert found.hbm_bytes == pytest.approx(2 * weights + caches)
  assert found.hbm_bytes == pytest.approx(5.037e9, rel=0.001)


def test_the_rows_of_a_group_of_experts_share_what_is_read():
  model, found = decoded('deepseek_v2_lite', data=2, expert=4)
  _, alone = decoded('deepseek_v2_lite')
  count = flops.count_parameters(model)
  # A quarter of the experts lies here, of which 4 rows choose 1 - (58 / 64) ** 4 parts.
  more = (1 - (58 / 64) ** 4) / 4 - 6 / 64
  assert found.hbm_bytes - alone.hbm_bytes == pytest.approx(2 * count.routed_experts * more)


def test_gathered_is_what_fsdp_splits_and_nothing_that_is_whole():
  model, found = decoded('deepseek_v2', fsdp=64)
  count, mla = flops.count_parameters(model), model.attention.mla
  whole = mla.kv_lora_rank * model.num_heads * (mla.qk_nope_head_dim + mla.v_head_dim)
  split = count.total - count.norms - count.embedding - whole * model.num_layers
  split += count.router  # float32
  (sent,) = found.collectives
  assert (sent.kind, sent.axes) == ('all-gather', ('fsdp',))
  assert sent.total == pytest.approx(2 * split * 63 / 64)
  assert found.temporaries['weights in the compute dtype'] == 2 * split // model.num_layers
  # Between slices travels one fsdp axis's share, which the fast network completes.
  _, sliced = decoded('deepseek_v2', dcn_fsdp=4, fsdp=16)
  by_axis = {one.axes: one.total for one in sliced.collectives}
  assert by_axis == pytest.approx(
    {('dcn_fsdp',): 2 * split * 3 / 64, ('fsdp',): 2 * split * 15 / 16}
  )


def test_tokens_travel_as_the_exchange_sends_them():
  model, ring = decoded('deepseek_v2_lite', expert=8)
  _, fixed = decoded('deepseek_v2_lite', 'all_to_all', expert=8)
  state = 2 * model.embed_dim  # bytes of a token
  layers = 2 * model.num_moe_layers  # there and back
  for found, kind, size in ((ring, 'all-gather', 7), (fixed, 'all-to-all', 8 * 7 / 8)):
    (sent,) = found.collectives
    assert (sent.kind, sent.total) == (kind, layers * size * state)
  _, ragged = decoded('deepseek_v2_lite', 'ragged_all_to_all', expert=8)
  (sent,) = ragged.collectives
  assert 0 < sent.total < layers * 6 * 7 / 8 * state  # 6 experts are on 6 devices at most
