"""Curves of groups: common steps, tokens, seconds, differences, loads."""

import json

import numpy as np
import pytest

from moe_jax.analysis.comparison import curves, groups, workdirs
from moe_jax.planning import flops
from tests.analysis.comparison import written


def grouped(paths):
  return groups.group([workdirs.read(path) for path in paths])


def test_steps_that_all_seeds_have(tmp_path):
  paths = [written.run(tmp_path / str(seed), seed=seed, steps=22 - 6 * seed) for seed in (0, 1)]
  (group,) = grouped(paths)
  found = curves.series(group)
  np.testing.assert_array_equal(found.steps, np.arange(2, 17, 2))
  np.testing.assert_array_equal(found.tokens, found.steps * 8 * 16)
  np.testing.assert_allclose(
    found.flops, found.tokens * flops.train_flops_per_token(group.cfg.model)
  )
  np.testing.assert_allclose(found.seconds, found.tokens / 64)  # 64 tokens per second
  np.testing.assert_allclose(found.values['loss'][1], 1.1 + 2 / found.steps)


def test_seconds_go_on_over_a_line_without_a_rate(tmp_path):
  path = written.run(tmp_path / 'a')
  lines = [json.loads(line) for line in (path / 'metrics.jsonl').read_text().splitlines()]
  lines[0]['tokens_per_second'] = None
  lines[1]['loss'] = None
  (path / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  found = curves.series(grouped([path])[0])
  np.testing.assert_allclose(found.seconds, found.tokens / 64)
  assert np.isnan(found.values['loss'][0, 1]) and not np.isnan(found.values['loss'][0, 2])


def test_thinned_curves_are_means(tmp_path):
  found = curves.series(grouped([written.run(tmp_path / 'a')])[0])
  thin = curves.thinned(found, 3)
  np.testing.assert_allclose(thin.steps, [5, 13, 21])  # of 2 4 6 8, and so on
  np.testing.assert_allclose(
    thin.values['loss'][0], found.values['loss'][0].reshape(3, 4).mean(axis=1)
  )
  assert curves.thinned(found, 12) is found


@pytest.mark.parametrize('steps, words', [(6, 'at step 6'), (0, 'without a logged step')])
def test_a_run_behind_the_others_does_not_cut_their_curves(tmp_path, steps, words):
  paths = [written.run(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
  paths.append(written.run(tmp_path / '2', seed=2, steps=steps, held_out=False, routing=False))
  (group,) = grouped(paths)
  found = curves.series(group)
  assert found.seeds == [0, 1] and found.steps[-1] == 24 and len(found.values['loss']) == 2
  assert curves.left_out(group) == f'seed 2 {words}'
  balance, load = curves.routing(group)
  assert balance.steps == [8, 16, 24] and load.seed == 0
  (alone,) = grouped(paths[2:])
  assert (curves.series(alone) is None) == (steps == 0) and curves.routing(alone) is None


def test_seeds_that_two_groups_have_finished(tmp_path):
  paths = written.two_groups(tmp_path, 2)
  assert curves.seeds(*grouped(paths)) == [0, 1] and curves.left_out(grouped(paths)[0]) == ''
  paths.append(written.run(tmp_path / 'plain2', seed=2))  # finished in one of the groups only
  paths.append(written.run(tmp_path / 'bias2', seed=2, steps=6, **written.BIAS))
  paths.append(written.run(tmp_path / 'plain3', seed=3))  # in one of them at all
  assert curves.seeds(*grouped(paths)) == [0, 1]
  half = [written.run(tmp_path / f'half{i}', seed=i, steps=8 * i) for i in (0, 1, 2)]
  assert curves.seeds(*grouped(half)) == [1, 2]  # none is finished


def test_difference_is_paired(tmp_path):
  first, second = grouped(written.two_groups(tmp_path))
  found = curves.difference(second, first, [0, 2])
  np.testing.assert_allclose(found.differences[0], -0.2)
  np.testing.assert_allclose(found.differences[1], -0.198)  # the seeds' own 0.2 is not seen
  assert curves.difference(second, first, []) is None


def test_loads_and_balance(tmp_path):
  (group,) = grouped([written.run(tmp_path / str(seed), seed=seed) for seed in (0, 1)])
  balance, load = curves.routing(group)
  assert balance.steps == [8, 16, 24] and balance.first_layer == 1
  np.testing.assert_allclose(balance.max_vio, [[0.5] * 3, [0.0] * 3])
  assert load.seed == 0 and load.steps == [8, 16, 24]
  np.testing.assert_allclose(load.relative[-1][0], [1.5, 1, 1, 1, 1, 1, 1, 0.5])


@pytest.mark.parametrize('num, most, want', [(3, 5, [0, 1, 2]), (9, 3, [0, 4, 8]), (1, 5, [0])])
def test_the_first_and_the_last_are_kept(num, most, want):
  assert curves._spread(num, most) == want


def test_a_run_without_loads_has_none(tmp_path):
  (group,) = grouped([written.run(tmp_path / 'a', routing=False)])
  assert curves.routing(group) is None
