"""Writes messages into text: a logits processor with one message for each row.

Axis letters: W tokens before.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from moe_jax import errors, trees
from moe_jax.config import schema
from moe_jax.inference import cached_model, processors
from moe_jax.watermark import partition, proxy

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class _Marker:
  """Takes delta from the logits of unavailable tokens; what the processor is compiled by."""

  scheme: partition.Scheme  # its `divisions`
  cfg: schema.ModelConfig | None  # of the proxy

  def __call__(
    self,
    constants: tuple[Array, Array, Array, Array, cached_model.Weights | None],
    logits: Array,
    written: processors.Written,
    state: trees.Tree,
  ) -> tuple[Array, trees.Tree]:
    """The processor's function.

    Args:
      constants: (chunks of messages [B, chunks], tokens of a chunk, key, delta, proxy's weights).
      logits: see `processors.Function`, as the others.
      written: tokens so far.
      state: none.
    """
    chunks, chunk_tokens, secret, delta, weights = constants
    scheme, probs = self.scheme, logits.shape[-1]
    place = written.count - scheme.window
    number = place // chunk_tokens
    # Before the first marked place, and in rows that have ended, this reads what is not there; the
    # result is not used.
    before = jax.lax.dynamic_slice_in_dim(written.ids, place, scheme.window, axis=1)
    before = jnp.maximum(before, 0)
    message = jnp.take(chunks, number, axis=1, mode='clip')
    if self.cfg is not None:
      assert weights is not None
      probs = proxy.next_probs(self.cfg, weights, before)
    seed = partition.prefix_seed(scheme, secret, before)
    division = partition.division_of(scheme, seed, message)
    available = partition.available(scheme, seed, division, probs)
    marked = (place >= 0) & (number < chunks.shape[1])
    return jnp.where(marked & ~available, logits - delta, logits), state


def processor(
  scheme: partition.Scheme,
  known: proxy.Proxy | None,
  messages: Sequence[int],
  delta: float,
) -> processors.Processor:
  """A processor that writes `messages[i]` into row i.

  Behind a whole message the text goes on without a mark.

  Args:
    scheme: how; see `partition`.
    known: the proxy of a 'balance' scheme, None for a 'vanilla' one.
    messages: one per row.
    delta: what is taken from the logits of unavailable tokens, before the temperature divides them.

  Raises:
    errors.InputError: a message has too many bits, delta is negative, or the proxy is missing.
  """
  check_proxy(scheme, known)
  errors.require(delta >= 0, f'--delta={delta} must be at least 0')
  chunks = jnp.array([scheme.chunks(message) for message in messages], jnp.uint32)
  cfg, weights = known or (None, None)
  numbers = (jnp.int32(scheme.chunk_tokens), jnp.asarray(scheme.secret), jnp.float32(delta))
  return processors.Processor(_Marker(scheme.divisions, cfg), (chunks, *numbers, weights))


def check_proxy(scheme: partition.Scheme, known: proxy.Proxy | None):
  """Requires a proxy of a 'balance' scheme, and none of a 'vanilla' one."""
  errors.require(
    (scheme.kind == 'balance') == (known is not None),
    f'a {scheme.kind!r} watermark {"needs a" if known is None else "has no"} proxy: give --proxy '
    "for a 'balance' one only",
  )


def check_length(scheme: partition.Scheme, max_new_tokens: int):
  """Refuses a text that is too short for its message.

  Raises:
    errors.InputError: names the lengths and the way out.
  """
  errors.require(
    max_new_tokens >= scheme.num_tokens,
    f'a message of {scheme.message_bits} bits needs {scheme.num_tokens} tokens ({scheme.window} + '
    f'{scheme.num_chunks} chunks of {scheme.chunk_tokens}), but '
    f'--max_new_tokens={max_new_tokens}; ask for more, or make a key with fewer message_bits or '
    'tokens_per_bit',
  )
