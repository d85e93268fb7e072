import dataclasses
import functools
import math
import types

import pytest

from configs import deepseek_llm_67b, deepseek_v2_lite, deepseek_v3
from moe_jax.config import parse
from moe_jax.planning import (
  chips,
  estimate,
  flops,
  planner,
  planner_search,
)
from tests import tiny
from tests.planning import requests


def test_flops_are_those_of_describe():
  cfg = requests.request().cfg
  tokens = cfg.train.batch_size * cfg.model.max_seq_len
  found = planner.plan(requests.request()).flops_per_device
  assert found * 8 == flops.train_flops_per_token(cfg.model) * tokens


@pytest.mark.parametrize(
  'page, topology, mesh, rows, reached',
  [
    (deepseek_v3, 'v5p:8x8x8', dict(fsdp=64, expert=8), 4096, 0.33),
    (deepseek_v2_lite, 'v5p:2x2x1', dict(fsdp=4), 128, 0.29),
  ],
)
def test_the_bound_is_above_what_published_runs_reached(page, topology, mesh, rows, reached):
  values = page.get_config()
  values.mesh.data = 1
  values.mesh.update(mesh)
  values.model.remat = 'full'
  values.train.batch_size = values.train.micro_batch_size = rows
  values.train.batch_ramp = ()
  cfg = parse.from_dict(values.to_dict())
  plan = planner.plan(planner.Request(cfg, chips.parse(topology), estimate=True))
  assert reached < plan.mfu_bound < 1
  assert plan.fits or plan.hbm_bytes > plan.hbm_capacity_bytes


@pytest.mark.parametrize('remat, passes', [('none', 3), ('moe_core', 3), ('full', 4)])
def test_imbalance_costs_compute_exchange_and_buffers(remat, passes):
  settings = dict(model__moe__exchange__kind='ragged_all_to_all', model__remat=remat)
  even, uneven = (
    planner.plan(dataclasses.replace(requests.request('h100:8', **settings), max_vio=v))
    for v in (0.0, 1.0)
  )
  cfg = requests.request(**settings).cfg
  model = cfg.model
  tokens = cfg.train.batch_size * model.max_seq_len / 8
  expert = 3 * model.embed_dim * model.moe.moe_mlp_dim
  forward = 2 * model.num_moe_layers * model.moe.num_experts_per_tok * expert
  more = uneven.computed_flops_per_device - even.computed_flops_per_device
  # Once more the experts' mean: forward, twice backward, and forward again where layers repeat.
  assert more == pytest.approx(passes * forward * tokens)
  sent = [p.collective_bytes['expert']['ragged-all-to-all'] for p in (even, uneven)]
  assert sent[1] == pytest.approx(2 * sent[0])
  assert uneven.breakdown['experts'] == pytest.approx(2 * even.breakdown['experts'], rel=0.01)
  assert uneven.flops_per_device == even.flops_per_device  # MFU counts the model


def test_more_is_kept_with_less_recomputed():
  kept = {
    remat: planner.plan(requests.request('h100:8', model__remat=remat))
    for remat in planner_search.REMATS
  }
  name = 'activations kept for the backward pass'
  memory = [kept[remat].breakdown[name] for remat in ('none', 'moe_core', 'full')]
  work = [kept[remat].computed_flops_per_device for remat in ('none', 'moe_core', 'full')]
  assert memory == sorted(memory, reverse=True) and work == sorted(work)
  assert len(set(memory)) == len(set(work)) == 3


def sizes(**changes):
  """Round numbers for every part of the estimate: D = 10, f = 6 over 2 tensor-parallel devices."""
  attention = types.SimpleNamespace(
    kind='mha', v_head_dim=3, mla=types.SimpleNamespace(kv_lora_rank=8, qk_rope_head_dim=2)
  )
  model = types.SimpleNamespace(
    embed_dim=10, num_heads=2, vocab_size=100, remat='full', attention=attention
  )
  loop = types.SimpleNamespace(loss_chunk=3)
  values = dict(cfg=types.SimpleNamespace(train=loop), model=model, a=2, p=4, t=5, tensor=2)
  values |= dict(moe=types.SimpleNamespace(moe_mlp_dim=6), head_width=7, buffered=20, dense=100)
  values |= dict(experts=60, layers=4, moe_layers=3, micros=2, fsdp=2, key_width=4)
  values |= dict(shape={'expert': 1, 'sequence': 1}, sent=0, received=0)
  return types.SimpleNamespace(**values | changes)


