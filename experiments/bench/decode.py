"""Decoding: prefill, time per token over batch and context, and whole generation.

Latent attention stands beside multi-head attention of the same heads, and beside its dense twin. A
step of decoding is bound by memory: it has to read the weights that its tokens use and the caches
up to the context, which `harness.Peaks` turns into a time. Whole generation stands beside
transformers with the same weights and prompts, where that is installed.
"""

import dataclasses
import functools
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs import base, recipes
from experiments.bench import torch_generate, twins
from experiments.common import harness
from moe_jax.config import parse, schema
from moe_jax.devices import partitioning
from moe_jax.inference import cached_model, generate
from moe_jax.inference import sampling as sampling_lib
from moe_jax.interop import huggingface
from moe_jax.models import model_variables

Array = jax.Array
GREEDY = sampling_lib.Sampling(temperature=0.0)


@dataclasses.dataclass(frozen=True)
class Sizes:
  """What is measured on one platform."""

  shapes: Mapping[str, Mapping[str, Any]]  # by name, see `page`
  dtype: str
  points: tuple[tuple[int, int], ...]  # (batch, context) of prefill and steps
  batches: tuple[int, ...]  # of whole generation
  prompt: int = 64
  new: int = 192
  steps: int = 8  # per timed call
  prefill_tokens: int = 2**14  # of a batch; larger ones are not prefilled


# The size of configs/quickstart.py, a little less latent: what is trained on a laptop.
SMALL = dict(
  vocab_size=8192,
  hidden_size=256,
  intermediate_size=704,
  moe_intermediate_size=88,
  num_hidden_layers=6,
  first_k_dense_replace=1,
  num_attention_heads=4,
  num_key_value_heads=4,
  q_lora_rank=None,
  kv_lora_rank=64,
  qk_nope_head_dim=32,
  qk_rope_head_dim=16,
  v_head_dim=32,
  n_routed_experts=64,
  n_shared_experts=2,
  num_experts_per_tok=6,
  max_position_embeddings=1024,
)
MEDIUM = SMALL | dict(
  hidden_size=512,
  intermediate_size=1408,
  moe_intermediate_size=176,
  num_hidden_layers=8,
  num_attention_heads=8,
  num_key_value_heads=8,
  kv_lora_rank=128,
  qk_nope_head_dim=64,
  qk_rope_head_dim=32,
  v_head_dim=64,
)
# A sixth of the layers of DeepSeek-V2-Lite: 3.2 B weights.
LITE = MEDIUM | dict(
  vocab_size=102400,
  hidden_size=2048,
  intermediate_size=10944,
  moe_intermediate_size=1408,
  num_hidden_layers=6,
  num_attention_heads=16,
  num_key_value_heads=16,
  kv_lora_rank=512,
  qk_nope_head_dim=128,
  qk_rope_head_dim=64,
  v_head_dim=128,
  max_position_embeddings=16384,
)
CPU = Sizes(
  shapes={'small': SMALL, 'medium': MEDIUM},
  dtype='float32',
  points=((1, 64), (1, 1024), (8, 64), (8, 1024)),
  batches=(1, 8),
)
GPU = Sizes(
  shapes={'lite': LITE},
  dtype='bfloat16',
  points=((1, 1024), (8, 1024), (64, 8192), (256, 8192)),
  batches=(1, 8, 64),
)


def run(
  options: harness.Options, peaks: harness.Peaks, sizes: Sizes | None = None
) -> list[harness.Result]:
  """Measures what was asked for.

  Args:
    options: of the command.
    peaks: of this run.
    sizes: None takes those of the platform.

  Returns:
    Results; `detail` holds tokens per second, bytes of cache per token, and for transformers the
    share of equal tokens.
  """
  if sizes is None:
    sizes = CPU if jax.default_backend() == 'cpu' else GPU
  results = []
  for name, shape in sizes.shapes.items():
    for group in (_points, _generation):
      for programs in group(name, shape, sizes, options):
        found = harness.measure('decode', programs, options.repeats, peaks)
        results += [_with_rate(r, p) for r, p in zip(found, programs)]
  return results


def page(shape: Mapping[str, Any], attention: str, dtype: str, length: int) -> schema.Config:
  """The config of a shape of transformers' DeepSeek-V2 in our words.

  Args:
    shape: its settings.
    attention: 'mla', or 'mha': as many heads, as wide as the unrotated part of latent attention's.
    dtype: of weights and computation.
    length: longest context.
  """
  c = base.get_config()
  m = c.model
  m.vocab_size, m.max_seq_len = shape['vocab_size'], length
  m.embed_dim, m.mlp_dim = shape['hidden_size'], shape['intermediate_size']
  m.num_layers, m.num_dense_layers = shape['num_hidden_layers'], shape['first_k_dense_replace']
  m.num_heads = m.attention.num_kv_heads = shape['num_attention_heads']
  m.dtype = m.param_dtype = dtype
  m.moe.num_experts, m.moe.num_shared_experts = shape['n_routed_experts'], shape['n_shared_experts']
  m.moe.num_experts_per_tok = shape['num_experts_per_tok']
  m.moe.moe_mlp_dim = shape['moe_intermediate_size']
  m.attention.head_dim = shape['qk_nope_head_dim']
  if attention == 'mla':
    recipes.latent_attention(c, q_lora_rank=shape['q_lora_rank'] or 0)
    for key in ('kv_lora_rank', 'qk_nope_head_dim', 'qk_rope_head_dim', 'v_head_dim'):
      m.attention.mla[key] = shape[key]
  return parse.from_dict(c.to_dict())


