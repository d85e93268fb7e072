import json
import pathlib

import numpy as np
import pytest

from moe_jax import errors
from moe_jax.post_training import expert_config, expert_selection

# Of results/ of deepseek-ai/ESFT (DeepSeek-V2-Lite, layers 1 to 26, 64 routed experts): token
# scores times 10^4, and the experts of the released configs in their order, -1 behind the last one.
RELEASED = np.load(pathlib.Path(__file__).with_name('esft_released.npz'))


@pytest.mark.parametrize('task', ['intent', 'law', 'summary', 'translation'])
def test_released_configs_come_out_of_released_scores(task):
  found = expert_selection.select(RELEASED[f'{task}_token'] / 1e4, 1, 0.2)
  want = {i: [e for e in row if e >= 0] for i, row in enumerate(RELEASED[f'{task}_experts'], 1)}
  assert found == expert_config.ExpertConfig(want, False, False)


@pytest.mark.parametrize(
  'task, mean, fewest, most',
  [
    ('intent', 4.77, 4, 6),
    ('summary', 4.92, 2, 8),
    ('law', 5.88, 3, 9),
    ('translation', 3.19, 2, 4),
  ],
)
def test_experts_per_layer_are_those_of_the_releases(task, mean, fewest, most):
  total, *ends = expert_config.count(
    expert_selection.select(RELEASED[f'{task}_token'] / 1e4, 1, 0.2)
  )
  assert total / 26 == pytest.approx(mean, abs=0.005) and ends == [fewest, most]


def test_the_fewest_that_reach_p():
  scores = np.array([[0.1, 0.5, 0.0, 0.4], [0.25, 0.25, 0.25, 0.25]])

  def chosen(share):
    return expert_selection.select(scores, 3, share).experts

  assert chosen(0.5) == {3: [1], 4: [0, 1]}  # reached exactly: no further one
  assert chosen(0.51) == {3: [1, 3], 4: [0, 1, 2]}
  assert chosen(1e-9) == {3: [1], 4: [0]}  # one at least
  assert chosen(1.0) == {3: [1, 3, 0], 4: [0, 1, 2, 3]}  # none that no token visits
  sizes = [
    expert_config.count(expert_selection.select(scores, 0, p))[0] for p in (0.1, 0.4, 0.7, 1)
  ]
  assert sizes == sorted(sizes)
  for share in (0, 1.5, float('nan')):
    with pytest.raises(errors.InputError, match='--p=.* must lie in'):
      chosen(share)


def test_scores_and_back(tmp_path):
  token = np.array([[0.12344, 0.87656], [0.5, 0.5]])
  scores = expert_selection.ExpertScores(token, token / 2, 7, 1)
  expert_selection.write_scores(tmp_path / 'summary.json', scores)
  found, first = expert_selection.read_scores(tmp_path / 'summary.json', 'token')
  assert first == 1 and found.tolist() == [[0.1234, 0.8766], [0.5, 0.5]]
  assert expert_selection.read_scores(tmp_path / 'summary.json', 'gate')[0][1, 0] == 0.25


@pytest.mark.parametrize(
  'content, words',
  [
    ({}, 'it has no "token_scores"'),
    ({'token_scores': {'1': {'0': 0.5}, '3': {'0': 0.5}}}, 'not all there'),
    ({'token_scores': {'1': {'0': -0.5}}}, 'negative'),
    ({'token_scores': {'1': {'1': 0.5}}}, "'0'"),
    ({'token_scores': {}}, 'not all there'),
  ],
)
def test_what_is_no_table_of_scores_is_refused(tmp_path, content, words):
  path = tmp_path / 'summary.json'
  path.write_text(json.dumps(content))
  with pytest.raises(errors.InputError, match=f'must be a table of scores .*{words}'):
    expert_selection.read_scores(path, 'token')