def test_temporaries_worked_out_by_hand():
  found = estimate._temporaries(sizes(), 1000)
  assert found == {
    'gradients': 2000,  # 1000, and their sum over 2 micro-batches
    'weights in the compute dtype': 500 + 2 * (100 // 4 + 60 // 3) * 2,  # cast, two layers gathered
    'activations kept for the backward pass': 5 * 10 * 2 * 4,
    'experts': 20 * (4 * 10 * 2 + 2 * 3 * (2 * 2 + 2 * 4)),
    'exchange': 0,
    'attention': 3 * 5 * 7 * 2,
    'logits and loss': 3 * 50 * (4 + 2) + 10 * 50 * 4,
  }
  found = estimate._temporaries(sizes(a=4, fsdp=1, micros=1), 1000)
  assert (found['gradients'], found['weights in the compute dtype']) == (1000, 0)
  found = estimate._temporaries(sizes(sent=8, received=10), 1000)
  assert found['exchange'] == 2 * (8 + 10) * 10 * 2  # there and back
  kept = {
    ('none', 'mha'): 5 * (60 + 14) + 20 * (9 + 10),
    ('none', 'mla'): 5 * (60 + 14 + 20) + 20 * (9 + 10),
    ('moe_core', 'mha'): 5 * (10 + 3) + 20 * 6,
    ('offload', 'mha'): 0,
  }
  for (remat, kind), numbers in kept.items():
    one = sizes()
    one.model.remat, one.model.attention.kind = remat, kind
    found = estimate._temporaries(one, 1000)
    assert found['activations kept for the backward pass'] == numbers * 2 * 4


def test_full_remat_repeats_the_forward_pass_without_the_head():
  cfg = requests.request(model__remat='full').cfg
  total, model = flops.train_flops_per_token(cfg.model), cfg.model
  head = 6 * model.embed_dim * model.vocab_size
  assert estimate.work(cfg).repeated == pytest.approx((total - head) / 3)
  assert estimate.work(requests.request(model__remat='none').cfg).repeated == 0


def test_whole_rows_of_keys_are_held_where_sequence_splits_them():
  found = estimate._temporaries(sizes(shape={'expert': 1, 'sequence': 4}), 1000)
  assert found['attention'] == 3 * 5 * (7 + 3 * 4) * 2  # own queries and keys, 3 others' keys


def deepseek_v3_moe():
  return parse.from_dict(deepseek_v3.get_config().to_dict()).model.moe


def v3_config(variant: str, mesh: dict[str, int], rows: int):
  values = deepseek_v3.get_config(variant)
  values.mesh.data = 1
  values.mesh.update(mesh)
  values.model.remat = 'full'
  values.train.batch_size = values.train.micro_batch_size = rows
  values.train.batch_ramp = ()
  return parse.from_dict(values.to_dict())


def v3(variant: str, mesh: dict[str, int], rows: int):
  cfg = v3_config(variant, mesh, rows)
  sizes = estimate.abstract_mesh(cfg.mesh, math.prod(mesh.values()))
  return cfg, estimate.estimate(cfg, sizes, 0.0, 'ragged_all_to_all')


def test_a_split_row_costs_the_last_device_more():
  rows = dict(fsdp=16, expert=8)
  cfg, whole = v3('long_128k', rows, 128)
  _, split = v3('long_128k', rows | dict(sequence=4), 128)
  # Forward, forward again, and twice backward. Per token: 62 layers, 128 heads, 192 + 128 numbers
  # per pair, 65,536.5 pairs, 2 FLOPs; and 512 x 128 x (128 + 128) weights that make the keys.
  pairs = 4 * 2 * 62 * 128 * 320 * 65_536.5
  keys = 4 * 2 * 62 * 512 * 128 * 256
  mean = whole.flops / 4  # a quarter of the tokens
  tokens = 128 * 131_072 / (16 * 8 * 4)
  # The last quarter of the queries sees 7/16 of the pairs, which is 7/4 of the mean.
  assert split.flops - mean == pytest.approx(tokens * (pairs * 3 / 4 + keys * 3))
  # Latents travel: 512 + 64 numbers of 2 bytes, from 3 others, in 3 passes of 62 layers.
  sent = {one.op_name: one.total for one in split.collectives if one.axes == ('sequence',)}
  assert sent.keys() == {'keys and values', 'gradients'}
  sent = sent['keys and values']
  assert sent == pytest.approx(tokens * 576 * 2 * 3 * 3 * 62)
  assert estimate.work(cfg).attention == pytest.approx(pairs)


def test_gradients_are_summed_over_those_that_share_a_row():
  cfg, found = v3('long_128k', dict(fsdp=16, expert=8, sequence=4), 128)
  sums = [one for one in found.collectives if one.kind == 'all-reduce']
  sent = sum(one.total for one in sums if one.axes == ('sequence',))
  # A 16th of the weights and an 8th of that of the experts, 2 bytes each; 3/4, there and back.
  count = flops.count_parameters(cfg.model)
  experts = count.routed_experts * 59 / 58  # and of the module of multi-token prediction
  others = count.total + count.mtp - experts
  assert sent == pytest.approx((others + experts / 8) / 16 * 2 * 2 * 3 / 4, rel=0.002)
  # The program of a tiny model with fsdp=2, sequence=2 sums 24,996 bytes: the estimate leaves norms
  # and routers out.
  cfg = tiny.make(mesh__sequence=2, mesh__fsdp=2, mesh__data=1)
  found = estimate.estimate(cfg, estimate.abstract_mesh(cfg.mesh, 4), 0.0, 'all_gather')
  sums = [one for one in found.collectives if one.kind == 'all-reduce']
  assert sum(one.total for one in sums) == pytest.approx(24_996, rel=0.1)
  assert all(one.axes == ('sequence',) for one in sums)


def test_buffers_are_those_of_the_exchanges():
  moe = deepseek_v3_moe()  # 8 of 256 experts; a token goes to 4 of 8 groups at most
  copies = functools.partial(estimate.exchange_copies, moe)
  # On 64 devices of 4 experts a group is 8 devices, and 8 choices reach 8 devices.
  assert copies(64, 'ragged_all_to_all') == (8, 64)  # P T rows, `models.exchange.ragged`
  assert copies(64, 'all_to_all') == copies(64, 'all_gather') == (64, 64)
  # On 8 devices of a group each: 4.
  assert copies(8, 'ragged_all_to_all') == (4, 8)
  bounded = dataclasses.replace(moe.exchange, buffer_factor=1.5)
  copies = functools.partial(estimate.exchange_copies, dataclasses.replace(moe, exchange=bounded))
  assert copies(64, 'ragged_all_to_all') == (8, 12)
  assert copies(64, 'all_to_all') == (12, 12)
  assert copies(64, 'all_gather') == (64, 64)
  assert copies(8, 'all_to_all') == (6, 6)
  # Experts that choose their tokens may all choose the same.
  moe = requests.request(model__moe__router='expert_choice').cfg.model.moe
  assert estimate.exchange_copies(moe, 4, 'ragged_all_to_all') == (4, 4)


def test_a_device_has_no_more_experts_for_a_row_than_there_are():
  cfg = v3_config('', dict(fsdp=8, expert=64), 512)
  mesh = estimate.abstract_mesh(cfg.mesh, 512)
  found = estimate._Sizes(cfg, mesh, 1.0, 'ragged_all_to_all')
  assert found.t == 4096 and found.received == 64 * 4096
  assert found.buffered == 64 * 4096 * 4  # 4 experts are here, of 8 that a token has
  gib = estimate._temporaries(found, 0)['exchange'] / 2**30
  assert gib == pytest.approx(2 * (8 + 64) * 4096 * 7168 * 2 / 2**30)


@pytest.mark.parametrize('factor, compiled', [(1.0, 35_840), (0.0, 71_680)])
def test_fixed_buffers_travel_as_compiled_programs_send_them(factor, compiled):
  cfg = tiny.make(
    mesh__expert=8,
    mesh__data=1,
    model__moe__exchange__buffer_factor=factor,
    model__moe__num_experts=16,
    model__moe__num_experts_per_tok=4,
    model__remat='none',
  )
  mesh = estimate.abstract_mesh(cfg.mesh, 8)
  found = estimate.estimate(cfg, mesh, 0.0, 'all_to_all').collectives
  (sent,) = (one.total for one in found if one.axes == ('expert',) and one.op_name == 'exchange')
  # A program also sends gates and ids, 2 K numbers of float32, on two of the four ways.
  assert cfg.model.dtype == 'float32'
  assert sent * (1 + 2 * 4 / cfg.model.embed_dim / 2) == compiled


@pytest.mark.parametrize(
  'mesh, rows, gathered, reduced',
  [
    # What libtpu's programs send between slices, in bytes: experiments/pod_plans/results.json.
    (dict(dcn_fsdp=8, fsdp=16, expert=2, tensor=8), 256, 9.93e9, 10.03e9),
    (dict(dcn_fsdp=4, fsdp=16, expert=8, tensor=2), 512, 9.88e9, 5.79e9),
  ],
)
def test_the_slow_network_carries_what_compiled_programs_send(mesh, rows, gathered, reduced):
  _, found = v3('', mesh, rows)
  sent = {
    kind: sum(one.total for one in found.collectives if (one.kind, one.axes) == (kind, where))
    for where in [('dcn_fsdp',)]
    for kind in ('all-gather', 'reduce-scatter')
  }
  # The gather to 5 %; the reduction at half (in bfloat16) or at all of it (in float32).
  assert sent['all-gather'] == pytest.approx(gathered, rel=0.05)
  assert 0.45 * reduced < sent['reduce-scatter'] < 1.05 * reduced


def test_a_dense_model_has_no_exchange():
  values = deepseek_llm_67b.get_config()
  values.mesh.update(data=1, fsdp=512)
  cfg = parse.from_dict(values.to_dict())
  plan = planner.plan(planner.Request(cfg, chips.parse('v5p:8x8x8'), estimate=True))
  assert plan.collective_bytes.keys() == {'fsdp'} and not plan.exchange_bytes
