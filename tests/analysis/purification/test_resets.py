"""Planted drift is found; nothing and everything kept; rankings; experts never seen."""

import jax
import numpy as np
import pytest

from moe_jax import errors
from moe_jax.analysis.purification import fisher, resets
from tests.analysis.purification import planted


def same(one, other):
  return all(
    np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
  )


def drifted(share=0.01, seed=0):
  """(start, tuned, curvature all seen, planted): drift as theory has it, and a share too far.

  Harmless drift has variance H, as of section 2 of the sheet. The planted share of low-curvature
  weights moves by 100 standard deviations of theirs.
  """
  rng = np.random.default_rng(seed)
  start = planted.numpy_params()
  diagonal = jax.tree.map(lambda a: rng.gamma(2.0, 1.0, a.shape).astype(np.float32), start)
  low = jax.tree.map(lambda h: (h < 1.0) & (rng.random(h.shape) < share / 0.26), diagonal)

  def move(w, h, far):
    return w + np.where(far, 100.0, rng.standard_normal(w.shape)) * np.sqrt(h) * 1e-2

  tuned = jax.tree.map(move, start, diagonal, low)
  seen = fisher.seen_experts(diagonal)
  return start, tuned, fisher.Fisher(diagonal, seen.astype(int), seen), low


def count(tree):
  return sum(int(a.sum()) for a in jax.tree.leaves(tree))


@pytest.mark.parametrize('ranking', resets.RANKINGS)
def test_planted_drift_is_what_is_reset(ranking):
  start, tuned, curvature, low = drifted()
  total, number = sum(a.size for a in jax.tree.leaves(start)), count(low)
  assert 0.005 < number / total < 0.02
  found = resets.purified(start, tuned, curvature, 1 - 1.5 * number / total, ranking=ranking)
  back = jax.tree.map(np.logical_not, found.kept)
  hit = count(jax.tree.map(np.logical_and, back, low))
  assert hit / number > (0.999 if ranking == 'global' else 0.8)
  assert found.reset == count(back) and found.ranked == total


def test_drift_alone_would_not_find_it():
  """Low curvature is what gives planted weights away: they have not moved farthest."""
  start, tuned, curvature, low = drifted()
  scaled = jax.tree.map(lambda w, t, far: np.where(far, w + (t - w) / 20, t), start, tuned, low)
  by_ratio = resets.indicator(start, scaled, curvature.diagonal)
  ratio = np.concatenate([a[f] for a, f in zip(jax.tree.leaves(by_ratio), jax.tree.leaves(low))])
  others = np.concatenate([a[~f] for a, f in zip(jax.tree.leaves(by_ratio), jax.tree.leaves(low))])
  assert np.quantile(ratio, 0.01) > np.quantile(others, 0.999)
  np.testing.assert_allclose(ratio, 25e-4, rtol=0.1)  # (5 x 1e-2)^2


def test_flat_weights_count_by_their_drift_over_the_floor_of_their_layer():
  start, tuned, curvature, _ = drifted()
  diagonal = jax.tree.map(np.array, curvature.diagonal)
  own = diagonal['moe_layers']['moe']['down']
  own[1, 3, 0] = 0
  moved = np.square(tuned['moe_layers']['moe']['down'] - start['moe_layers']['moe']['down'])
  found = resets.indicator(start, tuned, diagonal)['moe_layers']['moe']['down']
  expected = moved[1, 3, 0] / (1e-3 * own[1].mean(dtype=np.float64))
  np.testing.assert_allclose(found[1, 3, 0], expected, rtol=1e-6)
  tuned['moe_layers']['moe']['down'][1, 3, 0] = start['moe_layers']['moe']['down'][1, 3, 0]
  own[1] = 0
  found = resets.indicator(start, tuned, diagonal)['moe_layers']['moe']['down']
  assert not found[1, 3, 0].any() and np.isinf(found[1, 2]).all()


def test_all_and_nothing():
  start, tuned, curvature, _ = drifted()
  for ranking in resets.RANKINGS:
    assert same(resets.purified(start, tuned, curvature, 1, ranking=ranking).params, tuned)
    assert same(resets.purified(start, tuned, curvature, 0, ranking=ranking).params, start)
  assert same(resets.mixed(start, tuned, 1, 0).params, tuned)
  assert same(resets.mixed(start, tuned, 0, 0).params, start)


