import dataclasses

import numpy as np
import pytest

from moe_jax import errors
from moe_jax.data import corpus as corpus_lib
from moe_jax.runs import reference_scores
from tests import tiny
from tests.training import test_preference_loss as preferences


@pytest.fixture(scope='module')
def cfg():
  return tiny.make(**preferences.CHANGES, train__batch_size=2)


def corpus_of(*splits) -> corpus_lib.Corpus:
  *train, heldout = splits
  return corpus_lib.Corpus(None, tuple(train), (1.0,), heldout, ('',), 'print', ())


def unknown(lengths, seed=0):
  return dataclasses.replace(preferences.pairs_split(lengths, seed), reference=None)


def test_every_pair_gets_its_own_scores_whatever_row_it_lies_in(cfg):
  """Three batches of two rows, the last one filled up; a pair without room gets 0."""
  params = tiny.params(cfg.model)
  split = unknown((*preferences.PAIRS, (6, 6), (9, 10), (8, 3), (3, 3)))
  variables = {'params': params, 'router_state': {}}
  found = reference_scores.measure(cfg, variables, tiny.mesh(1), split)
  want = preferences.scores_by_hand(cfg, params, split)
  want[6] = 0
  assert found.dtype == np.float32 and (found != 0).any(axis=1).sum() == 8
  np.testing.assert_allclose(found, want, rtol=1e-5)


@pytest.fixture
def kept(cfg, tmp_path, monkeypatch):
  """(a corpus, what was measured of it): scores that tell splits, pairs and answers apart."""
  monkeypatch.setattr(
    reference_scores,
    'measure',
    lambda cfg, variables, mesh, split: (
      variables + np.arange(2 * split.num_documents, dtype=np.float32).reshape(-1, 2)
    ),
  )
  return corpus_of(unknown(preferences.PAIRS), unknown(((2, 3),), 1))


def prepared(cfg, workdir, corpus, weights=-100.0, anew=False, write=True):
  asked = []

  def reference():
    asked.append(weights)
    return weights

  found = reference_scores.prepared(
    cfg, workdir, corpus, tiny.mesh(1), reference, anew=anew, write=write
  )
  return found, bool(asked)


def test_they_are_measured_once_and_kept(cfg, kept, tmp_path):
  first, asked = prepared(cfg, tmp_path, kept, anew=True)
  assert asked and first.train[0].reference[1].tolist() == [-98, -97]
  assert first.heldout.reference.tolist() == [[-100, -99]]
  again, asked = prepared(cfg, tmp_path, kept, weights=-5.0)
  assert not asked and again.train[0].reference[1].tolist() == [-98, -97]
  anew, asked = prepared(cfg, tmp_path, kept, weights=-5.0, anew=True)  # another run's are there
  assert asked and anew.train[0].reference[1].tolist() == [-3, -2]
  _, asked = prepared(cfg, tmp_path / 'elsewhere', kept, write=False)
  assert asked and not (tmp_path / 'elsewhere').exists()


def test_those_of_other_pairs_are_not_taken(cfg, kept, tmp_path):
  prepared(cfg, tmp_path, kept, anew=True)
  other = dataclasses.replace(kept, fingerprint='another')
  assert reference_scores.attached(cfg, tmp_path, kept) is not None
  assert reference_scores.attached(cfg, tmp_path, other) is None
  # Rows of 32 have room for pairs that were not measured.
  model = dataclasses.replace(cfg.model, max_seq_len=32)
  assert reference_scores.attached(dataclasses.replace(cfg, model=model), tmp_path, kept) is None


def test_a_run_without_preferences_has_none(kept, tmp_path):
  found, asked = prepared(tiny.make(), tmp_path, kept)
  assert found is kept and not asked and not list(tmp_path.iterdir())


@pytest.mark.parametrize('damage', ['cut', 'shape', 'nan'])
def test_a_damaged_file_is_one_error(cfg, kept, tmp_path, damage):
  prepared(cfg, tmp_path, kept, anew=True)
  path = tmp_path / reference_scores.FILE
  if damage == 'cut':
    path.write_bytes(path.read_bytes()[:-40])
  else:
    with np.load(path) as file:
      arrays = dict(file)
    arrays['split0'] = arrays['split0'][1:] if damage == 'shape' else arrays['split0'] * np.nan
    np.savez(path, **arrays)
  with pytest.raises(errors.InputError, match='reference.npz must hold .* remove it'):
    prepared(cfg, tmp_path, kept)


def test_weights_that_are_not_whole_are_refused_before_anything_is_written(cfg, kept, tmp_path):
  with pytest.raises(errors.InputError, match='config.init_from=elsewhere gives a log-prob'):
    prepared(cfg, tmp_path, kept, weights=np.float32('nan'), anew=True)
  assert not list(tmp_path.iterdir())
