"""Self-speculative decoding: the first module of multi-token prediction drafts, the model checks.

DeepSeek-V3 (arXiv 2412.19437, section 5.4.3). Each round gives the model two tokens, the last one
that is certain and the module's guess of the next. The model's own distribution decides about the
guess, so that the text is distributed as without it: a greedy text is the same text, a sampled one
keeps the guess with the probability that the model gives it and draws among the other tokens if not
(speculative sampling, arXiv 2211.17192, with a draft that is certain of its guess).

Further modules than the first are not used. A rejected guess leaves its entries in the caches; the
next round starts at their slot and overwrites them.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import errors, trees
from moe_jax.config import schema
from moe_jax.inference import cached_model, generate
from moe_jax.inference import sampling as sampling_lib
from moe_jax.models import decoder_block, token_prediction
from moe_jax.models.attention import multi_head
from moe_jax.models.routers import routing

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Speculation:
  """Continuations of a batch of prompts, and how often the drafts were right."""

  tokens: list[list[int]]  # new ids per prompt, without the end token
  drafted: int  # guesses that the model checked
  accepted: int
  seconds: float

  @property
  def acceptance(self) -> float:
    """Share of the drafts that were right; 0 without drafts."""
    return self.accepted / max(self.drafted, 1)

  @property
  def tokens_per_second(self) -> float:
    return sum(len(row) for row in self.tokens) / self.seconds


class _State(NamedTuple):
  """Between two rounds; `token` is written but the model has not read it."""

  round: Array  # []
  token: Array  # [B] the last certain token
  draft: Array  # [B] guess of the next one
  position: Array  # [B] of `token`
  count: Array  # [B] tokens written
  done: Array  # [B]
  written: Array  # [B, max_new_tokens + 1], -1 where nothing is; the last place is never read
  caches: cached_model.Caches
  mtp_cache: decoder_block.LayerCache
  drafted: Array  # []
  accepted: Array  # []


def check(cfg: schema.ModelConfig):
  """Refuses models that have nothing to draft with.

  Raises:
    errors.InputError: `num_mtp_layers` is 0.
  """
  errors.require(
    cfg.num_mtp_layers > 0,
    'config.model.num_mtp_layers=0 leaves nothing that could draft; leave --speculative out, or '
    'train a model with num_mtp_layers=1',
  )


def _modules(
  cfg: schema.ModelConfig,
  variables: trees.Variables,
  hidden: Array,
  ids: Array,
  positions: Array,
  segment_ids: Array,
  cache: decoder_block.LayerCache | None,
) -> tuple[Array, decoder_block.LayerCache]:
  """The first module on hidden [B, L, D] and the tokens behind [B, L].

  Returns:
    (its state [B, L, D], normed for the head; its cache).
  """
  state = variables.get('router_state', {}).get('mtp_layers', {})
  own = {'params': variables['params']['mtp_layers'], 'router_state': state}
  own = jax.tree.map(lambda a: a[0], own)
  embedded = jnp.take(variables['params']['embedding'], ids, axis=0).astype(hidden.dtype)
  mask = segment_ids > 0
  row = jnp.arange(len(ids), dtype=jnp.int32)
  tokens = routing.Tokens(ids, mask, row, jnp.uint32(0), positions)
  inputs = decoder_block.LayerInputs(cache, jnp.int32(cfg.num_layers), {})
  layer = token_prediction.MTPLayer(cfg, cfg.is_moe, train=False, keep_cache=True)
  ahead = token_prediction.Ahead(embedded, ids, mask)
  ctx = multi_head.Context(positions, segment_ids)
  result: Any = layer.apply(own, hidden, inputs, ahead, ctx, tokens)
  _, (normed, new, _) = result
  return normed, new


def judge(logits: Array, draft: Array, sampling: sampling_lib.Sampling, rng: Array):
  """Accepts the draft, or samples the token that replaces it (speculative sampling).

  Args:
    logits: [B, V] float32 of the model.
    draft: [B] int32.
    sampling: how tokens are drawn.
    rng: key.

  Returns:
    (whether the draft stays [B] bool, the token [B] int32: the draft, or another one).
  """
  if sampling.temperature == 0:
    token = logits.argmax(axis=-1).astype(jnp.int32)
    return token == draft, token
  logits = sampling_lib.filter_logits(logits, sampling)
  keep_key, draw_key = jax.random.split(rng)
  here = jax.nn.one_hot(draft, logits.shape[-1], dtype=bool)
  probability = jnp.where(here, jax.nn.softmax(logits, axis=-1), 0.0).sum(axis=-1)
  keep = jax.random.uniform(keep_key, draft.shape) < probability
  other = jax.random.categorical(draw_key, jnp.where(here, -jnp.inf, logits)).astype(jnp.int32)
  return keep, jnp.where(keep, draft, other)


@functools.partial(jax.jit, static_argnames=('cfg', 'sampling', 'eos_ids', 'max_new_tokens'))
def _generate(
  variables: trees.Variables,
  weights: cached_model.Weights,
  prompt: Array,
  length: Array,
  limit: Array,
  seed: Array,
  *,
  cfg: schema.ModelConfig,
  sampling: sampling_lib.Sampling,
  eos_ids: tuple[int, ...],
  max_new_tokens: int,
) -> tuple[Array, Array, Array]:
  """(new ids [B, max_new_tokens], -1 where a row has ended; guesses checked; guesses right)."""
  batch_size, prompt_len = prompt.shape
  rng = jax.random.key(seed)
  slots = generate.in_buckets(prompt_len + max_new_tokens + 1)  # a round may write one beyond

  def draw(logits, key):
    return judge(logits, jnp.full(len(logits), -1), sampling, key)[1]

  module = functools.partial(_modules, cfg, variables)

  def guess(normed, i):
    return cached_model.head(weights, normed[row, i][:, None])[:, 0].argmax(-1).astype(jnp.int32)

  row = jnp.arange(batch_size)

  out = cached_model.prefill(cfg, weights, prompt, length, slots)
  at = jnp.broadcast_to(jnp.arange(prompt_len), prompt.shape)
  real = (at < length[:, None]).astype(jnp.int32)
  last = (length - 1)[:, None]

  def pick(a, i):
    return jnp.take_along_axis(a, i[..., None], axis=1)[:, 0]

  logits = cached_model.logits_of(cfg, weights, pick(out.hidden, last)[:, None])[:, 0]
  token = draw(logits, jax.random.fold_in(rng, 0))
  behind = jnp.where(at == last, token[:, None], jnp.roll(prompt, -1, axis=1))
  ahead, mtp_cache = module(cached_model.normed(cfg, weights, out.hidden), behind, at, real, None)
  done = sampling_lib.ends(token, eos_ids)
  written = jnp.full((batch_size, max_new_tokens + 1), -1, jnp.int32)
  zero = jnp.zeros((), jnp.int32)
  state = _State(
    round=zero,
    token=token,
    draft=guess(ahead, length - 1),
    position=length,
    count=jnp.where(done, 0, 1),
    done=done,
    written=written.at[:, 0].set(jnp.where(done, -1, token)),
    caches=out.caches,
    mtp_cache=jax.tree.map(lambda a: cached_model.with_slots(a, slots), mtp_cache),
    drafted=zero,
    accepted=zero,
  )

  def put(written: Array, count: Array, token: Array, active: Array) -> Array:
    place = jnp.where(active & (count < max_new_tokens), count, max_new_tokens)
    return written.at[row, place].set(token)

  def advance(s: _State) -> _State:
    active = ~s.done & (s.count < limit)
    keys = jax.random.split(jax.random.fold_in(rng, s.round + 1))
    positions = s.position[:, None] + jnp.arange(2)
    pair = jnp.stack([s.token, s.draft], axis=1)
    out = cached_model.step(cfg, weights, pair, positions, s.caches)
    logits = cached_model.logits_of(cfg, weights, out.hidden)
    keep, first = judge(logits[:, 0], s.draft, sampling, keys[0])
    second = draw(logits[:, 1], keys[1])
    # The first token, then behind an accepted draft the second.
    done = s.done | (active & sampling_lib.ends(first, eos_ids))
    one = active & ~done
    written = put(s.written, s.count, first, one)
    count = s.count + one
    two = one & keep & (count < limit)
    done |= two & sampling_lib.ends(second, eos_ids)
    two &= ~done
    written = put(written, count, second, two)
    ones = jnp.ones((batch_size, 2), jnp.int32)
    behind = jnp.stack([first, second], axis=1)
    ahead, mtp_cache = module(
      cached_model.normed(cfg, weights, out.hidden), behind, positions, ones, s.mtp_cache
    )
    return _State(
      round=s.round + 1,
      token=jnp.where(keep, second, first),
      draft=guess(ahead, keep.astype(jnp.int32)),
      position=s.position + 1 + keep,
      count=count + two,
      done=done,
      written=written,
      caches=out.caches,
      mtp_cache=mtp_cache,
      drafted=s.drafted + active.sum(dtype=jnp.int32),
      accepted=s.accepted + (active & keep).sum(dtype=jnp.int32),
    )

  def unfinished(s):
    return (~s.done & (s.count < limit)).any()

  state = jax.lax.while_loop(unfinished, advance, state)
  return state.written[:, :max_new_tokens], state.drafted, state.accepted


def speculate(
  cfg: schema.ModelConfig,
  variables: trees.Variables,
  prompts: Sequence[Sequence[int]],
  max_new_tokens: int,
  eos_ids: Sequence[int],
  sampling: sampling_lib.Sampling,
  *,
  timed: bool = False,
) -> Speculation:
  """Continues each prompt; arguments as of `generate.generate`.

  Raises:
    errors.InputError: see `check` and `generate.generate`.
  """
  check(cfg)
  errors.require(
    sampling.repetition_penalty == 1,
    f'--repetition_penalty={sampling.repetition_penalty} cannot go with --speculative, which '
    'draws two tokens at once; leave one of them out',
  )
  prompt, lengths = generate.padded(cfg, prompts, max_new_tokens)
  weights = cached_model.unstack(cfg, variables)
  fn = functools.partial(
    _generate,
    variables,
    weights,
    prompt,
    lengths,
    seed=np.uint32(sampling.seed),
    cfg=cfg,
    sampling=dataclasses.replace(sampling, seed=0),  # one compilation serves all seeds
    eos_ids=tuple(eos_ids),
    max_new_tokens=max_new_tokens,
  )
  if timed:
    jax.block_until_ready(fn(np.int32(0)))
  start = time.perf_counter()
  ids, drafted, accepted = jax.device_get(fn(np.int32(max_new_tokens)))
  seconds = time.perf_counter() - start
  tokens = [[int(i) for i in row if i >= 0] for row in ids]
  return Speculation(tokens, int(drafted), int(accepted), seconds)
