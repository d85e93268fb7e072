"""What the tests of analysis share."""

import jax
import numpy as np

from moe_jax.analysis import interventions
from moe_jax.data import corpus as corpus_lib
from moe_jax.data import tokenizer as tokenizer_lib
from tests import tiny


def split_of(rows, documents=6, seed=0):
  rng = np.random.default_rng(seed)
  lengths = rng.integers(6, 30, size=documents)
  tokens = rng.integers(rows, size=lengths.sum()).astype(np.uint16)
  offsets = np.concatenate([[0], np.cumsum(lengths)])
  domain = (np.arange(documents) % 2).astype(np.int32)
  return corpus_lib.TokenSplit(tokens, offsets, lengths.astype(np.int64), domain)


def subject_of(**overrides):
  cfg = tiny.make(**overrides)
  split = split_of(cfg.model.vocab_size)
  tokenizer = tokenizer_lib.byte_tokenizer('<b>', '<e>')
  corpus = corpus_lib.Corpus(tokenizer, (split,), (1.0,), split, ('even', 'odd'), '', ())
  variables = {'params': tiny.params(cfg.model), 'router_state': tiny.router_state(cfg.model)}
  return interventions.Subject(cfg, variables, corpus, tiny.mesh(1))


def with_weights(subject, change):
  """The model with other weights of its MoE layers."""
  params = jax.tree.map(np.asarray, subject.variables['params'])
  params['moe_layers']['moe'] = change(dict(params['moe_layers']['moe']))
  return subject._replace(variables={**subject.variables, 'params': params})


def bits(subject, **kwargs):
  return interventions.measure(subject, **kwargs).bits_per_byte
