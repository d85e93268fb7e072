import dataclasses

import pytest

from configs import deepseek_v2_lite, deepseek_v3
from moe_jax.config import parse
from moe_jax.planning import (
  chips,
  estimate,
  flops,
  planner,
  planner_search,
)
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


def test_imbalance_costs_compute_exchange_and_buffers():
  even, uneven = (
    planner.plan(
      dataclasses.replace(requests.request('h100:8', model__moe__exchange__kind=kind), max_vio=v)
    )
    for kind, v in (('ragged_all_to_all', 0.0), ('ragged_all_to_all', 1.0))
  )
  cfg = requests.request().cfg
  need = estimate.work(cfg)
  tokens = cfg.train.batch_size * cfg.model.max_seq_len / 8
  more = uneven.computed_flops_per_device - even.computed_flops_per_device
  assert more == pytest.approx(need.experts * tokens)  # once more the experts' mean
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
