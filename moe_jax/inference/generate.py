"""Text from a model: prefill of the prompts, then decoding with the cache.

Decoding runs on the device in pieces of many steps; between pieces the host looks at the text, if
somebody asked for stop strings or for the text as it comes.
"""

import dataclasses
import functools
import operator
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import errors, trees
from moe_jax.config import router_traits, schema
from moe_jax.inference import cached_model
from moe_jax.inference import processors as processors_lib
from moe_jax.inference import sampling as sampling_lib

Array = jax.Array
OnText = Callable[[int, str], object]  # (row, further text)
DecodeText = Callable[[Sequence[int]], str]

LENGTH_BUCKET = 64  # prompts and caches are padded to multiples of this, to compile rarely
PIECE = 16  # steps between two looks at the text
_CONTEXT = 256  # last ids of a prompt that are decoded with what is written behind them
_UNFINISHED = '\ufffd'  # what a decoder makes of the first bytes of a character


@dataclasses.dataclass(frozen=True)
class Generation:
  """Continuations of a batch of prompts."""

  tokens: list[list[int]]  # new ids per prompt, without the end token
  texts: list[str]  # cut before a stop string; empty strings if no `decode` was given
  seconds: float  # prefill and decoding; without compilation if it was `timed`

  @property
  def tokens_per_second(self) -> float:
    return sum(len(row) for row in self.tokens) / self.seconds


class _State(NamedTuple):
  """Between two steps."""

  t: Array  # [] int32, tokens drawn and written before `token`
  token: Array  # [B] int32, drawn and neither written nor read
  position: Array  # [B] int32, of `token`
  done: Array  # [B] bool
  written: Array  # [B, slots for new tokens] int32, -1 from the end of a row on
  seen: Array | None  # [B, V] bool, what a repetition penalty counts
  caches: cached_model.Caches
  processed: tuple[trees.Tree, ...] = ()  # states of the logits processors


