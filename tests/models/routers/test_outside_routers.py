"""Two routers that the library does not know, and everything that treats a router by its traits.

`quarter`: every expert takes its best quarter of a row; not causal, bounded, E / 4 experts on
average. `double`: the best 2 K experts of a token. E = 8, K = 2, rows of 16 tokens.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from configs import smoke
from moe_jax import errors
from moe_jax.analysis import interventions, leakage, leakage_probe
from moe_jax.analysis.probes import ablation, probe_types
from moe_jax.config import parse, router_traits
from moe_jax.inference import generate, sampling
from moe_jax.interop import hf_config_export
from moe_jax.models import routed_experts, routers, transformer
from moe_jax.models.routers import capacity, routing
from moe_jax.planning import chips, describe, estimate, flops, planner, virtual_devices
from moe_jax.runs import checks, upcycle
from tests import tiny

MOE = 'model__moe__'
QUARTER = {f'{MOE}router': 'quarter', f'{MOE}dispatch': 'capacity', 'train__sample_prompt': ''}
DOUBLE = {f'{MOE}router': 'double'}


def take_a_quarter(inputs, cfg, train):
  scores = jnp.where(inputs.tokens.mask[..., None], inputs.scores, -1.0)
  rank = jnp.argsort(jnp.argsort(-scores, axis=1), axis=1)
  taken = rank < quarter_of(cfg, scores.shape[1])
  expert_idx = jnp.where(taken, jnp.arange(cfg.num_experts), cfg.num_experts).astype(jnp.int32)
  return routing.Routing(routing.gates_of(inputs.scores, expert_idx, cfg), expert_idx, scores)


def quarter_of(moe, tokens):
  return tokens // 4


def a_quarter_of_the_experts(moe, train):
  return moe.num_experts // 4


def keep_double(inputs, cfg, train):
  expert_idx = routing.keep_best(inputs.selection, 2 * cfg.num_experts_per_tok)
  gates = routing.gates_of(inputs.scores, expert_idx, cfg)
  return routing.Routing(gates, expert_idx, inputs.scores)


def twice(moe, train):
  return 2 * moe.num_experts_per_tok


@pytest.fixture(scope='module', autouse=True)
def registered():
  bounded = router_traits.RouterTraits(
    causal=False,
    what='every expert takes a quarter of a row',
    ranked=False,
    active_experts=a_quarter_of_the_experts,
    bound=router_traits.Bound(quarter_of, exact=True),
  )
  more = router_traits.RouterTraits(
    causal=True, uses_selection=True, trains_by_selection=True, active_experts=twice
  )
  routers.register('quarter', routing.Router(take_a_quarter, bounded))
  routers.register('double', routing.Router(keep_double, more, per_token=True))
  yield
  for name in ('quarter', 'double'):
    del routers.ROUTERS[name], router_traits.REGISTERED[name]


def refused(match, call, *args, **kwargs):
  with pytest.raises(errors.InputError, match=match):
    call(*args, **kwargs)


def test_rules_of_the_config():
  tiny.make(**QUARTER)
  policy = {f'{MOE}capacity__policy': 'score'}
  refused('nothing to drop with router .quarter', tiny.make, **QUARTER, **policy)
  bias = {f'{MOE}expert_bias__update_rule': 'sign'}
  refused('router topk and double only', tiny.make, **QUARTER, **bias)
  tiny.make(**DOUBLE, **bias)
  second = {f'{MOE}options__random_second_expert': True}
  refused("which router 'double' does not make", tiny.make, **DOUBLE, **second)
  refused("which router 'quarter' does not make", tiny.make, **QUARTER, **second)
  refused('does not bound', tiny.make, **DOUBLE, **{f'{MOE}dispatch': 'capacity'})
  refused('selection scores need logits', router_traits.RouterTraits, True, uses_selection=True,
          has_logits=False)  # fmt: skip
  refused('did you mean .skew', router_traits.RouterTraits, True, options=('skewe',))


def output(model, train=False):
  rows = tiny.batch()
  inputs = [rows[key] for key in ('tokens', 'positions', 'segment_ids')]
  apply = tiny.jit(transformer.Transformer(model, train).apply)
  return apply({'params': tiny.params(model), 'router_state': {}}, *inputs)


def test_buffers_of_a_bounded_router_lose_nothing():
  model = tiny.make(**QUARTER).model
  # Each of 8 rows gives an expert 16 / 4 tokens at most.
  assert capacity.group_capacity(model.moe, 16) == 4
  assert capacity.slots(model.moe, 8, 16, 8) == 32
  assert routed_experts.dispatch_name(model.moe, True, 8 * 16 * 8) == 'capacity'
  dense = dataclasses.replace(model, moe=dataclasses.replace(model.moe, dispatch='dense'))
  got, want = output(model, train=True), output(dense, train=True)
  np.testing.assert_allclose(got.logits, want.logits, rtol=1e-4, atol=1e-5)
  # A full row of 16 tokens, and rows with padding, in which experts take a quarter of 16 too.
  assert got.stats.sums.load.sum() == want.stats.sums.load.sum() > 0


def test_double_visits_twice_as_many_experts():
  tokens = (tiny.batch()['segment_ids'] > 0).sum()
  model = tiny.make(**DOUBLE).model
  assert output(model).stats.sums.load.sum() == 2 * 4 * tokens  # layers, 2 K


def test_generation():
  model = tiny.make(**QUARTER).model
  refused("router='quarter' has no causal decoding", generate.padded, model, [[1, 2]], 3)
  model = tiny.make(**DOUBLE).model
  variables = {'params': tiny.params(model), 'router_state': {}}
  greedy = sampling.Sampling(temperature=0.0)
  written = generate.generate(model, variables, [[1, 2, 3]], 2, (31,), greedy)
  assert len(written.tokens[0]) > 0


def test_the_sample_prompt_is_checked_before_training(tmp_path):
  def prepare(**overrides):
    page = smoke.get_config()
    page.update_from_flattened_dict({'data.cache_dir': str(tmp_path), 'mesh.data': -1, **overrides})
    return checks.prepare(parse.from_dict(page.to_dict()))

  quarter = {'model.moe.router': 'quarter', 'model.moe.dispatch': 'capacity'}
  refused('router=.quarter. has no causal decoding', prepare, **quarter)
  prepare(**quarter, **{'train.sample_prompt': ''})


def test_counts_and_description():
  plain, quarter, double = (tiny.make(**overrides) for overrides in ({}, QUARTER, DOUBLE))
  expert = 3 * 16 * 8  # gate, up and down of D = 16 and F = 8
  for cfg, active in ((plain, 2), (quarter, 2), (double, 4)):
    assert flops.count_activated(cfg.model).routed_experts == 2 * active * expert
  more = flops.train_flops_per_token(double.model) - flops.train_flops_per_token(plain.model)
  assert more == 6 * 2 * 2 * expert
  text = describe.table([describe.describe(cfg, 'x') for cfg in (quarter, double)])
  assert 'quarter: every expert takes a quarter of a row; 2 of 8 experts per token; not' in text
  assert 'double: 4 of 8 experts per token' in text
  assert 'cannot generate text' not in text.split('double: ')[1]


def test_expected_traffic():
  """8 experts on 4 devices; quarter: each of a device's two has a token with probability 1 / 4."""
  quarter, double = (
    tiny.make(**overrides, **{f'{MOE}num_virtual_devices': 4}).model.moe
    for overrides in (QUARTER, DOUBLE)
  )
  found = virtual_devices.expected_devices_per_token(quarter)
  assert found == pytest.approx(4 * (1 - (3 / 4) ** 2))
  found = virtual_devices.expected_devices_per_token(double)
  assert found == pytest.approx(4 * (1 - math.comb(6, 4) / math.comb(8, 4)))