def _points(
  name: str, shape: Mapping[str, Any], sizes: Sizes, options: harness.Options
) -> Iterator[list[harness.Program]]:
  """Prefill and steps; the models are made one after the other, of one group at a time."""
  for batch, context in sizes.points:
    for kind in ('prefill', 'step'):
      label = f'{kind} {name}, batch {batch}, context {context}'
      too_long = kind == 'prefill' and batch * context > sizes.prefill_tokens
      variants = [v for v in ('mla', 'mha') if options.wants(label, v)]
      if not variants or too_long:
        continue
      length = generate.in_buckets(context + sizes.steps)
      cfgs = {v: page(shape, v, sizes.dtype, length) for v in variants}
      like = page(shape, 'mla', sizes.dtype, length)
      cfgs['dense twin'] = twins.dense_twin(like)
      make = _prefill if kind == 'prefill' else _step
      yield [make(label, v, c.model, batch, context, sizes) for v, c in cfgs.items()]


def _weights(cfg: schema.ModelConfig) -> cached_model.Weights:
  """Random ones; on a GPU their stacks are gone before the first step."""
  variables = jax.jit(lambda: partitioning.unbox(model_variables.init(cfg, jax.random.key(0))))()
  return cached_model.unstack(cfg, variables)


def _tokens(cfg: schema.ModelConfig, batch: int, length: int, number: int) -> np.ndarray:
  return np.random.default_rng(number).integers(2, cfg.vocab_size, (batch, length), np.int32)


def _role(variant: str) -> str:
  return 'dense' if variant == 'dense twin' else ''


def _prefill(
  label: str, variant: str, cfg: schema.ModelConfig, batch: int, context: int, sizes: Sizes
) -> harness.Program:
  del sizes
  weights, slots = _weights(cfg), generate.in_buckets(context)

  @jax.jit
  def fill(weights: cached_model.Weights, tokens: Array) -> tuple[Array, cached_model.Caches]:
    length = jnp.full((batch,), context, jnp.int32)
    hidden, caches, _ = cached_model.prefill(cfg, weights, tokens, length, slots)
    return cached_model.logits_of(cfg, weights, hidden[:, -1:]), caches

  compiled = fill.lower(weights, _tokens(cfg, batch, context, 0)).compile()
  return harness.Program(
    label,
    variant,
    lambda number: compiled(weights, _tokens(cfg, batch, context, number)),
    role=_role(variant),
    flops=batch * context * 2.0 * _used_weights(cfg, 1, head=False),
    peak_bytes=harness.temporaries(compiled),
    detail={'tokens': batch * context, 'cache_bytes_per_token': cache_bytes(cfg)},
  )


def _step(
  label: str, variant: str, cfg: schema.ModelConfig, batch: int, context: int, sizes: Sizes
) -> harness.Program:
  """`sizes.steps` steps in one program behind a cache of random entries."""
  weights, slots = _weights(cfg), generate.in_buckets(context + sizes.steps)
  caches = _random_caches(cfg, weights, batch, slots)
  advance = functools.partial(_advance, cfg=cfg, context=context, steps=sizes.steps)
  compiled = (
    jax.jit(advance, donate_argnums=2).lower(weights, _tokens(cfg, batch, 1, 0), caches).compile()
  )
  held = [caches]  # donated by every call, which writes the same slots anew

  def call(number: int) -> Array:
    token, held[0] = compiled(weights, _tokens(cfg, batch, 1, number), held[0])
    return token

  read = step_bytes(cfg, batch, context)
  return harness.Program(
    label,
    variant,
    call,
    role=_role(variant),
    bytes=float(sizes.steps * read),
    peak_bytes=harness.temporaries(compiled),
    detail={
      'tokens': sizes.steps * batch,
      'bytes_per_step': read,
      'cache_bytes_per_token': cache_bytes(cfg),
    },
  )


def _advance(
  weights: cached_model.Weights,
  token: Array,
  caches: cached_model.Caches,
  *,
  cfg: schema.ModelConfig,
  context: int,
  steps: int,
) -> tuple[Array, cached_model.Caches]:
  """(the last token [B, 1], caches) after greedy steps from position `context` on."""

  def body(i: Array, state: tuple[Array, cached_model.Caches]) -> tuple[Array, cached_model.Caches]:
    token, caches = state
    at = jnp.full_like(token, context) + i
    out = cached_model.step(cfg, weights, token, at, caches)
    logits = cached_model.logits_of(cfg, weights, out.hidden)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), out.caches

  return jax.lax.fori_loop(0, steps, body, (token, caches))


