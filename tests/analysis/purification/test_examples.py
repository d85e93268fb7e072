"""Rows of examples as the pipeline makes them, and the answers of a model."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import errors
from moe_jax.analysis.purification import attacks, examples
from moe_jax.data import tokenizer as tokenizer_lib
from moe_jax.models import transformer
from tests import tiny

TOKENIZER = tokenizer_lib.byte_tokenizer('<b>', '<e>')
FOUND = (attacks.Example('x = 1', 'code'), attacks.Example('All that is.', 'prose'))


def config(**more):
  settings = {'model__vocab_size': 272, 'model__max_seq_len': 24, 'data__chat_format': 'marks'}
  return tiny.make(**(settings | more))


def test_only_the_answer_is_a_target():
  batch = examples.rows(config(), FOUND, TOKENIZER)
  assert {key: a.shape for key, a in batch.items()} == dict.fromkeys(batch, (2, 24))
  for row, one in enumerate(FOUND):
    learned = batch['targets'][row] >= 0
    assert TOKENIZER.decode(batch['targets'][row][learned].tolist()) == one.label
    real = batch['segment_ids'][row] == 1
    assert real.sum() == 1 + 1 + len(one.text) + 1 + len(one.label)  # begin, >, text, =, answer
    at = np.flatnonzero(learned)
    np.testing.assert_array_equal(batch['tokens'][row][at[1:]], batch['targets'][row][at[:-1]])


def test_answers_are_the_likeliest_first_token():
  cfg = config()
  firsts = examples.first_tokens(cfg, TOKENIZER)
  assert [TOKENIZER.decode([one]) for one in firsts] == ['c', 'p']
  variables = {'params': tiny.params(cfg.model), 'router_state': tiny.router_state(cfg.model)}
  batch = examples.rows(cfg, FOUND * 3, TOKENIZER)
  found = examples.answers(cfg.model, variables, batch, firsts)
  inputs = (jnp.asarray(batch[key]) for key in examples.INPUTS)
  logits = np.asarray(transformer.apply(cfg.model, variables, *inputs).logits)
  at = [int(np.flatnonzero(row >= 0)[0]) for row in batch['targets']]
  expected = [logits[i, place, firsts].argmax() for i, place in enumerate(at)]
  np.testing.assert_array_equal(found, expected)


def test_labels_that_begin_alike_are_refused():
  data = dataclasses.replace(config().data, chat_format='deepseek_llm')  # a space opens an answer
  cfg = dataclasses.replace(config(model__max_seq_len=40), data=data)
  with pytest.raises(errors.InputError, match='chat_format'):
    examples.first_tokens(cfg, TOKENIZER)


def test_bad_input():
  with pytest.raises(errors.InputError, match='no clean examples'):
    examples.rows(config(), (), TOKENIZER)
  with pytest.raises(errors.InputError, match='max_seq_len=24'):
    examples.rows(config(), [attacks.Example('x' * 40, 'code')], TOKENIZER)
