"""A model with its tokenizer and its text, from Python: logits, text, routing, held-out figures.

Letters: B texts, L tokens of a text, V vocabulary, K experts per token, E experts; `layers` are the
MoE layers.
"""

import dataclasses
import functools
import os
import pathlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import errors, trees
from moe_jax.config import schema
from moe_jax.data import chat_formats, conversations
from moe_jax.data import corpus as corpus_lib
from moe_jax.data import tokenizer as tokenizer_lib
from moe_jax.devices import partitioning
from moe_jax.inference import generate as generate_lib
from moe_jax.inference import processors as processors_lib
from moe_jax.inference import sampling as sampling_lib
from moe_jax.models import transformer
from moe_jax.planning import flops
from moe_jax.post_training import adapters
from moe_jax.runs import trained_run
from moe_jax.training import evaluate as evaluate_lib

Array = jax.Array
Ids = Sequence[int] | Sequence[Sequence[int]] | np.ndarray | Array

_TEXTS_TOGETHER = 32  # that are embedded
_INPUTS = ('tokens', 'positions', 'segment_ids')


@dataclasses.dataclass(frozen=True)
class Routing:
  """Which experts the tokens of a text were sent to, outside of training."""

  tokens: list[str]  # L, each decoded for itself; the first is the begin-of-document token
  experts: np.ndarray  # [layers, L, K] int32, best first; E = no expert
  gates: np.ndarray  # [layers, L, K] float32, weights of the experts' outputs
  load: np.ndarray  # [layers, E] int64, tokens per expert