def test_plans():
  plain, quarter, double = (tiny.make(**overrides) for overrides in ({}, QUARTER, DOUBLE))
  assert estimate.work(double).experts == 2 * estimate.work(plain).experts

  def plan(cfg, decode):
    return planner.plan(planner.Request(cfg, chips.parse('h100:1'), decode=decode, estimate=True))

  refused('has no causal decoding', plan, quarter, True)
  assert plan(quarter, False).fits
  # Each of the 2 K = 4 experts of a token takes 3 F numbers of float32.
  by_router = [plan(cfg, True).breakdown['experts'] for cfg in (plain, double)]
  assert by_router[1] == 2 * by_router[0] > 0


def test_export_is_refused():
  for overrides in (QUARTER, DOUBLE):
    cfg = tiny.make(**overrides, model__num_heads=2)
    refused('config.model.moe.router=', hf_config_export.family_of, cfg.model)


def test_upcycling_keeps_copies_whole():
  for name in ('quarter', 'double'):
    moe = dataclasses.replace(tiny.make().model.moe, router=name)
    refused('choose topk, expert_choice, ds_moe, or', upcycle._check_whole_copies, moe, 2)
    upcycle._check_whole_copies(moe, 1)


def test_analyses():
  quarter, double = (tiny.make(**overrides).model for overrides in (QUARTER, DOUBLE))
  bits = leakage.bits_of(8, 4, 16)  # 8 experts take 4 of 16 tokens
  assert leakage_probe.theory(quarter)['bits_per_token_per_layer'] == bits
  assert leakage_probe.theory(double) is None
  refused('does not rank', interventions._check, quarter.moe, [1, 0], [1.0, 1.0])
  interventions._check(double.moe, [4, 0], [1.0, 1.0])
  refused('at most 4', interventions._check, double.moe, [5, 0], [1.0, 1.0])


def test_probes_skip_what_does_not_apply():
  class Sample:
    cfg = tiny.make(**QUARTER)
    variables = None

  class Context:
    sample, subject, bits_per_byte = Sample, Sample, 1.0

  with pytest.raises(probe_types.NotApplicableError, match='does not take the best K'):
    ablation.fewer_experts(Context)
  with pytest.raises(probe_types.NotApplicableError, match='does not rank'):
    ablation.disable_top(Context)
