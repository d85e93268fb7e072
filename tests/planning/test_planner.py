"""Plans against real allocations on 8 virtual devices, `describe`, hand sums and published runs."""

import dataclasses
import functools

import jax
import pytest

from moe_jax import errors
from moe_jax.config import parse
from moe_jax.devices import partitioning
from moe_jax.planning import (
  chips,
  compile_ahead,
  estimate,
  flops,
  planner,
)
from moe_jax.training import train_state
from tests import tiny
from tests.planning import requests
from tests.training.test_policy_loss import RUN


def on_first_device(tree) -> int:
  """Bytes that the first device really holds."""
  first = jax.devices()[0]
  shards = (s for leaf in jax.tree.leaves(tree) for s in leaf.addressable_shards)
  return sum(s.data.nbytes for s in shards if s.device == first)


def test_arguments_are_what_a_real_run_allocates():
  cfg = requests.request().cfg
  mesh = partitioning.make_mesh(cfg.mesh)
  state = train_state.init_state(cfg, mesh)
  batch = partitioning.put_batch(tiny.batch(), mesh)
  found = planner.plan(requests.request()).breakdown
  assert found['parameters'] == on_first_device(state.params)
  assert found['optimizer_state'] == on_first_device(state.opt_state)
  rest = (state.router_state, state.step, state.seed)
  assert found['router_state'] == on_first_device(rest)
  assert found['batch'] == on_first_device(batch)


@functools.cache
def compiled() -> compile_ahead.Compiled:
  """The tiny train step for 8 CPU devices."""
  cfg = requests.request().cfg
  return compile_ahead.compile_for(
    cfg, partitioning.make_mesh(cfg.mesh), compile_ahead.Job({}, 'h100:8')
  )


def test_the_compiler_counts_the_same_arguments():
  program = compiled()
  # The CPU pads nothing.
  assert program.memory['argument'] == sum(program.arguments.values())
  assert program.arguments == {
    name: planner.plan(requests.request()).breakdown[name] for name in program.arguments
  }
  assert program.mesh['fsdp'] == program.mesh['expert'] == 2
  assert program.host_memory_bytes > 2**20 and program.compile_seconds > 0


def test_the_parts_of_a_compiled_plan_add_up_and_name_what_matters():
  program = compiled()
  parts = planner.breakdown(program, requests.request().cfg.model)
  total = program.memory['peak'] or program.memory['argument'] + program.memory['temp']
  assert sum(parts.values()) == total + program.memory['generated_code']
  assert parts['gradients'] > 0
  assert parts['parameters'] == program.arguments['parameters']


def test_a_compiled_program_becomes_a_plan():
  cfg, topology = requests.request().cfg, requests.request().topology
  mesh = estimate.abstract_mesh(cfg.mesh, 8)
  counted = estimate.estimate(cfg, mesh, 0.0, 'all_to_all')
  tokens = cfg.train.batch_size * cfg.model.max_seq_len
  per_device = flops.train_flops_per_token(cfg.model) * tokens / 8
  facts = planner._Facts(requests.request(), cfg, mesh, per_device, tokens, ())
  plan = facts.compiled(compiled(), counted)
  assert plan.fits and plan.how == planner.COMPILED
  assert plan.topology == topology.name
  axes = {axis for name in plan.collective_bytes for axis in name.split('+')}
  assert {'fsdp', 'data', 'expert'} <= axes
  message = 'RESOURCE_EXHAUSTED: Used 120.5G of 95.74G hbm. Exceeded hbm capacity by 24.8G.'
  large = facts.compiled(dataclasses.replace(compiled(), error=message, text=''), counted)
  assert not large.fits
  assert large.hbm_bytes == pytest.approx(120.5 * 2**30)


def test_laid_out_without_a_compiler():
  found = planner.laid_out(chips.parse('v5p:4x8x8'), {'data': 4, 'fsdp': 16, 'expert': 4})
  assert found == {'expert': {'2': 4}, 'fsdp': {'2': 2, '1': 8}, 'data': {'0': 4}}


def test_fast_axes_do_not_cross_slices():
  two = dataclasses.replace(requests.request(), topology=chips.parse('v5e:2x2*2'), estimate=True)
  with pytest.raises(errors.InputError, match=r'dcn_data=1 times dcn_fsdp=1 must multiply to it'):
    planner.plan(two)


def test_answers_are_planned_with_buffers_that_lose_nothing():
  """`--max_vio` then says how uneven the load is, and makes no buffers that a run would refuse."""
  uneven = dataclasses.replace(requests.request(**RUN), max_vio=0.5)
  cfg, notes = planner.prepared(uneven)
  assert cfg.model.moe.exchange.buffer_factor == 0
  assert notes == ("objective.kind='policy' loses no assignment: buffers are of the worst case",)
  parse.from_dict(parse.to_dict(cfg))
  cfg, notes = planner.prepared(dataclasses.replace(requests.request(), max_vio=0.5))
  assert cfg.model.moe.exchange.buffer_factor == 1.5 and not notes
