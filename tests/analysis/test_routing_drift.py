import re

import jax
import numpy as np
import pytest

from moe_jax import errors
from moe_jax.analysis import drift_text, observations, routing_drift
from tests.analysis import subjects


@pytest.fixture(scope='module')
def start():
  return subjects.subject_of()


def drift(start, tuned):
  seen = [observations.collect(one, 0) for one in (start, tuned)]
  return routing_drift.between(
    *seen, start.variables['params'], jax.tree.map(np.asarray, tuned.variables['params'])
  )


def test_a_model_that_did_not_move(start):
  found = drift(start, start)
  assert (found.kept_share == 1).all() and (found.same_experts == 1).all()
  for key in ('load_shift', 'divergence', 'experts_moved', 'router_moved'):
    assert not getattr(found, key).any(), key
  assert np.allclose(found.load_before.sum(axis=1), 1)
  assert np.array_equal(found.max_vio_before, found.max_vio_after)


def test_experts_that_traded_places(start):
  """The router's columns reversed: every token goes to the mirror images of its experts."""

  def mirror(moe):
    return {**moe, 'router': moe['router'][..., ::-1]}

  tuned = subjects.with_weights(start, mirror)
  found = drift(start, tuned)
  # Of the first MoE layer alone: what the next one sees has changed.
  before, after = (
    one.of_tokens(one.expert_idx)[0] for one in (observations.collect(m, 0) for m in (start, tuned))
  )
  assert np.array_equal(np.sort(found.load_before.shape[1] - 1 - before), np.sort(after))
  assert np.allclose(found.load_after[0], found.load_before[0][::-1])
  by_hand = np.abs(found.load_before[0] - found.load_before[0][::-1]).sum() / 2
  assert found.load_shift[0] == pytest.approx(by_hand)
  kept = [len(set(one) & set(other)) / len(one) for one, other in zip(before, after)]
  assert found.kept_share[0] == pytest.approx(np.mean(kept)) != 1
  assert found.same_experts[0] == pytest.approx(np.mean(np.array(kept) == 1))
  assert not found.experts_moved.any() and (found.router_moved > 0.5).all()


def test_divergence_is_that_of_the_scores(start):
  rng = np.random.default_rng(0)

  def shifted(moe):
    noise = rng.normal(size=moe['router'].shape).astype(np.float32)
    return {**moe, 'router': moe['router'] + 0.5 * noise}

  tuned = subjects.with_weights(start, shifted)
  seen = [observations.collect(one, 0) for one in (start, tuned)]
  p, q = (one.scores[0][one.mask].astype(np.float64) for one in seen)
  p, q = (one / one.sum(-1, keepdims=True) for one in (p, q))
  by_hand = (p * np.log(p / q)).sum(-1).mean()
  assert drift(start, tuned).divergence[0] == pytest.approx(by_hand, rel=1e-6)
  assert by_hand > 1e-3
  sets = [[set(token) for token in one.of_tokens(one.expert_idx)[0]] for one in seen]
  same = np.mean([a == b for a, b in zip(*sets)])
  assert 0 < same < 1 and drift(start, tuned).same_experts[0] == pytest.approx(same)


@pytest.mark.parametrize('matrix', ['gate_up', 'down'])
def test_the_expert_that_moved_is_found(start, matrix):
  def louder(moe):
    weights = np.array(moe[matrix])
    weights[1, 5] *= 1.5
    return {**moe, matrix: weights}

  found = drift(start, subjects.with_weights(start, louder))
  still = np.ones_like(found.experts_moved, bool)
  still[1, 5] = False
  assert not found.experts_moved[still].any()
  moe = start.variables['params']['moe_layers']['moe']
  squares = {k: (np.asarray(moe[k][1, 5], np.float64) ** 2).sum() for k in ('gate_up', 'down')}
  by_hand = 0.5 * np.sqrt(squares[matrix] / sum(squares.values()))
  assert found.experts_moved[1, 5] == pytest.approx(by_hand, rel=1e-5)
  assert 'expert 5' in drift_text.layers(found, 1, 7)


def test_other_rows_are_no_drift(start):
  seen = observations.collect(start, 0)
  other = seen._replace(tokens=seen.tokens + 1)
  with pytest.raises(ValueError, match='same rows'):
    routing_drift.between(seen, other, start.variables['params'], start.variables['params'])


@pytest.mark.parametrize('field, value', [('num_experts', 16), ('moe_mlp_dim', 32)])
def test_other_experts_are_refused(start, field, value):
  other = subjects.subject_of(**{f'model__moe__{field}': value}).cfg.model
  words = rf'config\.model\.moe\.{field} is .* at the start and {value} in the tuned run.*--start'
  with pytest.raises(errors.InputError, match=words):
    routing_drift.check(start.cfg.model, other)


def test_text_and_picture(start, tmp_path):
  found = {10: drift(start, start), 20: drift(start, start)}
  lines = drift_text.table(found).splitlines()
  assert len(lines) == 3 and re.search(r'^ *20 +100.0% +100.0% +0.0%', lines[2])
  assert drift_text.arrays(found)['kept_share'].shape == (2, start.cfg.model.num_moe_layers)
  assert list(drift_text.record(found)) == ['10', '20']
  drift_text.draw(found, 1, tmp_path / 'drift.png')
  assert (tmp_path / 'drift.png').stat().st_size > 5000
