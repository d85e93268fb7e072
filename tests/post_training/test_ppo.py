"""Runs of PPO: what they log, that they go on bit by bit, and that what they leave can be used."""

import concurrent.futures
import shutil
import signal

import numpy as np
import pytest

import moe_jax
from experiments import answers, convert, evaluate, generate
from moe_jax.post_training import value_targets
from moe_jax.rewards import pool, reward
from moe_jax.runs import metric_log
from tests import in_process
from tests.post_training.test_policy_stage import SETTINGS, lines, same_weights

pytestmark = pytest.mark.slow
SHORT = {
  'objective.policy.ppo.value_warmup': 1,
  'objective.policy.truncated': 'keep',
  'model.moe.expert_bias.update_rule': 'none',  # a model that a family of published ones can run
}


def tune(base, workdir, say=print, **changes):
  given = SETTINGS | SHORT | {'init_from': str(base.directory)}
  given['data.cache_dir'] = str(workdir.parent / 'cache')
  return moe_jax.train('ppo', workdir, report=False, say=say, **given | changes)


@pytest.fixture(scope='module')
def whole(base, tmp_path_factory):
  """A run of three iterations, the head alone in the first of them."""
  return tune(base, tmp_path_factory.mktemp('ppo') / 'whole')


def test_a_run_is_logged_and_goes_on_bit_by_bit(base, whole, tmp_path):
  logged = lines(whole)
  keys = [*metric_log.KEYS, *metric_log.POLICY_KEYS, *metric_log.PPO_KEYS]
  assert list(logged[0]) == keys
  # The first iteration expects nothing: its values explain nothing, and the first step moves none.
  assert logged[0]['explained_variance'] == pytest.approx(0, abs=1e-6)
  assert logged[0]['value_clip_share'] == 0 and logged[0]['value_loss'] > 0
  assert logged[0]['advantage_mean'] == pytest.approx(logged[0]['return_mean'], abs=1e-6)
  # Head alone in two steps, so the policy of the second iteration is the reference still.
  assert [line['ratio'] for line in logged[:2]] == pytest.approx([1, 1], abs=1e-5)
  assert logged[2]['reference_kl'] == pytest.approx(0, abs=1e-6) and logged[4]['reference_kl'] > 0
  assert logged[5]['value_loss'] < logged[0]['value_loss']

  # A signal in the middle of an iteration: the run ends at its end, is saved, and goes on.
  def interrupting(line):
    if line.startswith('step=2 loss'):  # seen at step 3
      signal.raise_signal(signal.SIGTERM)

  stopped = tune(base, tmp_path / 'stopped', interrupting)
  assert stopped.interrupted_by == 'SIGTERM' and stopped.step == 4
  resumed = tune(base, tmp_path / 'stopped')
  same_weights(whole, resumed)
  for a, b in zip(logged, lines(resumed), strict=True):
    for key in ('loss', 'reward', 'reference_kl', *metric_log.PPO_KEYS):
      assert a[key] == b[key], key

  # One that has lost its last checkpoints, as one that was killed: the head alone has learned.
  for step in ('4', '6'):
    shutil.rmtree(tmp_path / 'stopped' / 'checkpoints' / step)
  same_weights(whole, tune(base, tmp_path / 'stopped'))


def test_whoever_reads_a_checkpoint_sees_the_model_alone(base, whole, tmp_path, capsys):
  place = f'--workdir={whole.directory}'
  loaded = moe_jax.load(whole.directory)
  same_weights(whole, loaded)
  assert set(loaded.variables['params']) == set(base.variables['params'])
  assert np.isfinite(in_process.run_json(capsys, evaluate, place)['loss'])
  said = in_process.run_json(capsys, generate, place, '--prompt=a', '--max_new_tokens=3')
  assert 0 < len(said['tokens']) <= 3
  asked = in_process.run_json(capsys, answers, place, '--n=2', '--max_new_tokens=4')
  assert asked['total'] == 2
  in_process.run(convert, place, f'--to_hf={tmp_path / "files"}')
  in_process.run(convert, f'--from_hf={tmp_path / "files"}', f'--workdir={tmp_path / "back"}')
  same_weights(whole, moe_jax.load(tmp_path / 'back'))


def test_the_next_run_starts_from_it_with_its_head_or_without(whole, tmp_path):
  again = lines(tune(whole, tmp_path / 'again', **{'train.num_steps': 4}))
  assert again[0]['explained_variance'] != 0
  given = SETTINGS | {'init_from': str(whole.directory), 'train.num_steps': 2}
  given['data.cache_dir'] = str(tmp_path / 'cache')
  grpo = moe_jax.train('grpo', tmp_path / 'grpo', report=False, say=print, **given)
  assert list(lines(grpo)[0]) == [*metric_log.KEYS, *metric_log.POLICY_KEYS]


def test_a_reward_is_won(base, tmp_path):
  changes = {'train.num_steps': 16, 'checkpoint.save_every': 16, 'objective.policy.prompts': 16}
  changes |= {'objective.policy.group_size': 1}
  found = lines(tune(base, tmp_path / 'run', **changes))
  assert np.mean([x['reward'] for x in found[-4:]]) > 0.1 + found[0]['reward']


def judged_in_steps(self, items):
  """A reward for the first half of every answer, and another one for the second."""
  halves = [((len(one.text) + 1) // 2, len(one.text)) for one in items]
  found = [concurrent.futures.Future() for _ in halves]
  for future, (a, b) in zip(found, halves):
    steps = [(a, (a % 3) / 3), (b, (b % 2) / 2)] if b > 1 else []
    future.set_result((reward.Reward(0.5, {}, 'wrong', steps), ''))
  return pool.Scored(found)


def test_step_by_step_with_cut_answers_and_neither_micro_batches_nor_replay_change_it(
  base, tmp_path, monkeypatch
):
  monkeypatch.setattr(pool.RewardPool, 'submit', judged_in_steps)
  # These answers have no line that is complete, and would be rewarded for none.
  monkeypatch.setattr(value_targets, 'of_what_came', lambda *given: given[-1])
  changes = {'objective.policy.reward': 'steps', 'objective.policy.supervision': 'process'}
  changes |= {'objective.policy.truncated': 'bootstrap', 'objective.policy.ppo.value_warmup': 0}
  changes |= {'objective.policy.eval_questions': 0, 'objective.policy.updates': 1}
  # eps: Adam is not to blow the last bit of a tiny gradient up to a whole step.
  changes |= {'train.num_steps': 2, 'optim.eps': 1e-2, 'objective.policy.ppo.value_rate': 1e3}
  whole = lines(tune(base, tmp_path / 'whole', **changes))
  # The sampler has not read the last token of a cut answer: its replayed experts are own ones.
  changes |= {'train.micro_batch_size': 1, 'objective.policy.replay': 'none'}
  parts = lines(tune(base, tmp_path / 'parts', **changes))
  assert whole[0]['ended_share'] < 1 and whole[0]['value_loss'] > 0
  for a, b in zip(whole, parts, strict=True):
    for key in ('loss', 'value_loss', 'explained_variance', 'advantage_mean', 'reference_kl'):
      np.testing.assert_allclose(b[key], a[key], rtol=1e-3, atol=1e-6, err_msg=key)
