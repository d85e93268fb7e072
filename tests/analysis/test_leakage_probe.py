"""Causal routers tell the past nothing, exactly; expert choice does."""

import jax
import numpy as np
import pytest

from configs import smoke
from moe_jax import errors
from moe_jax.analysis import leakage, leakage_probe
from moe_jax.config import parse
from moe_jax.data import packing
from moe_jax.devices import partitioning
from moe_jax.runs import checks, trained_run
from moe_jax.training import train_state

MAKE_MESH = partitioning.make_mesh
SIZES = {
  'model.max_seq_len': 32,
  'model.num_layers': 2,
  'model.num_dense_layers': 0,
  'model.moe.num_experts_per_tok': 2,
  'data.synthetic_documents': 80,
  'data.heldout_fraction': 0.1,
  'train.batch_size': 32,
}
EXPERT_CHOICE = {'model.moe.router': 'expert_choice', 'model.moe.dispatch': 'dense'}


@pytest.fixture(scope='module', autouse=True)
def cheap():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(partitioning, 'make_mesh', lambda cfg: MAKE_MESH(cfg, jax.devices()[:1]))
    jax.config.update('jax_disable_most_optimizations', True)
    yield
    jax.config.update('jax_disable_most_optimizations', False)


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp('cache')


def fresh(cache, **overrides):
  """(an untrained run, its corpus)."""
  page = smoke.get_config()
  page.update_from_flattened_dict(SIZES | {'data.cache_dir': str(cache), 'train.sample_prompt': ''})
  page.update_from_flattened_dict(overrides)
  cfg = parse.from_dict(page.to_dict())
  mesh, corpus = checks.prepare(cfg)
  variables = train_state.init_state(cfg, mesh).variables
  return trained_run.Run(cfg, mesh, variables, corpus.tokenizer, 0, corpus.fingerprint), corpus


def test_topk_is_causal(cache):
  loaded, corpus = fresh(cache)
  assert loaded.cfg.model.moe.dispatch == 'dropless'  # the second halves move the rows of the first
  found = leakage_probe.probe(loaded, corpus)
  rows = packing.num_rows(corpus.heldout, 32) - 1  # the last one is not whole
  assert rows > 32 and rows % 32  # several batches, the last of which is filled up
  assert found.num_tokens == rows * 16
  assert found.changed.tolist() == [0.0, 0.0]
  assert found.log_likelihood_change == 0.0
  assert leakage_probe.theory(loaded.cfg.model) is None


def test_expert_choice_is_not(cache):
  loaded, corpus = fresh(cache, **EXPERT_CHOICE)
  found = leakage_probe.probe(loaded, corpus)
  assert (found.changed > 0.05).all() and (found.changed < 1).all()
  assert found.log_likelihood_change > 1e-5
  losses = leakage_probe.heldout_losses(loaded, corpus)
  assert list(losses) == ['as_trained', 'shuffled']
  assert losses['as_trained'] != losses['shuffled']


def test_theory_counts_the_tokens_that_compete(cache):
  page = smoke.get_config()
  page.update_from_flattened_dict(SIZES | EXPERT_CHOICE)
  model = parse.from_dict(page.to_dict()).model
  found = leakage_probe.theory(model)
  assert found['bits_per_token_per_layer'] == leakage.bits_per_token(8, 2, 32)
  assert found['bits_per_token'] == 2 * leakage.bits_per_token(8, 2, 32)
  assert found['lower_bound'] == leakage.lower_bound(8, 2) < found['bits_per_token_per_layer']
  page.model.moe.options.chunk_tokens = 16
  found = leakage_probe.theory(parse.from_dict(page.to_dict()).model)
  assert found['bits_per_token_per_layer'] == leakage.bits_per_token(8, 2, 16)


def test_a_spliced_row_begins_a_new_document_in_its_middle():
  row = {key: np.arange(1, 5) for key in packing.KEYS}
  other = {key: np.arange(11, 15) for key in packing.KEYS}
  row['segment_ids'], other['segment_ids'] = np.array([1, 2, 2, 3]), np.array([1, 1, 1, 2])
  found = leakage_probe.splice(row, other)
  assert found['tokens'].tolist() == [1, 2, 13, 14]
  assert found['positions'].tolist() == [1, 2, 13, 14]
  assert found['segment_ids'].tolist() == [1, 2, 4, 5]


def test_too_little_text_and_dense_models_are_refused(cache):
  loaded, corpus = fresh(cache, **{'model.max_seq_len': 1024, 'train.batch_size': 2})
  with pytest.raises(errors.InputError, match=r'makes \d whole rows of .*=1024.*heldout_fraction'):
    leakage_probe.probe(loaded, corpus)
