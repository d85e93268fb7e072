"""Sampling: prefill of the prompts, then decoding with the key-value cache, compiled as one."""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import config, errors
from moe_jax.models import decode, transformer

Array = jax.Array

LENGTH_BUCKET = 64  # prompts and caches are padded to multiples of this, to compile rarely


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the next token is drawn; the filters apply in the order temperature, top_k, top_p."""

  temperature: float = 1.0  # 0 = the most likely token
  top_k: int = 0  # keep the k most likely tokens; 0 = all
  top_p: float = 1.0  # keep the fewest tokens whose probabilities reach p; 1 = all
  seed: int = 0

  def __post_init__(self):
    """Raises errors.InputError for a value out of its range."""
    rules = (
      ('temperature', self.temperature >= 0, 'at least 0 (0 takes the most likely token)'),
      ('top_k', self.top_k >= 0, 'at least 0 (0 keeps all tokens)'),
      ('top_p', 0 < self.top_p <= 1, 'above 0 and at most 1 (1 keeps all tokens)'),
      ('seed', 0 <= self.seed < 2**32, 'at least 0 and below 2^32'),
    )
    for name, holds, rule in rules:
      if not holds:
        raise errors.InputError(f'--{name}={getattr(self, name)} must be {rule}')


@dataclasses.dataclass(frozen=True)
class Generation:
  """Continuations of a batch of prompts."""

  tokens: list[list[int]]  # new ids per prompt, without the end token
  seconds: float  # prefill and decoding; without compilation if it was `timed`

  @property
  def tokens_per_second(self) -> float:
    return sum(len(row) for row in self.tokens) / self.seconds


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
  return logits


def _draw(logits: Array, sampling: Sampling, rng: Array) -> Array:
  if sampling.temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  return jax.random.categorical(rng, filter_logits(logits, sampling)).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=('cfg', 'sampling', 'eos_id', 'max_new_tokens'))
def _generate(
  variables: Any,
  prompt: Array,
  length: Array,
  limit: Array,
  seed: Array,
  *,
  cfg: config.ModelConfig,
  sampling: Sampling,
  eos_id: int,
  max_new_tokens: int,
) -> Array:
  """Writes up to `limit` new ids per row.

  Args:
    variables: params and router_state.
    prompt: [B, P] int32, padded on the right.
    length: [B] int32, real tokens per prompt.
    limit: [] int32, at most max_new_tokens.
    seed: [] uint32.
    cfg: the model.
    sampling: how to draw (its seed is not read).
    eos_id: id that ends a row.
    max_new_tokens: size of the result.

  Returns:
    [B, max_new_tokens] int32, -1 from the end token on.
  """
  batch_size, prompt_len = prompt.shape
  slots = -(-(prompt_len + max_new_tokens) // LENGTH_BUCKET) * LENGTH_BUCKET
  rng = jax.random.key(seed)
  weights = decode.unstack(cfg, variables)

  at = jnp.broadcast_to(jnp.arange(prompt_len), prompt.shape)
  model = transformer.Transformer(cfg, keep_cache=True)
  out = model.apply(variables, prompt, at, (at < length[:, None]).astype(jnp.int32))
  caches = decode.unstack_caches(cfg, out.caches, slots)
  last = jnp.take_along_axis(out.logits, (length - 1)[:, None, None], axis=1)[:, 0]
  token = _draw(last, sampling, jax.random.fold_in(rng, 0))

  def unfinished(carry):
    t, _, _, done, _ = carry
    return (t < limit) & ~done.all()

  def advance(carry):
    t, token, caches, done, written = carry
    done |= token == eos_id
    written = written.at[:, t].set(jnp.where(done, -1, token))
    out = decode.step(cfg, weights, token[:, None], (length + t)[:, None], caches)
    token = _draw(out.logits[:, 0], sampling, jax.random.fold_in(rng, t + 1))
    return t + 1, token, out.caches, done, written

  written = jnp.full((batch_size, max_new_tokens), -1, jnp.int32)
  done = jnp.zeros((batch_size,), bool)
  return jax.lax.while_loop(unfinished, advance, (0, token, caches, done, written))[-1]


def check_lengths(
  cfg: config.ModelConfig,
  longest_prompt: int,
  max_new_tokens: int,
  names: tuple[str, str] = ('--prompt', '--max_new_tokens'),
):
  """Refuses prompts that do not fit the context together with what is asked for.

  Args:
    cfg: the model.
    longest_prompt: tokens, begin-of-document token included.
    max_new_tokens: tokens asked for.
    names: what the user calls the two.

  Raises:
    errors.InputError: names the lengths and the way out.
  """
  prompt_name, limit_name = names
  if max_new_tokens < 1:
    raise errors.InputError(f'{limit_name}={max_new_tokens} must be at least 1')
  room = cfg.max_seq_len - max_new_tokens
  if longest_prompt > room:
    raise errors.InputError(
      f'{prompt_name} has {longest_prompt} tokens and {limit_name}={max_new_tokens}, together more '
      f'than model.max_seq_len={cfg.max_seq_len}; shorten the prompt to {max(room, 0)} tokens or '
      'ask for fewer new ones'
    )


def check_router(cfg: config.ModelConfig):
  """Refuses models that cannot write one token after the other.

  Raises:
    errors.InputError: the router chooses tokens for experts, which needs the later tokens too.
  """
  if cfg.is_moe and cfg.moe.router == 'expert_choice':
    raise errors.InputError(
      "config.model.moe.router='expert_choice' has no causal decoding: an expert's choice among a "
      "chunk's tokens needs the later ones; set config.train.sample_prompt='' and do without "
      'generate'
    )


def generate(
  cfg: config.ModelConfig,
  variables: Any,
  prompts: Sequence[Sequence[int]],
  max_new_tokens: int,
  eos_id: int,
  sampling: Sampling,
  *,
  timed: bool = False,
) -> Generation:
  """Continues each prompt until the end token or the limit.

  Args:
    cfg: the model.
    variables: its params and router_state.
    prompts: token ids, begin-of-document token included; lengths may differ.
    max_new_tokens: limit per prompt.
    eos_id: id that ends a continuation.
    sampling: how tokens are drawn; its seed decides all draws.
    timed: compile before the clock starts (at the price of one more prefill).

  Raises:
    errors.InputError: a prompt is empty, or does not fit the context; or see `check_router`.
  """
  if not prompts or not all(prompts):
    raise errors.InputError('--prompt must hold at least one token')
  longest = max(len(p) for p in prompts)
  check_router(cfg)
  check_lengths(cfg, longest, max_new_tokens)
  padded = np.zeros((len(prompts), -(-longest // LENGTH_BUCKET) * LENGTH_BUCKET), np.int32)
  for row, prompt in zip(padded, prompts):
    row[: len(prompt)] = prompt
  fn = functools.partial(
    _generate,
    variables,
    padded,
    np.array([len(p) for p in prompts], np.int32),
    seed=np.uint32(sampling.seed),
    cfg=cfg,
    sampling=dataclasses.replace(sampling, seed=0),  # one compilation serves all seeds
    eos_id=eos_id,
    max_new_tokens=max_new_tokens,
  )
  if timed:
    fn(np.int32(0)).block_until_ready()
  start = time.perf_counter()
  ids = np.asarray(fn(np.int32(max_new_tokens)))
  seconds = time.perf_counter() - start
  return Generation([[int(i) for i in row if i >= 0] for row in ids], seconds)