def test_more_reserve_resets_less_and_the_same_first():
  start, tuned, curvature, _ = drifted()
  found = [resets.purified(start, tuned, curvature, rho) for rho in (0.2, 0.5, 0.8)]
  assert found[0].reset > found[1].reset > found[2].reset > 0
  for less, more in zip(found, found[1:]):
    both = jax.tree.map(np.logical_and, less.kept, more.kept)
    assert same(both, less.kept)
  assert found[1].reset == found[1].ranked - round(0.5 * found[1].ranked)


def test_layers_are_ranked_apart():
  start, tuned, curvature, _ = drifted()
  tuned['final_norm']['scale'] = start['final_norm']['scale'] + 1e3
  score = resets.indicator(start, tuned, curvature.diagonal)
  per_layer = resets.keep_lowest(score, 0.5, ranking='layer')
  assert per_layer['final_norm']['scale'].sum() == 8  # of 16
  for layer in range(2):
    own = [a[layer] for a in jax.tree.leaves(per_layer['moe_layers'])]
    total = sum(a.size for a in own)
    assert sum(a.sum() for a in own) == round(0.5 * total)
  whole = resets.keep_lowest(score, 0.5)
  assert not whole['final_norm']['scale'].any()


def unseen_expert():
  start, tuned, curvature, _ = drifted()
  diagonal = jax.tree.map(np.array, curvature.diagonal)
  for key in fisher.ROUTED:
    diagonal['moe_layers']['moe'][key][1, 3] = 0
  seen = fisher.seen_experts(diagonal)
  assert (~seen).sum() == 1 and not seen[1, 3]
  return start, tuned, fisher.Fisher(diagonal, seen.astype(int), seen)


def expert(tree):
  return {key: tree['moe_layers']['moe'][key][1, 3] for key in fisher.ROUTED}


def test_experts_never_seen_are_reported_and_stay_unless_asked_for():
  start, tuned, curvature = unseen_expert()
  found = resets.purified(start, tuned, curvature, 0.0)
  np.testing.assert_array_equal(np.argwhere(found.unseen), [[1, 3]])
  assert same(expert(found.params), expert(tuned))
  assert found.ranked == sum(a.size for a in jax.tree.leaves(start)) - 8 * 16 * 3
  ranked = resets.purified(start, tuned, curvature, 0.9, unseen='rank')
  # A share 0.1 is put back of all, and of this expert, whose r is over the floor, nearly all.
  assert all((~a).mean() > 0.85 for a in expert(ranked.kept).values())
  assert ranked.unseen[1, 3]
  assert same(resets.purified(start, tuned, curvature, 0.0, unseen='rank').params, start)


def test_mixing_resets_at_random_by_its_seed():
  start, tuned, _, _ = drifted()
  found = resets.mixed(start, tuned, 0.7, 3)
  total = sum(a.size for a in jax.tree.leaves(start))
  assert count(found.kept) == round(0.7 * total)
  assert same(found.kept, resets.mixed(start, tuned, 0.7, 3).kept)
  assert not same(found.kept, resets.mixed(start, tuned, 0.7, 4).kept)


def test_whole_experts_are_put_back():
  start, tuned, _, _ = drifted()
  which = np.zeros((2, 8), bool)
  which[1, 3] = True
  found = resets.experts_reset(start, tuned, which)
  assert same(expert(found), expert(start))
  for key in fisher.ROUTED:
    found['moe_layers']['moe'][key] = found['moe_layers']['moe'][key].copy()
    found['moe_layers']['moe'][key][1, 3] = tuned['moe_layers']['moe'][key][1, 3]
  assert same(found, tuned)


def test_bad_input():
  start, tuned, curvature, _ = drifted()
  for reserve in (-0.1, 1.01):
    with pytest.raises(errors.InputError, match='--reserve'):
      resets.purified(start, tuned, curvature, reserve)
    with pytest.raises(errors.InputError, match='--reserve'):
      resets.mixed(start, tuned, reserve, 0)
  with pytest.raises(errors.InputError, match="--ranking=layers .*did you mean 'layer'"):
    resets.purified(start, tuned, curvature, 0.5, ranking='layers')
  with pytest.raises(errors.InputError, match='--unseen=drop'):
    resets.purified(start, tuned, curvature, 0.5, unseen='drop')


def test_another_architecture():
  start, tuned, curvature, _ = drifted()
  wider = {**tuned, 'embedding': np.zeros((32, 24))}
  with pytest.raises(errors.InputError, match=r'params/embedding is \[32, 16\] .* \[32, 24\]'):
    resets.purified(start, wider, curvature, 0.5)
  less = {key: value for key, value in tuned.items() if key != 'head'}
  with pytest.raises(errors.InputError, match='params/head is .* absent in --workdir'):
    resets.purified(start, less, curvature, 0.5)
