"""Two processes that write, judge and learn from answers together, beside one."""

import json

import numpy as np
import pytest

from tests.processes import launch

pytestmark = pytest.mark.slow

SETTINGS = {
  'data.path': '?max_value=9&operations=1&problems=300',
  'objective.policy.prompts': 4,
  'objective.policy.group_size': 4,
  'objective.policy.max_new_tokens': 6,
  'objective.policy.reward': "format(pattern='.*[a-z].*')",
  'objective.policy.eval_questions': 2,
  'objective.policy.kl_weight': 0.04,
  'optim.schedule': 'constant',
  'train.batch_size': 4,
  'train.micro_batch_size': 0,
  'train.num_steps': 2,
  'train.eval_every': 0,
  'train.log_every': 1,
  'checkpoint.save_every': 2,
  'optim.warmup_steps': 0,
  'optim.peak_lr': 5e-3,
}
FIGURES = ('loss', 'reward', 'entropy', 'answer_tokens', 'sampler_max_vio', 'reference_kl')
# The head alone in the first iteration; answers that are cut go on with the value of their last
# state, which a process has of its own rows only until all are gathered.
PPO = {
  'objective.policy.updates': 2,
  'objective.policy.ppo.value_warmup': 1,
  'objective.policy.truncated': 'bootstrap',
  'train.num_steps': 4,
}
PPO_FIGURES = ('value_loss', 'explained_variance', 'advantage_mean', 'return_mean')


def lines(workdir, figures):
  found = [json.loads(line) for line in (workdir / 'metrics.jsonl').open()]
  return np.array([[line[key] for key in figures] for line in found])


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  """(a run to start from, a cache)."""
  place = tmp_path_factory.mktemp('start')
  base, cache = place / 'base', place / 'cache'
  sizes = {'data.cache_dir': str(cache), 'data.synthetic_documents': 60, 'train.num_steps': 2}
  sizes |= {'model.max_seq_len': 64, 'checkpoint.save_every': 2}
  launch.run(base, cache, 1, 1, settings=sizes)
  return base, cache


@pytest.mark.parametrize(
  'page, more, figures',
  [
    ('grpo', {}, FIGURES),
    pytest.param('ppo', PPO, FIGURES + PPO_FIGURES, marks=pytest.mark.long),
  ],
)
def test_two_processes_learn_from_rewards_as_one(base, tmp_path, page, more, figures):
  start, cache = base
  given = SETTINGS | more | {'init_from': str(start), 'data.cache_dir': str(cache)}
  options = {'settings': given, 'module': 'experiments.rl', 'page': f'configs/{page}.py'}
  launch.run(tmp_path / 'one', cache, 1, 2, **options)
  said = launch.run(tmp_path / 'two', cache, 2, 1, **options)
  want, got = (lines(tmp_path / name, figures) for name in ('one', 'two'))
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
  assert want[:, 1].max() > 0  # some answers are worth something
  assert len(want) == given['train.num_steps']
  assert 'held-out questions' in said[0] and 'held-out questions' not in said[1]
