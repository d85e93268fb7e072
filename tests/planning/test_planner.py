"""Plans against real allocations on 8 virtual devices, `describe`, hand sums and published runs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import deepseek_v2_lite, deepseek_v3
from moe_jax import errors
from moe_jax.config import parse
from moe_jax.devices import partitioning
from moe_jax.planning import (
  chips,
  compile_ahead,
  estimate,
  flops,
  planner,
  planner_search,
  roofline,
)
from moe_jax.planning.hlo import collectives
from moe_jax.training import train_state
from tests import tiny

MESH = dict(mesh__data=2, mesh__fsdp=2, mesh__expert=2)


@functools.cache
def request(topology: str = 'h100:8', **overrides) -> planner.Request:
  return planner.Request(tiny.make(**(MESH | overrides)), chips.parse(topology))


def on_first_device(tree) -> int:
  """Bytes that the first device really holds."""
  first = jax.devices()[0]
  shards = (s for leaf in jax.tree.leaves(tree) for s in leaf.addressable_shards)
  return sum(s.data.nbytes for s in shards if s.device == first)


def test_arguments_are_what_a_real_run_allocates():
  cfg = request().cfg
  mesh = partitioning.make_mesh(cfg.mesh)
  state = train_state.init_state(cfg, mesh)
  batch = partitioning.put_batch(tiny.batch(), mesh)
  found = planner.plan(request()).breakdown
  assert found['parameters'] == on_first_device(state.params)
  assert found['optimizer_state'] == on_first_device(state.opt_state)
  rest = (state.router_state, state.step, state.seed)
  assert found['router_state'] == on_first_device(rest)
  assert found['batch'] == on_first_device(batch)


@functools.cache
def compiled() -> compile_ahead.Compiled:
  """The tiny train step for 8 CPU devices."""
  cfg = request().cfg
  return compile_ahead.compile_for(
    cfg, partitioning.make_mesh(cfg.mesh), compile_ahead.Job({}, 'h100:8')
  )


def test_the_compiler_counts_the_same_arguments():
  program = compiled()
  # The CPU pads nothing.
  assert program.memory['argument'] == sum(program.arguments.values())
  assert program.arguments == {
    name: planner.plan(request()).breakdown[name] for name in program.arguments
  }
  assert program.mesh['fsdp'] == program.mesh['expert'] == 2
  assert program.host_memory_bytes > 2**20 and program.compile_seconds > 0


def test_the_parts_of_a_compiled_plan_add_up_and_name_what_matters():
  program = compiled()
  parts = planner.breakdown(program, request().cfg.model)
  total = program.memory['peak'] or program.memory['argument'] + program.memory['temp']
  assert sum(parts.values()) == total + program.memory['generated_code']
  assert parts['gradients'] > 0
  assert parts['parameters'] == program.arguments['parameters']


def test_a_compiled_program_becomes_a_plan():
  cfg, topology = request().cfg, request().topology
  mesh = estimate.abstract_mesh(cfg.mesh, 8)
  counted = estimate.estimate(cfg, mesh, 0.0, 'all_to_all')
  tokens = cfg.train.batch_size * cfg.model.max_seq_len
  per_device = flops.train_flops_per_token(cfg.model) * tokens / 8
  facts = planner._Facts(request(), cfg, mesh, per_device, tokens, ())
  plan = facts.compiled(compiled(), counted)
  assert plan.fits and plan.how == planner.COMPILED
  assert plan.topology == topology.name
  axes = {axis for name in plan.collective_bytes for axis in name.split('+')}
  assert {'fsdp', 'data', 'expert'} <= axes
  message = 'RESOURCE_EXHAUSTED: Used 120.5G of 95.74G hbm. Exceeded hbm capacity by 24.8G.'
  large = facts.compiled(dataclasses.replace(compiled(), error=message, text=''), counted)
  assert not large.fits
  assert large.hbm_bytes == pytest.approx(120.5 * 2**30)


def test_flops_are_those_of_describe():
  cfg = request().cfg
  tokens = cfg.train.batch_size * cfg.model.max_seq_len
  found = planner.plan(request()).flops_per_device
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
    planner.plan(dataclasses.replace(request('h100:8', model__moe__exchange__kind=kind), max_vio=v))
    for kind, v in (('ragged_all_to_all', 0.0), ('ragged_all_to_all', 1.0))
  )
  cfg = request().cfg
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
    remat: planner.plan(request('h100:8', model__remat=remat)) for remat in planner_search.REMATS
  }
  name = 'activations kept for the backward pass'
  memory = [kept[remat].breakdown[name] for remat in ('none', 'moe_core', 'full')]
  work = [kept[remat].computed_flops_per_device for remat in ('none', 'moe_core', 'full')]
  assert memory == sorted(memory, reverse=True) and work == sorted(work)
  assert len(set(memory)) == len(set(work)) == 3


def one(kind: str, axes: tuple[str, ...], size: float) -> collectives.Collective:
  return collectives.Collective(kind, axes, size, 1, '')


@pytest.mark.parametrize(
  'topology, extents, collective, wanted',
  [
    # A ring of 8 chips: 2 links of 100 GB/s.
    ('v5p:8x8x8', {'fsdp': {'0': 8}}, one('all-gather', ('fsdp',), 2e11), 1.0),
    # Two rings: 4 links.
    ('v5p:8x8x8', {'fsdp': {'0': 8, '1': 8}}, one('all-gather', ('fsdp',), 4e11), 1.0),
    # Half of a ring is a line: 1 link.
    ('v5p:8x8x8', {'fsdp': {'0': 4}}, one('all-gather', ('fsdp',), 1e11), 1.0),
    # v5e closes its rings at 16 only; links of 50 GB/s.
    ('v5e:8x8', {'fsdp': {'0': 8}}, one('all-gather', ('fsdp',), 5e10), 1.0),
    ('v5e:16x16', {'fsdp': {'0': 16}}, one('all-gather', ('fsdp',), 1e11), 1.0),
    # 7/8 of 800 GB leave a device; each crosses 8 / 4 of 2 links on average.
    ('v5p:8x8x8', {'fsdp': {'0': 8}}, one('all-to-all', ('fsdp',), 7e11), 8.0),
  ],
)
def test_links(topology, extents, collective, wanted):
  line = roofline.roofline(chips.parse(topology), 0, 0, [collective], {'fsdp': 8}, extents)
  assert line.seconds['ici'] == pytest.approx(wanted)
  assert line.bound_by == 'ici'


def test_collectives_that_share_a_dimension_add_up_and_others_do_not():
  topology = chips.parse('v5p:8x8x8')
  extents = {'data': {'0': 8}, 'fsdp': {'1': 8}, 'expert': {'1': 8}}
  mesh = {'data': 8, 'fsdp': 8, 'expert': 8}
  several = [one('all-gather', (axis,), 2e11) for axis in ('data', 'fsdp', 'expert')]
  line = roofline.roofline(topology, 0, 0, several, mesh, extents)
  assert line.seconds['ici'] == pytest.approx(2.0)
  assert line.by_axes == pytest.approx({'data': 1.0, 'expert': 1.0, 'fsdp': 1.0})


def test_the_slow_network_is_its_own_resource():
  mesh = {'dcn_data': 2, 'fsdp': 8}
  several = [one('all-reduce', ('dcn_data',), 6.25e9)]
  line = roofline.roofline(chips.parse('v5p:2x2x2*2'), 0, 0, several, mesh, {})
  assert line.seconds['dcn'] == pytest.approx(1.0) and not line.seconds['ici']


def test_gpus_share_what_crosses_between_nodes():
  topology, mesh = chips.parse('h100:16'), {'fsdp': 16}
  # 15/16 of 16 GB travel; half of the result comes from the other node, over 8 cards' networks.
  line = roofline.roofline(topology, 0, 0, [one('all-gather', ('fsdp',), 15e9)], mesh, {})
  assert line.seconds['nvlink'] == pytest.approx(15e9 / 450e9)
  assert line.seconds['dcn'] == pytest.approx(8e9 / 8 / 50e9)
  swap = roofline.roofline(topology, 0, 0, [one('all-to-all', ('fsdp',), 15e9)], mesh, {})
  assert swap.seconds['dcn'] == pytest.approx(8e9 / 50e9)


def test_laid_out_without_a_compiler():
  found = planner.laid_out(chips.parse('v5p:4x8x8'), {'data': 4, 'fsdp': 16, 'expert': 4})
  assert found == {'expert': {'2': 4}, 'fsdp': {'2': 2, '1': 8}, 'data': {'0': 4}}


def test_the_search_prefers_what_fits_and_is_fast():
  plans, tried = planner_search.search(dataclasses.replace(request(), estimate=True), 3)
  assert len(plans) == 3 and tried > 20
  assert all(plan.fits for plan in plans)
  bounds = [plan.step_seconds_bound for plan in plans]
  assert bounds[0] <= 1.05 * bounds[-1]


def test_what_does_not_fit_says_what_would():
  large = deepseek_v2_lite.get_config()
  large.train.batch_size = large.train.micro_batch_size = 64
  wanted = planner.Request(parse.from_dict(large.to_dict()), chips.parse('h100:8'))
  plan = planner.plan(wanted)
  assert not plan.fits
  # No single change is enough: 15.7B parameters with their moments are 188 GB, on 8 x 80 GB.
  (way,) = planner_search.suggestions(wanted, plan)
  arguments = dict(part.lstrip('-').split('=', 1) for part in way.partition(' (')[0].split())
  mesh = dict(part.split('=') for part in arguments['mesh'].split(','))
  micro = int(arguments['config.train.micro_batch_size'])
  cfg = dataclasses.replace(
    wanted.cfg,
    mesh=dataclasses.replace(wanted.cfg.mesh, data=1, **{a: int(size) for a, size in mesh.items()}),
    model=dataclasses.replace(wanted.cfg.model, remat=arguments['config.model.remat']),
    train=dataclasses.replace(wanted.cfg.train, micro_batch_size=micro),
  )
  assert planner.plan(dataclasses.replace(wanted, cfg=cfg)).fits
  small = dataclasses.replace(wanted, topology=chips.parse('h100:1'))
  (way,) = planner_search.suggestions(small, plan)
  assert way.startswith('--topology=h100:')


@pytest.mark.parametrize(
  'text, words',
  [
    ('v9:8', 'must be CHIP:SHAPE'),
    ('v5p:8x8', '3 dimension'),
    ('h100:12', 'whole nodes of 8'),
    ('v5p', 'must be CHIP:SHAPE'),
  ],
)
def test_topologies_that_do_not_exist(text, words):
  with pytest.raises(errors.InputError, match=words):
    chips.parse(text)


def test_topologies():
  slices = chips.parse('v5e:16x16*2')
  assert (slices.num_devices, slices.libtpu_name, slices.name) == (512, 'v5e:16x16', 'v5e:16x16*2')
  assert chips.parse('tpu7x:2x2x1').num_devices == 8  # two devices to a chip


def test_decode_reads_weights_and_caches():
  plan = planner.plan(dataclasses.replace(request(), decode=True, rows=8))
  model = request().cfg.model
  elements = flops.kv_cache_elements_per_token(model) * model.max_seq_len
  assert plan.breakdown['caches'] == elements * jnp.dtype(model.dtype).itemsize
  assert plan.traffic_bytes > plan.breakdown['caches']
  assert np.isfinite(plan.step_seconds_bound) and plan.how == planner.ESTIMATED
