"""How the next token is drawn from logits: pure functions of arrays."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from moe_jax import errors

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the next token is drawn: repetition_penalty, temperature, top_k, top_p, min_p, in order."""

  temperature: float = 1.0  # 0 = the most likely token
  top_k: int = 0  # keep the k most likely tokens; 0 = all
  top_p: float = 1.0  # keep the fewest tokens whose probabilities reach p; 1 = all
  seed: int = 0
  min_p: float = 0.0  # keep tokens at least this times as likely as the likeliest; 0 = all
  # Logits of tokens that stand in the prompt or the continuation are divided by it if positive, and
  # multiplied if negative (CTRL, arXiv 1909.05858, section 4.1); 1 = off.
  repetition_penalty: float = 1.0

  def __post_init__(self):
    """Raises errors.InputError for a value out of its range."""
    rules = (
      (
        'temperature',
        self.temperature == 0 or 1e-4 <= self.temperature < math.inf,
        '0, which takes the most likely token, or finite and at least 0.0001',
      ),
      ('top_k', self.top_k >= 0, 'at least 0 (0 keeps all tokens)'),
      ('top_p', 0 < self.top_p <= 1, 'above 0 and at most 1 (1 keeps all tokens)'),
      ('min_p', 0 <= self.min_p < 1, 'at least 0 and below 1 (0 keeps all tokens)'),
      ('repetition_penalty', self.repetition_penalty >= 1, 'at least 1 (1 changes nothing)'),
      ('seed', 0 <= self.seed < 2**32, 'at least 0 and below 2^32'),
    )
    for name, holds, rule in rules:
      if not holds:
        raise errors.InputError(f'--{name}={getattr(self, name)} must be {rule}')


def ends(token: Array, eos_ids: Sequence[int]) -> Array:
  """Whether a token ends its text: ids [B] -> [B] bool."""
  return jnp.isin(token, jnp.array(tuple(eos_ids), jnp.int32))


def penalise(logits: Array, seen: Array, penalty: float) -> Array:
  """The repetition penalty: logits [B, V], seen [B, V] bool -> [B, V]."""
  return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def filter_logits(logits: Array, sampling: Sampling) -> Array:
  """[B, V] float32 -> logits of the tempered distribution, -inf for tokens that are left out."""
  logits = logits / sampling.temperature
  vocab_size = logits.shape[-1]
  if 0 < sampling.top_k < vocab_size:
    kth = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
    logits = jnp.where(logits >= kth, logits, -jnp.inf)
  if sampling.top_p < 1:
    order = jnp.argsort(-logits, axis=-1)
    probs = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    # A token stays if the tokens before it have not reached p; so the first one always does.
    keep = jnp.cumsum(probs, axis=-1) - probs < sampling.top_p
    keep = jnp.take_along_axis(keep, jnp.argsort(order, axis=-1), axis=-1)
    logits = jnp.where(keep, logits, -jnp.inf)
  if sampling.min_p > 0:
    # p >= min_p p_max, in logits.
    floor = logits.max(axis=-1, keepdims=True) + jnp.log(sampling.min_p)
    logits = jnp.where(logits >= floor, logits, -jnp.inf)
  return logits


def row_keys(seed: Array, num_rows: int, number: Array) -> Array:
  """[B] keys for the draw `number` of every row, whatever rows stand beside it.

  Args:
    seed: [] uint32.
    num_rows: B.
    number: [] or [B] int32, tokens of the row drawn before.
  """
  key = jax.random.key(seed)
  number = jnp.broadcast_to(number, (num_rows,))

  def fold(row, n):
    return jax.random.fold_in(jax.random.fold_in(key, row), n)

  return jax.vmap(fold)(jnp.arange(num_rows), number)


def draw(logits: Array, sampling: Sampling, keys: Array) -> Array:
  """logits [B, V] float32, keys [B] -> ids [B] int32."""
  if sampling.temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  return jax.vmap(jax.random.categorical)(keys, filter_logits(logits, sampling)).astype(jnp.int32)