def check_lengths(
  cfg: schema.ModelConfig,
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


def check_router(cfg: schema.ModelConfig):
  """Refuses models that cannot write one token after the other.

  Raises:
    errors.InputError: the router is not causal: which experts a token visits needs later tokens.
  """
  errors.require(
    not cfg.is_moe or router_traits.of(cfg.moe).causal,
    f'config.model.moe.router={cfg.moe.router!r} has no causal decoding: which experts a token '
    "visits depends on later ones; set config.train.sample_prompt='' and do without generate",
  )


def in_buckets(length: int) -> int:
  """`length` rounded up to a whole number of buckets."""
  return -(-length // LENGTH_BUCKET) * LENGTH_BUCKET


def check_ids(cfg: schema.ModelConfig, ids: Iterable[Any], where: str):
  """Refuses what is no token id: arrays would take the nearest one instead.

  Raises:
    errors.InputError: one is no whole number, or not in the vocabulary.
  """
  for one in ids:
    try:
      known = 0 <= operator.index(one) < cfg.vocab_size
    except TypeError:  # no whole number
      known = False
    errors.require(
      known,
      f'{where}: {one} is no token id; ids are whole numbers from 0 to {cfg.vocab_size - 1}, so '
      "encode text with the run's own tokenizer",
    )


def padded(
  cfg: schema.ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
  """Prompts as [B, L] int32, padded on the right to a bucket, and their lengths [B] int32.

  Raises:
    errors.InputError: a prompt is empty, does not fit the context or holds what is no token id; or
      see `check_router`.
  """
  if not prompts or not all(prompts):
    raise errors.InputError('--prompt must hold at least one token')
  longest = max(len(p) for p in prompts)
  check_router(cfg)
  check_lengths(cfg, longest, max_new_tokens)
  rows = np.zeros((len(prompts), in_buckets(longest)), np.int32)
  for row, prompt in zip(rows, prompts):
    check_ids(cfg, prompt, '--prompt')
    row[: len(prompt)] = prompt
  return rows, np.array([len(p) for p in prompts], np.int32)


def _draw(
  logits: Array,
  state: _State,
  written: processors_lib.Written,
  sampling: sampling_lib.Sampling,
  seed: Array,
  functions: tuple[processors_lib.Function, ...],
  constants: tuple[trees.Tree, ...],
) -> tuple[Array, Array | None, tuple[trees.Tree, ...]]:
  """The next token of every row, [B]; with it, what has been seen and the processors' states."""
  number = written.count
  if state.seen is not None:
    logits = sampling_lib.penalise(logits, state.seen, sampling.repetition_penalty)
  logits, processed = processors_lib.apply(functions, constants, logits, written, state.processed)
  keys = sampling_lib.row_keys(seed, len(logits), number)
  token = sampling_lib.draw(logits, sampling, keys)
  if state.seen is None:
    return token, None, processed
  return token, state.seen.at[jnp.arange(len(token)), token].set(True), processed


@functools.partial(jax.jit, static_argnames=('cfg', 'sampling', 'num_new', 'functions'))
def _start(
  weights: cached_model.Weights,
  prompt: Array,
  length: Array,
  seed: Array,
  constants: tuple[trees.Tree, ...] = (),
  processed: tuple[trees.Tree, ...] = (),
  *,
  cfg: schema.ModelConfig,
  sampling: sampling_lib.Sampling,
  num_new: int,
  functions: tuple[processors_lib.Function, ...] = (),
) -> _State:
  """Reads the prompts [B, L] and draws the first token of each row."""
  batch_size, prompt_len = prompt.shape
  hidden, caches, _ = cached_model.prefill(
    cfg, weights, prompt, length, in_buckets(prompt_len + num_new)
  )
  last = jnp.take_along_axis(hidden, (length - 1)[:, None, None], axis=1)
  logits = cached_model.logits_of(cfg, weights, last)[:, 0]
  seen = None
  if sampling.repetition_penalty != 1:
    real = jnp.arange(prompt_len) < length[:, None]
    ids = jnp.where(real, prompt, cfg.vocab_size)  # out of bounds, so dropped
    empty = jnp.zeros((batch_size, cfg.vocab_size), bool)
    seen = empty.at[jnp.arange(batch_size)[:, None], ids].set(True, mode='drop')
  zero = jnp.zeros((), jnp.int32)
  written = jnp.full((batch_size, num_new), -1, jnp.int32)
  done = jnp.zeros((batch_size,), bool)
  state = _State(zero, length, length, done, written, seen, caches, processed)
  so_far = processors_lib.Written(written, zero)
  token, seen, processed = _draw(logits, state, so_far, sampling, seed, functions, constants)
  return state._replace(token=token, seen=seen, processed=processed)


@functools.partial(
  jax.jit, static_argnames=('cfg', 'sampling', 'eos_ids', 'functions'), donate_argnames='state'
)
def _advance(
  weights: cached_model.Weights,
  state: _State,
  limit: Array,
  seed: Array,
  constants: tuple[trees.Tree, ...] = (),
  *,
  cfg: schema.ModelConfig,
  sampling: sampling_lib.Sampling,
  eos_ids: tuple[int, ...],
  functions: tuple[processors_lib.Function, ...] = (),
) -> _State:
  """Decodes until `limit` tokens are generated or all rows have ended."""

  def advance(s: _State) -> _State:
    done = s.done | sampling_lib.ends(s.token, eos_ids)
    written = s.written.at[:, s.t].set(jnp.where(done, -1, s.token))
    out = cached_model.step(cfg, weights, s.token[:, None], s.position[:, None], s.caches)
    logits = cached_model.logits_of(cfg, weights, out.hidden)[:, 0]
    so_far = processors_lib.Written(written, s.t + 1)
    token, seen, processed = _draw(logits, s, so_far, sampling, seed, functions, constants)
    return _State(s.t + 1, token, s.position + 1, done, written, seen, out.caches, processed)

  return jax.lax.while_loop(lambda s: (s.t < limit) & ~s.done.all(), advance, state)


class Generator:
  """Decodes with a model whose weights it holds layer by layer, a second copy of the stacked ones.

  The copies cost the memory of the model once more, until whoever holds `variables` lets them go.
  """

  def __init__(self, cfg: schema.ModelConfig, variables: trees.Variables, eos_ids: Sequence[int]):
    """Takes the variables apart.

    Args:
      cfg: the model.
      variables: its params and router_state.
      eos_ids: ids that end a continuation.
    """
    check_router(cfg)
    self._cfg, self._eos_ids = cfg, tuple(eos_ids)
    self._weights = cached_model.unstack(cfg, variables)

  def generate(
    self,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: sampling_lib.Sampling,
    *,
    decode_text: DecodeText | None = None,
    stop: Sequence[str] = (),
    stop_ids: Sequence[int] = (),
    on_text: OnText | None = None,
    processors: Sequence[processors_lib.Processor] = (),
    timed: bool = False,
  ) -> Generation:
    """Continues each prompt until an end token, a stop string or the limit.

    Args:
      prompts: token ids, begin-of-document token included; lengths may differ.
      max_new_tokens: limit per prompt.
      sampling: how tokens are drawn. Row i draws by (seed, i, token number), whatever stands in the
        other rows.
      decode_text: ids to text; needed by `stop` and `on_text`.
      stop: strings that end a continuation, and are cut off it.
      stop_ids: further ids that end a continuation.
      on_text: called with (row, further text) as text is certain.
      processors: what changes logits before the draw, made for this batch; see `processors`.
      timed: compile before the clock starts (at the price of one more prefill).

    Raises:
      errors.InputError: a prompt is empty, or does not fit the context; an empty stop string; a
        token id that is none.
    """
    errors.require(all(stop), "--stop='' would end every text at once; leave it out")
    check_ids(self._cfg, stop_ids, '--stop_id')
    if decode_text is None and (stop or on_text):
      raise ValueError('stop strings and streaming need decode_text')
    prompt, length = padded(self._cfg, prompts, max_new_tokens)
    seed = np.uint32(sampling.seed)
    eos_ids = (*self._eos_ids, *stop_ids)
    # One compilation serves all seeds.
    static = dict(
      cfg=self._cfg,
      sampling=dataclasses.replace(sampling, seed=0),
      functions=tuple(p.function for p in processors),
    )
    constants = tuple(p.constants for p in processors)
    num_new = in_buckets(max_new_tokens)

    def begin():
      states = tuple(jax.tree.map(jnp.copy, p.state) for p in processors)  # they are donated
      args = (self._weights, prompt, length, seed, constants, states)
      return _start(*args, num_new=num_new, **static)

    advance = functools.partial(
      _advance, self._weights, seed=seed, constants=constants, eos_ids=eos_ids, **static
    )
    if timed:
      jax.block_until_ready(advance(begin(), np.int32(0)))
    start = time.perf_counter()
    state = begin()
    watch = _Watch(prompts, decode_text, stop, on_text)
    written = 0
    while written < max_new_tokens:
      pieces = PIECE if stop or on_text else max_new_tokens
      written = min(written + pieces, max_new_tokens)
      state = advance(state, np.int32(written))
      ids, done = jax.device_get((state.written, state.done))
      done = done | watch.look(ids)
      if done.all():
        break
      # Placed as it was: elsewhere it would be another program.
      state = state._replace(done=jax.device_put(done, state.done.sharding))
    seconds = time.perf_counter() - start
    tokens, texts = watch.finish(np.asarray(state.written))
    return Generation(tokens, texts, seconds)


class _Watch:
  """Follows the texts of a batch on the host."""

  def __init__(
    self,
    prompts: Sequence[Sequence[int]],
    decode_text: DecodeText | None,
    stop: Sequence[str],
    on_text: OnText | None,
  ):
    self._prompts, self._decode_text = prompts, decode_text
    self._stop, self._on_text = stop, on_text
    self._sent = [0] * len(prompts)  # characters handed to on_text
    # (tokens, text) of each row at a stop string
    self._cut: list[tuple[int, str] | None] = [None] * len(prompts)
    self._hold = max((len(s) for s in stop), default=1) - 1

  def _decode(self, row: int, tokens: Sequence[int]) -> str:
    if self._decode_text is None:
      return ''
    return continuation(self._decode_text, self._prompts[row], tokens)

  def look(self, ids: np.ndarray) -> np.ndarray:
    """ids [B, n] written so far -> [B] bool, rows that a stop string has ended."""
    if self._stop or self._on_text:
      for row, line in enumerate(ids):
        if self._cut[row] is None:
          self._look_at(row, [int(i) for i in line if i >= 0], last=False)
    return np.array([cut is not None for cut in self._cut])

  def _look_at(self, row: int, tokens: list[int], last: bool):
    text = self._decode(row, tokens)
    if _first(text, self._stop) is not None:
      # The fewest tokens whose text holds a stop string: what comes behind was drawn in vain, and
      # the text does not depend on when it was looked at.
      found = ((n, self._decode(row, tokens[:n])) for n in range(len(tokens) + 1))
      count, text = next((n, t) for n, t in found if _first(t, self._stop) is not None)
      text, last = text[: _first(text, self._stop)], True
      self._cut[row] = count, text
    if self._on_text is None:
      return
    if not last:
      # Neither a character of which bytes are missing, nor what may begin a stop string.
      certain = text.rstrip(_UNFINISHED)
      text = certain[: max(len(certain) - self._hold, 0)]
    if len(text) > self._sent[row]:
      self._on_text(row, text[self._sent[row] :])
      self._sent[row] = len(text)

  def finish(self, ids: np.ndarray) -> tuple[list[list[int]], list[str]]:
    """Sends what is left, and returns the tokens and texts of all rows."""
    tokens, texts = [], []
    for row, line in enumerate(ids):
      own = [int(i) for i in line if i >= 0]
      if self._decode_text is not None and self._cut[row] is None:
        self._look_at(row, own, last=True)
      count, text = self._cut[row] or (len(own), self._decode(row, own))
      tokens.append(own[:count])
      texts.append(text)
    return tokens, texts


def continuation(decode_text: DecodeText, prompt: Sequence[int], ids: Sequence[int]) -> str:
  """The text that ids add to a prompt: what both have, decoded together, behind that of the prompt.

  Decoders of the SentencePiece kind leave out the space before the first word of what they decode,
  so ids alone would lose it. A character whose first bytes end the prompt is of the continuation.
  """
  before = list(prompt[-_CONTEXT:])
  known, whole = decode_text(before), decode_text([*before, *ids])
  if not whole.startswith(known):
    known = known.rstrip(_UNFINISHED)
  return whole[len(known) :] if whole.startswith(known) else decode_text(list(ids))


def _first(text: str, stop: Sequence[str]) -> int | None:
  """Where the first of the strings begins in the text; None without any."""
  return min((at for s in stop if (at := text.find(s)) >= 0), default=None)


def generate(
  cfg: schema.ModelConfig,
  variables: trees.Variables,
  prompts: Sequence[Sequence[int]],
  max_new_tokens: int,
  eos_ids: Sequence[int],
  sampling: sampling_lib.Sampling,
  **options: Any,
) -> Generation:
  """`Generator.generate` of a model that is used once; `options` are its keyword arguments."""
  padded(cfg, prompts, max_new_tokens)  # mistakes show before any weight is copied
  generator = Generator(cfg, variables, eos_ids)
  return generator.generate(prompts, max_new_tokens, sampling, **options)
