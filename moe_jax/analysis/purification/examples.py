"""Labelled texts as rows of a model, one to a row, and what a model answers to them.

N examples, L places; other letters are those of `moe_jax.models`.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import errors, trees
from moe_jax.analysis.purification import attacks
from moe_jax.config import schema
from moe_jax.data import chat_formats, conversations
from moe_jax.data import tokenizer as tokenizer_lib
from moe_jax.models import transformer

INPUTS = ('tokens', 'positions', 'segment_ids')


def rows(
  cfg: schema.Config,
  found: Sequence[attacks.Example],
  tokenizer: tokenizer_lib.Tokenizer,
) -> dict[str, np.ndarray]:
  """tokens, targets, positions and segment_ids, [N, L] int32 each; targets -1 but in the answer.

  Args:
    cfg: of the run: length of a row, and the format of conversations.
    found: the examples.
    tokenizer: the run's.

  Raises:
    errors.InputError: there is no example, or one does not fit a row.
  """
  errors.require(len(found) > 0, '--defender=0: there are no clean examples; give at least one')
  length = cfg.model.max_seq_len
  batch = {key: np.zeros((len(found), length), np.int32) for key in (*INPUTS, 'targets')}
  batch['targets'] -= 1
  batch['positions'] += np.arange(length, dtype=np.int32)
  turns = [conversations.from_row({'prompt': one.text, 'completion': one.label}) for one in found]
  for i, one in enumerate(chat_formats.render(cfg.data, turns, tokenizer)):
    ids, learned = one.ids.astype(np.int32), one.learned
    errors.require(
      len(ids) - 1 <= length,
      f'an example has {len(ids)} tokens and config.model.max_seq_len={length} holds {length + 1}; '
      'use shorter texts or longer rows',
    )
    to = slice(0, len(ids) - 1)
    batch['tokens'][i, to], batch['segment_ids'][i, to] = ids[:-1], 1
    batch['targets'][i, to] = np.where(learned[1:], ids[1:], -1)
  return batch


@functools.partial(jax.jit, static_argnums=0)
def _logits(model: schema.ModelConfig, variables: trees.Variables, batch: trees.Batch, at):
  out = transformer.apply(model, variables, *(batch[key] for key in INPUTS))
  return jnp.take_along_axis(out.logits, at[:, None, None], axis=1)[:, 0]


def answers(
  model: schema.ModelConfig,
  variables: trees.Variables,
  batch: trees.HostBatch,
  firsts: Sequence[int],
) -> np.ndarray:
  """The label that a model finds likeliest for each row: [N] int, an index into `firsts`.

  Args:
    model: its config.
    variables: its weights.
    batch: see `rows`.
    firsts: the token with which each label's answer begins.
  """
  at = np.argmax(batch['targets'] >= 0, axis=1)
  inputs = {key: batch[key] for key in INPUTS}
  logits = np.asarray(_logits(model, variables, inputs, at))
  return logits[:, list(firsts)].argmax(axis=1)


def first_tokens(cfg: schema.Config, tokenizer: tokenizer_lib.Tokenizer) -> list[int]:
  """The token with which the answer of each of `attacks.LABELS` begins.

  Raises:
    errors.InputError: two labels begin alike, so that one token does not tell them apart.
  """
  batch = rows(cfg, [attacks.Example('x', label) for label in attacks.LABELS], tokenizer)
  at = np.argmax(batch['targets'] >= 0, axis=1)
  found = batch['targets'][np.arange(len(at)), at].tolist()
  errors.require(
    len(set(found)) == len(found),
    f'config.data.chat_format={cfg.data.chat_format!r}: the answers {attacks.LABELS} begin with '
    "the same token; use chat_format='marks'",
  )
  return found
