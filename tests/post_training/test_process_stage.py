"""Judges of steps: what they are trained on, that they learn it, and that they go on bit by bit."""

import json

import jax
import numpy as np
import pytest

import moe_jax
from moe_jax import errors
from moe_jax.post_training import process_stage, step_labels
from moe_jax.runs import trained_run
from tests import tiny
from tests.post_training.conftest import SIZES
from tests.post_training.test_step_scores import CHANGES, marker


def solutions(n=60):
  """Steps that end in 1 are good, and those that end in 0 are not."""
  rng = np.random.default_rng(0)
  found = []
  for i in range(n):
    good = rng.random(3) < 0.6
    text = '\n'.join(f'step {int(one)}' for one in good)
    ends = step_labels.ends_of_steps(text)
    outcomes = tuple((bool(one), False) for one in good[:2]) + ((bool(good[2]),),)
    found.append(
      step_labels.Labelled(f'What is {i}?', '1', text, ends, outcomes, tuple(map(bool, good)))
    )
  return found


@pytest.fixture
def labels(tmp_path):
  path = tmp_path / 'labels.jsonl'
  step_labels.write(path, solutions())
  return path


def stage(labels, **changes):
  given = {'objective__process_reward__labels': str(labels), 'data__heldout_fraction': 0.2}
  return process_stage.ProcessStage(tiny.make(**(CHANGES | given | changes)))


def test_labels_are_hard_soft_or_of_the_whole(labels):
  one = solutions()[0]._replace(outcomes=((True, False), (False, False), (True,)))
  own, rng = marker(), np.random.default_rng(0)
  found = stage(labels)._labels(own, one, rng)
  assert found.tolist() == [own.good_id, own.bad_id, own.good_id]
  soft = stage(labels, objective__process_reward__target='soft')
  draws = np.array([soft._labels(own, one, rng) for _ in range(400)]) == own.good_id
  np.testing.assert_allclose(draws.mean(0), [0.5, 0, 1], atol=0.1)
  whole = stage(labels, objective__process_reward__outcome=True)
  assert whole._labels(own, one, rng).tolist() == [own.good_id]


def test_a_batch_is_a_function_of_its_place(labels):
  own, here = marker(), stage(labels, train__batch_size=2)
  marked = own.marked([process_stage.solution(one) for one in here._train])
  first = here._batch(own, marked, 1, 1)
  for key, value in here._batch(own, marked, 1, 1).items():
    np.testing.assert_array_equal(first[key], value)
  assert (first['tokens'] != here._batch(own, marked, 1, 0)['tokens']).any()
  assert (first['tokens'] != here._batch(own, marked, 2, 1)['tokens']).any()


def test_a_file_that_holds_nothing_out_is_refused(labels):
  with pytest.raises(errors.InputError, match='heldout_fraction=1e-06 holds 0 of 60'):
    stage(labels, data__heldout_fraction=1e-6)


@pytest.mark.slow
def test_a_judge_learns_and_goes_on_bit_by_bit(base, labels, tmp_path):
  def tune(workdir, **changes):
    given = SIZES | {
      'init_from': str(base.directory),
      'data.cache_dir': str(tmp_path / 'cache'),
      'data.path': '?max_value=9&operations=1&problems=300',
      'data.heldout_fraction': 0.2,
      'objective.process_reward.labels': str(labels),
      'objective.process_reward.step_token': base.tokenizer.special_tokens[-1],
      'train.num_steps': 40,
      'optim.warmup_steps': 0,
      'optim.peak_lr': 2e-2,
      'checkpoint.save_every': 20,
    }
    return moe_jax.train('process_reward', workdir, report=False, say=print, **given | changes)

  whole = tune(tmp_path / 'whole')
  result = json.loads((whole.directory / process_stage.RESULT_FILE).read_text())
  assert result['auc'] > 0.9 and result['auc_of_truth'] > 0.9 and result['steps'] >= 15
  run = trained_run.load(whole.directory)
  assert process_stage.quality(run, solutions()[:20])['auc'] > 0.9
  (tmp_path / 'whole' / 'checkpoints' / '40').rename(tmp_path / 'lost')
  before = [json.loads(line)['loss'] for line in (whole.directory / 'metrics.jsonl').open()]
  resumed = tune(tmp_path / 'whole')
  after = [json.loads(line)['loss'] for line in (resumed.directory / 'metrics.jsonl').open()]
  assert before == after
  for a, b in zip(jax.tree.leaves(whole.variables), jax.tree.leaves(resumed.variables)):
    np.testing.assert_array_equal(a, b)
