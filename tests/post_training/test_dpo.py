"""A run of preferences: what it logs, and that it goes on bit by bit, its reference lost too."""

import json

import jax
import numpy as np
import pytest

import moe_jax
from moe_jax.runs import metric_log, reference_scores
from tests.post_training.conftest import SIZES


def tune(base, workdir, **changes):
  pairs = workdir.parent / 'pairs.jsonl'
  if not pairs.exists():
    rows = [
      {'prompt': f'Say {i} twice.', 'chosen': f'{i} {i}', 'rejected': 'no'} for i in range(300)
    ]
    pairs.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  given = SIZES | {
    'init_from': str(base.directory),
    'data.path': str(pairs),
    'data.cache_dir': str(workdir.parent / 'cache'),
    'train.num_steps': 6,
    'optim.warmup_steps': 0,
    'optim.peak_lr': 0.005,
    'optim.schedule': 'constant',
  }
  return moe_jax.train('dpo', workdir, report=False, say=print, **given | changes)


def lines(run):
  return [json.loads(line) for line in (run.directory / 'metrics.jsonl').open()]


@pytest.mark.slow
def test_a_run_prefers_and_goes_on_bit_by_bit(base, tmp_path):
  whole = tune(base, tmp_path / 'whole')
  logged = lines(whole)
  assert list(logged[0]) == [*metric_log.KEYS, *metric_log.PREFERENCE_KEYS]
  # Before the first update the model is its reference.
  np.testing.assert_allclose(logged[0]['loss'], np.log(2), atol=1e-5)
  assert abs(logged[0]['reward_margin']) < 1e-5 < abs(logged[1]['reward_margin'])
  assert logged[-1]['loss'] < 0.5 and logged[-1]['preference_accuracy'] == 1
  assert logged[-1]['chosen_tokens'] > 2
  assert logged[-1]['chosen_reward'] > 0.2 + logged[-1]['rejected_reward']
  before, after = (jax.tree.leaves(r.variables['router_state']) for r in (base, whole))
  for a, b in zip(before, after, strict=True):
    np.testing.assert_array_equal(a, b)

  interrupted = tmp_path / 'interrupted'
  tune(base, interrupted)
  for step in ('4', '6'):
    (interrupted / 'checkpoints' / step).rename(tmp_path / f'lost{step}')
  kept = (interrupted / reference_scores.FILE).read_bytes()
  (interrupted / reference_scores.FILE).unlink()
  resumed = tune(base, interrupted)
  assert (interrupted / reference_scores.FILE).read_bytes() == kept
  for a, b in zip(jax.tree.leaves(whole.variables), jax.tree.leaves(resumed.variables)):
    np.testing.assert_array_equal(a, b)
  assert [line['loss'] for line in logged] == [line['loss'] for line in lines(resumed)]

  # Read again from its directory it is measured against the same reference.
  figures = moe_jax.load(whole.directory).evaluate(progress=False)
  assert figures.preference['preference_accuracy'] > 0.9
  assert figures.as_dict(6)['preference']['preference_loss'] < 0.5
  assert 'preference_accuracy=' in str(figures)

  (whole.directory / reference_scores.FILE).unlink()
  said, loaded = [], moe_jax.load(whole.directory)
  corpus = loaded.heldout_corpus(said.append)
  assert 'has no reference.npz of these pairs' in said[-1]
  assert loaded.evaluate(corpus, progress=False).preference is None


@pytest.mark.slow
def test_pairs_of_low_rank_alone_learn_a_preference(base, tmp_path):
  """The reference is the frozen model that the pairs are added to."""
  tuned = tune(base, tmp_path / 'lora', **{'trainable.kind': 'lora', 'optim.peak_lr': 0.02})
  logged = lines(tuned)
  np.testing.assert_allclose(logged[0]['loss'], np.log(2), atol=1e-5)
  assert logged[-1]['loss'] < 0.6 and logged[-1]['preference_accuracy'] == 1