def _random_caches(
  cfg: schema.ModelConfig, weights: cached_model.Weights, batch: int, slots: int
) -> cached_model.Caches:
  def fill(w, t, n):
    return cached_model.prefill(cfg, w, t, n, slots).caches

  one = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
  shapes = jax.eval_shape(fill, weights, one, jax.ShapeDtypeStruct((batch,), jnp.int32))
  leaves, tree = jax.tree.flatten(shapes)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  return tree.unflatten([jax.random.normal(k, a.shape, a.dtype) for k, a in zip(keys, leaves)])


def cache_bytes(cfg: schema.ModelConfig) -> int:
  """Bytes that the caches of all layers hold per token."""
  a = cfg.attention
  if a.kind == 'mla':
    width = a.mla.kv_lora_rank + a.mla.qk_rope_head_dim
  else:
    width = 2 * a.num_kv_heads * a.head_dim
  return cfg.num_layers * width * jnp.dtype(cfg.dtype).itemsize


def step_bytes(cfg: schema.ModelConfig, batch: int, context: int) -> int:
  """Bytes that a step has to read: weights in use, and the caches up to the context.

  An expert's weights count once however many tokens choose it; the number of experts in use is its
  mean if every choice were as likely.
  """
  weights = _used_weights(cfg, batch) * jnp.dtype(cfg.dtype).itemsize
  return round(weights + batch * context * cache_bytes(cfg))


def _used_weights(cfg: schema.ModelConfig, batch: int, head: bool = True) -> float:
  """Weights that a step with `batch` tokens multiplies with."""
  params, total = model_variables.abstract_params(cfg), 0.0
  for path, leaf in jax.tree.leaves_with_path(params):
    names = [entry.key for entry in path]
    if names[0] in ('embedding', 'mtp_layers') or (names[0] == 'head' and not head):
      continue
    share = 1.0
    if names[-2:] in (['moe', 'gate_up'], ['moe', 'down']):
      missed = 1 - cfg.moe.num_experts_per_tok / cfg.moe.num_experts
      share = 1 - missed**batch
    total += share * leaf.size
  return total


def _generation(
  name: str, shape: Mapping[str, Any], sizes: Sizes, options: harness.Options
) -> Iterator[list[harness.Program]]:
  """Whole texts, beside transformers where it is asked for and installed."""
  with_theirs = options.transformers and all(map(importlib.util.find_spec, torch_generate.NEEDS))
  ready: Callable[[], tuple[Any, generate.Generator, schema.ModelConfig]]
  ready = functools.cache(lambda: _models(shape, sizes, with_theirs))
  for batch in sizes.batches:
    label = f'generation {name}, batch {batch}, {sizes.prompt} + {sizes.new} tokens'
    if not options.wants(label, 'moe_jax'):
      continue
    model, generator, cfg = ready()
    prompts = _tokens(cfg, batch, sizes.prompt, 0)
    ours = _writer(generator, sizes.new)
    read = sum(step_bytes(cfg, batch, sizes.prompt + i) for i in range(sizes.new))
    detail = {'tokens': batch * sizes.new, 'cache_bytes_per_token': cache_bytes(cfg)}
    fresh = functools.partial(_tokens, cfg, batch, sizes.prompt)
    theirs = model and torch_generate.writer(model, sizes.new)
    if theirs:
      detail['same_tokens'] = float((ours(prompts) == theirs(prompts)).mean())
    programs = [
      harness.Program(
        label, 'moe_jax', lambda n, f=fresh, o=ours: o(f(n)), bytes=float(read), detail=detail
      )
    ]
    if theirs:

      def run_theirs(n, f=fresh, t=theirs):
        return t(f(n))

      programs.append(
        harness.Program(label, 'transformers', run_theirs, role='transformers', detail=detail)
      )
    yield programs


def _models(
  shape: Mapping[str, Any], sizes: Sizes, with_theirs: bool
) -> tuple[Any, generate.Generator, schema.ModelConfig]:
  """(transformers' model or None, ours with the same weights, its config)."""
  if not with_theirs:
    length = generate.in_buckets(sizes.prompt + sizes.new)
    cfg = page(shape, 'mla', sizes.dtype, length).model
    variables = jax.jit(lambda: partitioning.unbox(model_variables.init(cfg, jax.random.key(0))))()
    return None, generate.Generator(cfg, variables, ()), cfg
  with tempfile.TemporaryDirectory() as directory:
    model = torch_generate.make_model(shape, sizes.dtype, directory, os.cpu_count())
    cfg, variables = huggingface.load_variables(directory, base.get_config().to_dict())
  return model, generate.Generator(cfg.model, variables, ()), cfg.model


def _writer(generator: generate.Generator, num_new: int) -> Callable[[np.ndarray], np.ndarray]:
  return lambda prompts: np.array(generator.generate(prompts.tolist(), num_new, GREEDY).tokens)


def _with_rate(result: harness.Result, program: harness.Program) -> harness.Result:
  rate = program.detail['tokens'] / result.seconds_median
  return dataclasses.replace(result, detail=result.detail | {'tokens_per_second': rate})
