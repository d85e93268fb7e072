"""Dropping by hand on 3 and 4 tokens, and what must hold for any batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from moe_jax import errors, integer_hash
from moe_jax.config import moe_config, parse
from moe_jax.models.routers import capacity, expert_choice, routing
from moe_jax.models.routers import decision as decision_lib
from tests import tiny

POLICIES = ('position', 'score', 'batch_priority', 'device')


@functools.cache
def make(
  policy='position', e=2, k=1, factor=1.0, group_rows=0, **overrides
) -> moe_config.MoEConfig:
  """A checked `MoEConfig`; an override is written `section__key=value`."""
  page = base.get_config()
  page.train.batch_size = 5040  # any group or chunk of these tests divides it
  values = {'num_experts': e, 'num_experts_per_tok': k, 'moe_mlp_dim': 8}
  values |= {'capacity.policy': policy, 'capacity.factor': factor}
  values |= {'capacity.group_rows': group_rows}
  values |= {key.replace('__', '.'): value for key, value in overrides.items()}
  page.update_from_flattened_dict({f'model.moe.{key}': value for key, value in values.items()})
  return parse.from_dict(page.to_dict()).model.moe


def tokens_of(b, length, seed=0) -> routing.Tokens:
  return routing.Tokens(
    ids=np.zeros((b, length), np.int32),
    mask=np.ones((b, length), bool),
    row=np.arange(b, dtype=np.int32),
    seed=np.uint32(seed),
  )


def decision_of(expert_idx, scores) -> routing.Routing:
  """Normalised gates (all 1 for K = 1): a policy that reads them cannot order anything."""
  expert_idx = np.asarray(expert_idx, np.int32)
  gates = np.full(expert_idx.shape, 1 / expert_idx.shape[-1], np.float32)
  return routing.Routing(gates, expert_idx, np.asarray(scores, np.float32))


@functools.cache
def exempter(cfg):
  return tiny.jit(functools.partial(capacity.exempt_rows, cfg))


@functools.cache
def keeper(cfg):
  return tiny.jit(functools.partial(capacity.keep, cfg))


def keep(cfg, expert_idx, scores, seed=0) -> np.ndarray:
  decision = decision_of(expert_idx, scores)
  tokens = tokens_of(*decision.expert_idx.shape[:2], seed)
  return np.asarray(keeper(cfg)(decision, tokens))


def random_case(b=8, length=12, e=6, k=3, padding=0.2, seed=0):
  """Scores with a taste for the low experts, the best K of them, padding and unused choices."""
  rng = np.random.default_rng(seed)
  scores = rng.random((b, length, e)).astype(np.float32) - 0.1 * np.arange(e, dtype=np.float32)
  expert_idx = np.argsort(-scores, axis=-1)[..., :k].astype(np.int32)
  expert_idx[rng.random((b, length)) < padding] = e
  expert_idx[..., 1][rng.random((b, length)) < padding] = e
  return expert_idx, scores


# One row of 4 tokens, E = 2, K = 1, factor 1: C = ceil(1 * 1 * 4 / 2) = 2.
# Experts 0 0 0 1: expert 0 has three for two places. The scores of the chosen ones are .2 .5 .6 .3;
# the highest scores are .8 .55 .6 .3, since a bias may choose another expert than the highest.
ONE = np.array([[[0], [0], [0], [1]]])
ONE_SCORES = np.array([[[0.2, 0.8], [0.5, 0.55], [0.6, 0.4], [0.1, 0.3]]])


@pytest.mark.parametrize(
  'policy, want',
  [
    ('position', [1, 1, 0, 1]),  # the first two tokens of expert 0
    ('score', [0, 1, 1, 1]),  # .6 and .5, not .2
    ('batch_priority', [1, 0, 1, 1]),  # .8 (token 0) and .6 (token 2), not .55
    # Two devices of one expert each: budget ceil(4 / 2) = 2, the same as score.
    ('device', [0, 1, 1, 1]),
  ],
)
def test_one_choice_of_four_tokens(policy, want):
  got = keep(make(policy, num_virtual_devices=2), ONE, ONE_SCORES)
  assert got[0, :, 0].astype(int).tolist() == want


# One row of 3 tokens, E = 3, K = 2: C = ceil(1 * 2 * 3 / 3) = 2.
#   token 0: experts 0, 1, scores .5 .4
#   token 1: experts 1, 0, scores .6 .55
#   token 2: experts 0, 1, scores .7 .2
TWO = np.array([[[0, 1], [1, 0], [0, 1]]])
TWO_SCORES = np.array([[[0.5, 0.4, 0.1], [0.55, 0.6, 0.1], [0.7, 0.2, 0.1]]])


@pytest.mark.parametrize(
  'policy, want',
  [
    # Expert 0: the first choices of 0 and 2 fill it. Expert 1: first choice of 1, then 0 before 2.
    ('position', [[1, 1], [1, 0], [1, 0]]),
    # Expert 0: .7 (token 2), .55 (1); .5 is out. Expert 1: .6 (1), .4 (0); .2 is out.
    ('score', [[0, 1], [1, 1], [1, 0]]),
    # Tokens by highest score: 2 (.7), 1 (.6), 0 (.5). Expert 0: the first choices of 2 and 0.
    # Expert 1: first choice of 1, then 2 before 0.
    ('batch_priority', [[1, 0], [1, 0], [1, 1]]),
  ],
)
def test_two_choices_of_three_tokens(policy, want):
  assert keep(make(policy, 3, 2), TWO, TWO_SCORES)[0].astype(int).tolist() == want


def test_first_choices_come_before_better_second_ones():
  # E = 2, K = 2, 3 tokens: C = 3, all fit; with factor 1/3 C = 1. Expert 1: first choice of token 1
  # with score .6, second choice of token 0 with .9. Expert 0: first choices of 0 and 2.
  expert_idx = [[[0, 1], [1, 0], [0, 1]]]
  scores = [[[0.95, 0.9], [0.2, 0.6], [0.8, 0.7]]]

  def kept(policy):
    return keep(make(policy, 2, 2, 0.3333), expert_idx, scores)[0].astype(int).tolist()

  assert kept('position') == [[1, 0], [1, 0], [0, 0]]
  assert kept('batch_priority') == [[1, 0], [1, 0], [0, 0]]
  assert kept('score') == [[1, 1], [0, 0], [0, 0]]


def test_a_device_shares_its_budget_among_its_experts():
  # E = 5 on D = 2 devices: experts 0-2 and 3-4. 4 tokens, K = 2, factor 1: budget
  # ceil(1 * 2 * 4 / 2) = 4 each. Device 0 has 7 assignments: .9 .8 .7 .6 .5 .4 .3; the four best
  # stay, though expert 0 alone has three of them. Device 1 has one, .1, and keeps it.
  expert_idx = [[[0, 1], [0, 2], [0, 3], [2, 1]]]
  scores = [
    [
      [0.9, 0.4, 0, 0, 0],
      [0.8, 0, 0.3, 0, 0],
      [0.7, 0, 0, 0.1, 0],
      [0, 0.5, 0.6, 0, 0],
    ]
  ]
  got = keep(make('device', 5, 2, num_virtual_devices=2), expert_idx, scores)
  assert got[0].astype(int).tolist() == [[1, 0], [1, 0], [1, 1], [1, 0]]


def test_the_budget_is_rounded_up():
  assert capacity.group_capacity(make('device', 5, 2, num_virtual_devices=2), 3) == 3  # 6 / 2
  assert capacity.group_capacity(make('device', 6, 1, 1.25, num_virtual_devices=3), 4) == 2  # 5 / 3
  assert capacity.group_capacity(make('score', 3, 2), 4) == 3  # 8 / 3
  # 0.07 * 100 is 7.000000000000001 in floats.
  assert capacity.group_capacity(make('score', 1, 1, 0.07), 100) == 7


@pytest.mark.parametrize('policy', POLICIES)
def test_ties_keep_token_order(policy):
  # E = 1: C = 2 of 4 tokens with factor 1/2; for the device policy D = 1, the same budget.
  got = keep(make(policy, 1, 1, 0.5), np.zeros((1, 4, 1)), np.full((1, 4, 1), 0.5))
  assert got[0, :, 0].astype(int).tolist() == [1, 1, 0, 0]


def test_ties_on_a_device_keep_token_order_before_choice_order():
  # 3 tokens, E = K = 2, one device: budget ceil(1/2 * 6) = 3: token 0's two, one of 1.
  got = keep(make('device', 2, 2, 0.5), np.tile([0, 1], (1, 3, 1)), np.full((1, 3, 2), 0.5))
  assert got[0].astype(int).tolist() == [[1, 1], [1, 0], [0, 0]]


@pytest.mark.parametrize('policy', POLICIES)
def test_padding_never_competes_and_is_never_kept(policy):
  # Padding with the best scores and the earliest place; C = ceil(4 / 2) = 2 counts it nevertheless.
  expert_idx = ONE.copy()
  expert_idx[0, 1] = 2
  scores = ONE_SCORES.copy()
  scores[0, 1] = 9.0
  got = keep(make(policy, num_virtual_devices=2), expert_idx, scores)
  assert got[0, :, 0].tolist() == [True, False, True, True]


def reference(cfg, expert_idx, scores, exempt) -> np.ndarray:
  """The policies, one assignment after the other, in Python."""
  b, length, k = expert_idx.shape
  rows = cfg.capacity.group_rows or b
  room = capacity.group_capacity(cfg, rows * length)
  size = -(-cfg.num_experts // cfg.num_virtual_devices)
  kept = np.zeros(expert_idx.shape, bool)

  def priority(place):
    row, token, choice = place
    score = -scores[row, token, expert_idx[place]]
    by_policy = {
      'position': (choice,),
      'score': (score,),
      'batch_priority': (choice, -scores[row, token].max()),
      'device': (score,),
    }[cfg.capacity.policy]
    return (not exempt[row], *by_policy, row, token, choice)

  for first in range(0, b, rows):
    places = [
      place
      for place in np.ndindex(*expert_idx.shape)
      if first <= place[0] < first + rows and expert_idx[place] < cfg.num_experts
    ]
    count = {}
    for place in sorted(places, key=priority):
      expert = expert_idx[place]
      bin = expert // size if cfg.capacity.policy == 'device' else expert
      kept[place] = count.get(bin, 0) < room or exempt[place[0]]
      count[bin] = count.get(bin, 0) + 1
  return kept


@pytest.mark.parametrize('group_rows, exempt_fraction', [(0, 0.0), (1, 0.0), (4, 0.4)])
@pytest.mark.parametrize('policy', POLICIES)
def test_any_batch_is_dropped_as_the_plain_loop_says(policy, group_rows, exempt_fraction):
  # Devices of 3 and 2 experts: where E // size is the last device, padding must not compete there.
  sizes = dict(e=5, k=3, factor=0.7, group_rows=group_rows, num_virtual_devices=2)
  cfg = make(policy, **sizes, capacity__exempt_fraction=exempt_fraction)
  idx, scores = random_case(e=5)
  scores = np.round(scores, 1)  # ties
  rows = np.asarray(exempter(cfg)(tokens_of(8, 12)))
  assert 0 < rows.sum() < 8 or not exempt_fraction
  got = keep(cfg, idx, scores)
  np.testing.assert_array_equal(got, reference(cfg, idx, scores, rows))
  assert 0 < got.sum() < (idx < 5).sum()


@pytest.mark.parametrize('policy', POLICIES)
def test_groups_do_not_know_of_each_other(policy):
  """Rows 0-1 are dropped alike whatever rows 2-7 hold; alone they are one group."""
  cfg = make(policy, 6, 3, 0.7, 2, num_virtual_devices=3)
  idx, scores = random_case()
  other_idx, other_scores = random_case(seed=1)
  other_idx[:2], other_scores[:2] = idx[:2], scores[:2]
  got = keep(cfg, idx, scores)[:2]
  np.testing.assert_array_equal(got, keep(cfg, other_idx, other_scores)[:2])
  np.testing.assert_array_equal(got, keep(cfg, idx[:2], scores[:2]))


@pytest.mark.parametrize('policy', POLICIES)
def test_kept_and_dropped_are_what_was_chosen(policy):
  cfg = make(policy, 6, 3, 0.7, 2, num_virtual_devices=3)
  idx, scores = random_case()
  kept = keep(cfg, idx, scores)
  after = tiny.jit(routing.without_choices)(decision_of(idx, scores), kept)

  def count(where):
    return np.bincount(idx[where], minlength=7)

  dropped = ~kept & (idx < 6)
  np.testing.assert_array_equal(count(kept) + count(dropped), count(idx < 6))
  np.testing.assert_array_equal(
    np.bincount(np.asarray(after.expert_idx)[kept], minlength=7)[:6], count(kept)[:6]
  )
  # The limit binds somewhere, and holds everywhere.
  bins = np.where(idx < 6, idx // 2 if policy == 'device' else idx, 99)
  load = np.stack([(kept & (bins == i)).reshape(4, -1).sum(axis=-1) for i in range(6)], axis=-1)
  assert load.max() == capacity.group_capacity(cfg, 24)


@pytest.mark.parametrize('policy', POLICIES)
def test_ample_capacity_drops_nothing(policy):
  cfg = make(policy, 6, 3, 6.0, 1, num_virtual_devices=3)
  idx, scores = random_case()
  np.testing.assert_array_equal(keep(cfg, idx, scores), idx < 6)


def test_exempt_rows_use_the_room_first_and_exceed_it():
  # 4 rows of one token, E = 1, K = 1, factor 1/4: room ceil(4 / 4) = 1 in the one group. Without
  # exemption row 0 takes it.
  cfg = make('position', 1, 1, 0.25)
  idx, scores = np.zeros((4, 1, 1)), np.ones((4, 1, 1))
  assert keep(cfg, idx, scores)[:, 0, 0].tolist() == [True, False, False, False]
  exempting = make('position', 1, 1, 0.25, capacity__exempt_fraction=0.5)
  draw = tiny.jit(
    lambda seed: integer_hash.uniform(integer_hash.combine(seed, 5, np.arange(4))) < 0.5
  )
  seen = set()
  for seed in range(8):
    drawn = np.asarray(draw(np.uint32(seed)))
    got = keep(exempting, idx, scores, seed)[:, 0, 0]
    # Any exempt row fills the room; with none of them row 0 takes it.
    want = drawn if drawn.any() else np.arange(4) == 0
    np.testing.assert_array_equal(got, want)
    seen.add(tuple(drawn.tolist()))
  assert len(seen) > 3  # drawn anew each step


def test_the_exempt_share_is_the_fraction():
  cfg = make('device', 6, 3, 0.5, 1, capacity__exempt_fraction=0.1)
  rows = exempter(cfg)(tokens_of(20_000, 1))
  # Binomial: 0.1 +- 4 * sqrt(0.1 * 0.9 / 20000) = 0.0085.
  assert abs(float(rows.mean()) - 0.1) < 0.0085


def test_a_micro_batch_exempts_the_rows_that_the_whole_batch_does():
  cfg = make('score', 6, 3, 0.5, 1, capacity__exempt_fraction=0.4)
  whole = tokens_of(8, 12, seed=3)
  part = whole._replace(**{name: getattr(whole, name)[4:] for name in ('ids', 'mask', 'row')})
  np.testing.assert_array_equal(exempter(cfg)(part), exempter(cfg)(whole)[4:])


def test_rows_that_cannot_be_grouped_are_refused_by_name():
  with pytest.raises(errors.InputError, match=r'config\.model\.moe\.capacity\.group_rows=3 .* 8'):
    keep(make('score', 6, 3, group_rows=3), *random_case())


def test_no_gradient_and_saved_under_the_name_routing():
  cfg = make('score', 6, 3, 0.7, 1)
  idx, scores = random_case()

  def loss(scores):
    traced = decision_of(idx, np.zeros(()))._replace(scores=scores)
    return jnp.where(capacity.keep(cfg, traced, tokens_of(8, 12)), 1.0, 2.0).sum()

  assert 'name=routing' in str(jax.make_jaxpr(jax.grad(loss))(scores))
  assert not np.asarray(tiny.jit(jax.grad(loss))(scores)).any()


@pytest.mark.parametrize(
  'policy, group_rows', [*((policy, 1) for policy in POLICIES), ('device', 4), ('score', 0)]
)
def test_sharding_the_batch_changes_nothing(policy, group_rows):
  sizes = dict(e=6, k=3, factor=0.7, group_rows=group_rows, num_virtual_devices=3)
  cfg = make(policy, **sizes, capacity__exempt_fraction=0.2)
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  split, whole = (jax.NamedSharding(mesh, spec) for spec in (jax.P('data'), jax.P()))
  idx, scores = random_case()
  decision = jax.device_put(decision_of(idx, scores), split)
  tokens = jax.device_put(tokens_of(8, 12), routing.Tokens(split, split, split, whole))
  compiled = keeper(cfg).lower(decision, tokens).compile()
  rows = np.asarray(exempter(cfg)(tokens_of(8, 12)))
  np.testing.assert_array_equal(compiled(decision, tokens), reference(cfg, idx, scores, rows))
  # With groups of one row every device decides on its own rows.
  gathers = 'all-gather' in compiled.as_text() or 'all-to-all' in compiled.as_text()
  assert gathers == (group_rows != 1)


@pytest.mark.parametrize('num_rows', [1, 2, 4, 8])
@pytest.mark.parametrize('group_rows', [0, 1, 2, 4, 8])
def test_slots_hold_what_is_kept_on_every_device(group_rows, num_rows):
  cfg = make('score', 6, 3, 0.7, group_rows)
  bound = capacity.slots(cfg, num_rows, 12, 8)
  for seed in range(3):
    idx, scores = random_case(padding=0.0, seed=seed)
    if seed == 0:  # one device holds all that expert 0 may keep
      idx[:num_rows, :, 0], idx[:num_rows, :, 1:] = 0, (1, 2)
      scores[:num_rows, :, 0] = 9.0
    kept = keep(cfg, idx, scores).reshape(8 // num_rows, -1)
    on_device = idx.reshape(8 // num_rows, -1)
    load = np.stack([(kept & (on_device == i)).sum(axis=-1) for i in range(6)])
    assert load.max() <= bound
    if seed == 0:
      assert load.max() == bound  # and no larger than needed


def test_slots_by_hand():
  # E = 4, K = 2, L = 10, factor 1.25, one row per group: C = ceil(1.25 * 2 * 10 / 4) = 7.
  one = make('score', 4, 2, 1.25, 1)
  assert capacity.slots(one, 1, 10, 8) == 7
  assert capacity.slots(one, 4, 10, 8) == 28
  # Groups of 4 rows: C = ceil(1.25 * 2 * 40 / 4) = 25; all of it may be on one device of 4 rows,
  # but 2 rows have 20 places. 8 rows hold two groups.
  four = make('score', 4, 2, 1.25, 4)
  assert [capacity.slots(four, rows, 10, 8) for rows in (4, 2, 8)] == [25, 20, 50]
  # 3 rows per device, groups of 4: rows 3-5 hold one row of a group (10 places) and two of the next
  # (20 places); rows 0-2 only part of one, min(25, 30).
  assert capacity.slots(four, 3, 10, 12) == 30
  # All rows compete: 8 rows have C = 50, and 4 of them 40 places.
  whole = make('score', 4, 2, 1.25, 0)
  assert [capacity.slots(whole, rows, 10, 8) for rows in (8, 4)] == [50, 40]
  # Nothing is dropped: any expert may get all.
  assert capacity.slots(make('none', 4, 2), 4, 10, 8) == 40


def test_slots_of_expert_choice_by_hand():
  choice = functools.partial(make, 'none', 4, 2, router='expert_choice')
  # One row per chunk: floor(2 * 10 / 4) = 5 each.
  assert capacity.slots(choice(), 3, 10, 12) == 15
  # Chunks of 5 places, floor(2 * 5 / 4) = 2 each, two in a row; of 1 place: at least 1.
  assert capacity.slots(choice(options__chunk_tokens=5), 3, 10, 12) == 12
  assert capacity.slots(choice(options__chunk_tokens=1), 3, 10, 12) == 30
  # Chunks of 20 places, floor(2 * 20 / 4) = 10 each: rows 0-2 hold one and half of the next.
  assert capacity.slots(choice(options__chunk_tokens=20), 3, 10, 12) == 20
  # Dealt at random: 12 chunks of 10 take 12 * 5 = 60 tokens, all perhaps from these 3 rows of 30;
  # with 8 experts 12 * 2 = 24.
  assert capacity.slots(choice(options__shuffle_chunks=True), 3, 10, 12) == 30
  eight = make('none', 8, 2, router='expert_choice', options__shuffle_chunks=True)
  assert capacity.slots(eight, 3, 10, 12) == 24


@pytest.mark.parametrize('chunk, shuffle', [(0, False), (24, False), (4, True), (24, True)])
def test_slots_hold_what_expert_choice_takes(chunk, shuffle):
  options = dict(options__chunk_tokens=chunk, options__shuffle_chunks=shuffle)
  cfg = make('none', 6, 2, router='expert_choice', **options)
  _, scores = random_case()
  scores[2:4] += 9.0  # the rows of one device are everybody's best
  inputs = routing.Inputs(scores, None, tokens_of(8, 12), np.int32(0), {})
  route = tiny.jit(lambda inputs: expert_choice.route(inputs, cfg, True).expert_idx)
  idx = np.asarray(route(inputs)).reshape(4, -1)
  load = np.stack([(idx == i).sum(axis=-1) for i in range(6)])
  assert load.max() <= capacity.slots(cfg, 2, 12, 8)


def test_no_row_is_exempt_at_evaluation():
  cfg = make(capacity__exempt_fraction=1.0, capacity__at_eval=True, dispatch='dropless')
  decision = decision_of(np.zeros((1, 4, 1)), np.tile([0.9, 0.1], (1, 4, 1)))
  arguments = (decision, tokens_of(1, 4), np.int32(0))
  trained, evaluated = (decision_lib.drop(cfg, train, *arguments) for train in (True, False))
  assert trained.expert_idx.ravel().tolist() == [0, 0, 0, 0]
  assert evaluated.expert_idx.ravel().tolist() == [0, 0, 2, 2]  # room for 4 / 2