class Run:
  """A trained or downloaded model on the devices that are here; see `load` and `train`.

  Attributes:
    config: its whole configuration.
    variables: {'params', 'router_state'}, nested dicts of arrays on `mesh`.
    tokenizer: text to ids and back.
    mesh: the devices, all along `data`.
    step: optimizer steps done.
    directory: where it was read from, or trained.
    interrupted_by: name of the signal that ended its training early, or ''.
  """

  def __init__(self, trained: trained_run.Run, directory: str | os.PathLike[str]):
    """Wraps what `trained_run.load`, `huggingface.load` or `train_run.run_training` return."""
    self.trained = trained
    self.directory = pathlib.Path(directory)
    self.config: schema.Config = trained.cfg
    self.variables: trees.Variables = trained.variables
    self.tokenizer: tokenizer_lib.Tokenizer = trained.tokenizer
    self.mesh: jax.sharding.Mesh = trained.mesh
    self.step: int = trained.step
    self.interrupted_by: str = trained.interrupted_by

  def __repr__(self) -> str:
    size = flops.count_parameters(self.config.model).total
    return f'moe_jax.Run({str(self.directory)!r}, step={self.step}, {size:,} parameters)'

  def with_adapter(self, directory: str | os.PathLike[str]) -> 'Run':
    """The model with the tuned experts of an adapter, see `experiments.esft extract`.

        sums, code = (run.with_adapter(path) for path in ('adapters/sums', 'adapters/code'))

    All else is shared in memory with this run, which stays as it is.

    Raises:
      errors.InputError: it is the adapter of another model, or not whole.
    """
    return Run(adapters.applied(self.trained, directory), self.directory)

  def encode(self, text: str, *, special_tokens: bool = False) -> list[int]:
    """Ids of a text as the model reads it, begin-of-document token first.

    Args:
      text: a text. The spelling of a special token in it is ordinary text, as in training.
      special_tokens: it is that token instead.

    Raises:
      errors.InputError: it is no UTF-8 text.
    """
    return trained_run.encode_prompt(self.trained, text, special_tokens=special_tokens)

  @overload
  def logits(self, text: str | Ids) -> Array: ...
  @overload
  def logits(self, text: Sequence[str]) -> list[Array]: ...

  def logits(self, text: str | Ids | Sequence[str]) -> Array | list[Array]:
    """Logits of the next token after each token.

        run.logits('The theory of relativity').argmax(-1)

    Args:
      text: a text; or ids [L] or [B, L] int, as they are (`encode` makes such); or several texts.

    Returns:
      [L, V] float32 for a text or ids [L], where L counts the begin-of-document token of a text;
      [B, L, V] for ids [B, L]; a list of [L, V] for several texts.

    Raises:
      errors.InputError: nothing to read, more tokens than `model.max_seq_len`, or an unknown id.
    """
    rows, shape = self._rows(text)
    batch = _padded(rows, self.config.model.max_seq_len, self.mesh)
    found = self._apply(_logits, batch)
    if shape is not None:
      return found[: len(rows), : len(rows[0])].reshape(*shape, -1)
    return [found[i, : len(row)] for i, row in enumerate(rows)]

  def embed(self, texts: str | Sequence[str]) -> np.ndarray:
    """A vector per text: the mean over its tokens of the last layer's normed output.

        vectors = run.embed(['def f(x): ...', 'class A: ...'])

    Args:
      texts: each is read alone, in batches of texts of similar length; one text is a batch of one.

    Returns:
      [B, D] float32.

    Raises:
      errors.InputError: see `logits`.
    """
    rows = self._encoded([texts] if isinstance(texts, str) else texts, 'texts')
    self._check(rows)
    found = np.zeros((len(rows), self.config.model.embed_dim), np.float32)
    order = np.argsort([len(row) for row in rows], kind='stable')
    for begin in range(0, len(rows), _TEXTS_TOGETHER):
      places = order[begin : begin + _TEXTS_TOGETHER]
      filled = [*places, *[places[0]] * (_TEXTS_TOGETHER - len(places))]  # one program for all
      batch = _padded([rows[i] for i in filled], self.config.model.max_seq_len, self.mesh)
      found[places] = np.asarray(self._apply(_means, batch))[: len(places)]
    return found

  def generate(
    self,
    prompts: str | Sequence[str] | Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: str | Sequence[str] = (),
    stop_ids: Sequence[int] = (),
    special_tokens: bool = False,
    seed: int = 0,
    on_text: generate_lib.OnText | None = None,
  ) -> list[str]:
    """Continues prompts as one batch; returns the new text of each.

        run.generate(['def main('], max_new_tokens=64, temperature=0)

    The first call lays the weights out for decoding and keeps that copy, which costs the memory of
    the model once more.

    Args:
      prompts: texts, or token ids with the begin-of-document token; one text is a batch of one.
      max_new_tokens: limit per prompt.
      temperature: 0 takes the most likely token.
      top_k: draw among the k most likely tokens; 0 is all.
      top_p: draw among the fewest tokens whose probabilities reach p.
      min_p: draw among tokens at least this times as likely as the likeliest.
      repetition_penalty: makes tokens that stand there less likely; 1 is off.
      stop: strings that end a continuation, and are cut off it.
      stop_ids: token ids that end a continuation, beside those of the tokenizer (`end_ids`).
      special_tokens: see `encode`; without it, one that is spelled in a prompt is warned of.
      seed: decides the draws.
      on_text: called with (number of the prompt, further text) while text is written.

    Raises:
      errors.InputError: an empty or too long prompt, a value out of its range, or a router that
        cannot write one token after the other.
    """
    sampling = sampling_lib.Sampling(
      temperature=temperature,
      top_k=top_k,
      top_p=top_p,
      seed=seed,
      min_p=min_p,
      repetition_penalty=repetition_penalty,
    )
    batch = [prompts] if isinstance(prompts, str) else prompts
    ids = [
      self._prompt(one, special_tokens) if isinstance(one, str) else list(one) for one in batch
    ]
    stop = (stop,) if isinstance(stop, str) else stop
    return self.complete(
      ids, max_new_tokens, sampling, stop=stop, stop_ids=stop_ids, on_text=on_text
    ).texts

  def _prompt(self, text: str, special_tokens: bool) -> list[int]:
    spelled = [] if special_tokens else self.tokenizer.special_tokens_in(text)
    if spelled:
      warnings.warn(
        f'the prompt spells {", ".join(spelled)}, read as ordinary characters, as in training; '
        'special_tokens=True reads it as the token',
        stacklevel=3,
      )
    return self.encode(text, special_tokens=special_tokens)

  def chat(
    self,
    messages: str | Sequence[Mapping[str, Any]],
    max_new_tokens: int = 64,
    *,
    chat_format: str = '',
    **options: Any,
  ) -> str:
    """The answer to the last question of a conversation.

        run.chat('What is 7 + 5?', temperature=0)
        run.chat([{'role': 'system', 'content': '...'}, {'role': 'user', 'content': '...'}])

    Args:
      messages: a question, or turns that end with one, as `data.source='conversations'` has them.
      max_new_tokens: limit of the answer.
      chat_format: one of `schema.CHAT_FORMATS`; '' is `data.chat_format` of the run.
      **options: of `generate`.

    Raises:
      errors.InputError: the turns are of another form, or see `generate`.
    """
    data, prompts = self._chat_data(chat_format), self.encode_chats([messages], chat_format)
    return chat_formats.said(data, self.generate(prompts, max_new_tokens, **options)[0])

  def encode_chats(
    self, batch: Sequence[str | Sequence[Mapping[str, Any]]], chat_format: str = ''
  ) -> list[list[int]]:
    """Ids of each conversation up to where the answer to its last question begins.

    Args:
      batch: conversations, each in the form of `chat`.
      chat_format: as of `chat`.

    Raises:
      errors.InputError: see `chat`.
    """
    turns = [[{'role': 'user', 'content': m}] if isinstance(m, str) else m for m in batch]
    try:
      asked = [conversations.from_messages(messages, for_prompt=True) for messages in turns]
    except ValueError as e:
      raise errors.InputError(f'messages: {e}; correct them') from e
    return chat_formats.prompts(self._chat_data(chat_format), asked, self.tokenizer)

  def _chat_data(self, chat_format: str) -> schema.DataConfig:
    data = self.config.data
    name = chat_format or data.chat_format
    errors.choice('data.chat_format', name, schema.CHAT_FORMATS)
    return dataclasses.replace(data, chat_format=name)

  def complete(
    self,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: sampling_lib.Sampling,
    *,
    stop: Sequence[str] = (),
    stop_ids: Sequence[int] = (),
    on_text: generate_lib.OnText | None = None,
    processors: Sequence[processors_lib.Processor] = (),
    timed: bool = False,
  ) -> generate_lib.Generation:
    """`generate` of token ids, with the new ids and the time taken beside the texts.

    Args:
      prompts: token ids with the begin-of-document token.
      max_new_tokens: limit per prompt.
      sampling: how tokens are drawn.
      stop: see `generate`.
      stop_ids: see `generate`.
      on_text: see `generate`.
      processors: what changes logits before the draw, made for this batch.
      timed: compile before the clock starts.

    Raises:
      errors.InputError: see `generate`.
    """
    # Mistakes show before any weight is copied.
    generate_lib.padded(self.config.model, prompts, max_new_tokens)
    return self._generator.generate(
      prompts,
      max_new_tokens,
      sampling,
      decode_text=self.tokenizer.decode,
      stop=stop,
      stop_ids=stop_ids,
      on_text=on_text,
      processors=processors,
      timed=timed,
    )

  def routing(self, text: str | Ids) -> Routing:
    """Which experts every token of a text is sent to.

        found = run.routing('some text')
        print(found.tokens[1], found.experts[0, 1], found.gates[0, 1])

    Args:
      text: a text, or ids [L].

    Raises:
      errors.InputError: a dense model, or see `logits`.
    """
    errors.require(
      self.config.model.is_moe,
      'config.model.moe.num_experts=0: this is a dense model, which routes nothing; load an MoE '
      'model',
    )
    rows, shape = self._rows(text)
    errors.require(
      shape is not None and len(shape) == 1, 'routing reads one text, or ids [L]; call it for each'
    )
    (row,) = rows
    batch = _padded(rows, self.config.model.max_seq_len, self.mesh)
    experts, gates = (np.asarray(a)[:, 0, : len(row)] for a in self._apply(_routing, batch))
    num_experts = self.config.model.moe.num_experts
    load = [np.bincount(layer.ravel(), minlength=num_experts + 1)[:-1] for layer in experts]
    words = [self.tokenizer.decode([i], skip_special_tokens=False) for i in row.tolist()]
    return Routing(words, experts, gates, np.stack(load))

  def evaluate(
    self, corpus: corpus_lib.Corpus | None = None, *, progress: bool = True
  ) -> evaluate_lib.Evaluation:
    """Held-out loss, bits per byte and expert load; printed, it is what the command prints.

        print(run.evaluate())

    Args:
      corpus: its held-out split is read; None for that of the config, see `heldout_corpus`.
      progress: show a bar.

    Raises:
      errors.InputError: the text at `data.path` cannot be read.
    """
    corpus = self.heldout_corpus() if corpus is None else corpus
    return evaluate_lib.evaluate(
      self.config, self.trained.variables, corpus, self.mesh, progress=progress
    )

  def heldout_corpus(self, warn: Callable[[str], None] = warnings.warn) -> corpus_lib.Corpus:
    """The text of `config.data`, read with the run's own tokenizer.

    Args:
      warn: is told if that is no longer the text it was trained on.

    Raises:
      errors.InputError: it cannot be read.
    """
    return trained_run.heldout_corpus(self.trained, self.directory, warn)

  @functools.cached_property
  def _generator(self) -> generate_lib.Generator:
    return generate_lib.Generator(self.config.model, self.variables, self.tokenizer.end_ids)

  def _apply(self, function: Callable[..., Any], batch: trees.HostBatch) -> Any:
    with partitioning.activate(self.mesh):
      put = partitioning.put_global_batch(batch, self.mesh)
      return function(self.config.model, self.variables, put)

  def _rows(self, text: str | Sequence[str] | Ids) -> tuple[list[np.ndarray], tuple | None]:
    """Ids of every row, and the shape that they have together; None for several texts."""
    if isinstance(text, str):
      text = np.asarray(self.encode(text), np.int32)
    elif not isinstance(text, (np.ndarray, Array)) and any(isinstance(one, str) for one in text):
      rows = self._encoded(text, 'text')
      self._check(rows)
      return rows, None
    ids = _integers(text)
    rows = list(ids.reshape(-1, ids.shape[-1]))
    self._check(rows)
    return rows, ids.shape

  def _encoded(self, texts: Sequence[Any], name: str) -> list[np.ndarray]:
    """Ids of every text; `name` is the argument that holds them."""
    for i, one in enumerate(texts):
      errors.require(
        isinstance(one, str),
        f'{name}[{i}]={one!r} must be a text as the others are: give texts alone, or to `logits` '
        'ids alone, which `encode` makes of a text',
      )
    return [np.asarray(self.encode(one), np.int32) for one in texts]

  def _check(self, rows: Sequence[np.ndarray]):
    model = self.config.model
    for row in rows:
      errors.require(
        0 < len(row) <= model.max_seq_len,
        f'the text has {len(row)} tokens, but must have 1 to model.max_seq_len='
        f'{model.max_seq_len}; cut it',
      )
      generate_lib.check_ids(model, row, 'ids')


