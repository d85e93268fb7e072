"""The arms of the study: what they are, that they match where a claim needs it, and their names."""

import dataclasses
import pathlib

import pytest

from configs import routing
from experiments.common import cli
from experiments.routing_ablation import arms, matching
from moe_jax import errors
from moe_jax.config import moe_config, pages

ROOT = pathlib.Path(__file__).parents[2]


def resolved(scale, names=()):
  return {arm.name: arms.resolve(arm, scale) for arm in arms.choose(list(names), scale)}


@pytest.mark.parametrize('scale', arms.SCALES)
def test_arms_match_at_every_scale(scale):
  described = matching.describe(resolved(scale))
  lines = matching.check(described)
  assert 'shared_4 against deepseekmoe: activated parameters without routers: equal' in lines
  assert len(lines) == len(set(lines)) > 25
  needed = {name for c in arms.CLAIMS for name in (c.arm, c.baseline) if name}
  needed |= {name for s in arms.SWEEPS for name in s.points}
  assert needed >= {arm.name for arm in arms.of_scale('2b') if not arm.aside}


def test_no_point_of_a_sweep_has_a_router_that_learns_nothing():
  """A single gate that is divided by itself is 1, whatever the router says."""
  for sweep in arms.SWEEPS:
    assert len(sweep.points) >= 4
    for cfg in resolved('tiny', sweep.points).values():
      assert cfg.model.moe.num_experts_per_tok > 1 and cfg.model.moe.norm_topk_prob


def test_every_router_is_an_arm_once():
  """What `configs/routing.py` has is among the arms of its size, and none is there twice."""
  configs = {arm.name: arms.resolve(arm, 'tiny', steps=300) for arm in arms.of_scale('tiny')}
  assert len({(arms.ARMS[name].start, repr(cfg)) for name, cfg in configs.items()}) == len(configs)
  for name in routing.VARIANTS:
    arm = arms.SAME.get(name) or arms.RENAMED.get(name, name)
    assert configs[arm] == _resolved_variant(name), name
  usual = {arm.name for arm in arms.choose([], 'tiny')}
  assert set(configs) - usual == set(arms.ASIDE)
  assert [arm.name for arm in arms.choose(['skewed', 'gshard'], 'tiny')] == ['skewed', 'gshard']
  with pytest.raises(errors.InputError, match="'sigmoid' is none of the arms of --scale=small"):
    arms.choose(['sigmoid'], 'small')


def _resolved_variant(name):
  return cli.resolve(pages.values(f'{ROOT}/configs/routing.py:{name}'))


def test_the_ladder_is_the_papers():
  found = resolved('2b', ('gshard', '1_15', '1_31', 'deepseekmoe', 'half'))
  got = {
    name: (moe.num_shared_experts, moe.num_experts_per_tok, moe.num_experts)
    for name, cfg in found.items()
    for moe in [cfg.model.moe]
  }
  assert got == {
    'gshard': (0, 2, 16),
    '1_15': (1, 1, 15),
    '1_31': (1, 3, 31),
    'deepseekmoe': (1, 7, 63),
    'half': (1, 3, 63),
  }
  # Sweeps start from the same sizes, and only their gates are divided by their sum.
  sweep = resolved('tiny', ('m4', 'deepseekmoe'))
  m4, page_itself = sweep['m4'].model, sweep['deepseekmoe'].model
  assert m4.moe.norm_topk_prob and not page_itself.moe.norm_topk_prob
  assert dataclasses.replace(m4.moe, norm_topk_prob=False) == page_itself.moe


def test_unmatched_arms_are_refused_and_named():
  configs = resolved('tiny', ('gshard', 'deepseekmoe'))
  model = configs['deepseekmoe'].model
  wider = dataclasses.replace(model.moe, moe_mlp_dim=model.moe.moe_mlp_dim + 1)
  model = dataclasses.replace(model, moe=wider)
  configs['deepseekmoe'] = dataclasses.replace(configs['deepseekmoe'], model=model)
  with pytest.raises(errors.InputError, match='deepseekmoe against gshard: parameters .*0.5%'):
    matching.check(matching.describe(configs))


def test_unknown_arm():
  with pytest.raises(errors.InputError, match="did you mean 'gshard'"):
    arms.choose(['gshart'], 'tiny')


def test_a_shorter_run_keeps_the_share_of_its_warm_up():
  cfg = arms.resolve(arms.ARMS['gshard'], 'small', steps=400)
  assert (cfg.train.num_steps, cfg.optim.warmup_steps) == (400, 20)  # of 4000 and 200
  # At the smallest scale the pages' own 300 steps, 0.3M tokens, are too few to decide.
  cfg = arms.resolve(arms.ARMS['gshard'], 'tiny')
  assert cfg.train.num_steps * cfg.train.batch_size * cfg.model.max_seq_len >= 3e6


def test_text_of_ones_own():
  cfg = arms.resolve(arms.ARMS['gshard'], 'tiny', 0, 'a.txt', 'text', 0.2)
  assert (cfg.data.path, cfg.data.source, cfg.data.heldout_fraction) == ('a.txt', 'text', 0.2)
  with pytest.raises(errors.InputError, match='heldout_fraction=0.0 must'):
    arms.resolve(arms.ARMS['gshard'], 'tiny', heldout_fraction=0.0)


def test_rivals_of_loss_free_balancing_differ_from_it_in_balance_alone():
  """Each lets a balance loss push where `loss_free` moves a bias; all else is the same."""
  found = resolved('tiny', ('loss_free', 'aux', 'aux_x10', 'aux_normalised'))
  pushes = {}
  for name, cfg in found.items():
    moe = cfg.model.moe
    pushes[name] = {key: moe.loss(key).weight for key in moe_config.LOSSES if moe.loss(key).weight}
    assert (moe.expert_bias.update_rule == 'sign') == (name == 'loss_free')
    assert dataclasses.replace(moe, balance=None, expert_bias=None) == dataclasses.replace(
      found['loss_free'].model.moe, balance=None, expert_bias=None
    )
  assert pushes == {
    'loss_free': {},
    'aux': {'expert_level': 1e-3},
    'aux_x10': {'expert_level': 1e-2},
    'aux_normalised': {'normalized_expert_level': 1e-2},
  }