def _integers(ids: Any) -> np.ndarray:
  """ids [L] or [B, L] as an array.

  Raises:
    errors.InputError: they are something else.
  """
  try:
    found = np.asarray(ids)
  except ValueError as e:
    raise errors.InputError(f'ids must all be of one length, [B, L] ({e}); pad or cut them') from e
  errors.require(
    found.ndim in (1, 2) and found.size > 0 and np.issubdtype(found.dtype, np.integer),
    f'ids must be integers [L] or [B, L], not {found.dtype} {list(found.shape)}; give a text, or '
    'what `encode` returns',
  )
  return found


def _padded(
  rows: Sequence[np.ndarray], max_seq_len: int, mesh: jax.sharding.Mesh
) -> dict[str, np.ndarray]:
  """Rows as a batch that few shapes suffice for, which the devices can share evenly."""
  width = min(generate_lib.in_buckets(max(map(len, rows))), max_seq_len)
  num_rows = len(rows) + -len(rows) % partitioning.row_ways(mesh)
  tokens = np.zeros((num_rows, width), np.int32)
  segment_ids = np.zeros_like(tokens)
  for i, row in enumerate(rows):
    tokens[i, : len(row)], segment_ids[i, : len(row)] = row, 1
  positions = np.broadcast_to(np.arange(width, dtype=np.int32), tokens.shape)
  return {'tokens': tokens, 'positions': positions, 'segment_ids': segment_ids}


@functools.partial(jax.jit, static_argnums=0)
def _logits(model: schema.ModelConfig, variables: trees.Variables, batch: trees.Batch) -> Array:
  out: Any = transformer.Transformer(model).apply(variables, *(batch[key] for key in _INPUTS))
  return out.logits


@functools.partial(jax.jit, static_argnums=0)
def _means(model: schema.ModelConfig, variables: trees.Variables, batch: trees.Batch) -> Array:
  """[B, D] float32, padding not counted."""
  out: Any = transformer.Transformer(model).apply(variables, *(batch[key] for key in _INPUTS))
  real = (batch['segment_ids'] > 0)[..., None]
  return (out.normed.astype(jnp.float32) * real).sum(axis=1) / real.sum(axis=1)


@functools.partial(jax.jit, static_argnums=0)
def _routing(
  model: schema.ModelConfig, variables: trees.Variables, batch: trees.Batch
) -> tuple[Array, Array]:
  """Experts and gates, [layers, B, L, K]."""
  sown: Any = transformer.Transformer(model).apply(
    variables, *(batch[key] for key in _INPUTS), mutable=['intermediates']
  )
  found = sown[1]['intermediates']['moe_layers']['moe']
  return found['expert_idx'][0], found['gates'][0]
