"""A layer of experts, whole train steps and generation on a GPU."""

import dataclasses
import functools
import importlib.util
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs import deepseek_v2_lite, deepseekmoe_2b, deepseekmoe_tiny
from experiments.bench import gpu_kernels, gpu_sizes, gpu_torch, step
from experiments.common import harness, stepper
from moe_jax.config import parse, schema
from moe_jax.devices import partitioning
from moe_jax.inference import cached_model
from moe_jax.models import layers, model_variables
from moe_jax.models.dispatch import dropless
from moe_jax.planning import flops, profile

Array = jax.Array
REMATS = ('none', 'moe_core', 'full')
CONTEXT = 4096  # tokens in the caches of the generation part
GENERATING_LAYERS = 6  # of V2-Lite's 27: batches are limited by caches, not by weights
CACHE_SHARE = 0.5  # of the device's memory that caches may fill


def layer(sizes: gpu_sizes.Sizes, peaks: harness.Peaks) -> Iterator[dict[str, Any]]:
  """Routed and shared experts, forward and with backward, beside a dense FFN of equal FLOPs.

  The router is left out on both sides: who goes where is the input, one case of routing each.
  """
  t, d, f, k = sizes.tokens, sizes.embed_dim, sizes.mlp_dim, sizes.k
  width = (k + sizes.num_shared) * f
  forward_flops = 6.0 * t * d * width
  dense = gpu_kernels.normal(1, d, 2, width) / d**0.5, gpu_kernels.normal(2, width, d) / width**0.5
  experts = _layer_weights(sizes)
  inputs = {case: _layer_inputs(sizes, case) for case in sizes.routings}
  for name, wrap, factor in (('layer forward', _forward, 1), ('layer fwd + bwd', _both, 3)):
    about = dict(flops=factor * forward_flops)
    programs = []
    for case, some in inputs.items():
      args = [(*one, *experts) for one in some]
      programs.append(gpu_kernels.prepare(name, case, wrap(_experts), args, sizes, **about))
    args = [(x, d_out, *dense) for x, d_out, _, _ in inputs['balanced']]
    twin = gpu_kernels.prepare(name, 'dense', wrap(_dense), args, sizes, role='dense', **about)
    programs.append(twin)
    if importlib.util.find_spec('transformers') and importlib.util.find_spec('torch'):
      theirs = functools.partial(gpu_torch.layer, name, factor > 1, sizes, about['flops'])
      programs += [theirs] if gpu_torch.runs(sizes) else []
    yield from gpu_kernels.measured(programs, sizes, peaks)


def layer_profile(sizes: gpu_sizes.Sizes, unused_peaks: harness.Peaks) -> Iterator[dict[str, Any]]:
  """Seconds of a layer's forward and backward by named scope, for each routing."""
  weights = _layer_weights(sizes)
  for case in sizes.routings:
    args = (*_layer_inputs(sizes, case)[0], *weights)
    compiled = jax.jit(_both(_experts)).lower(*args).compile()
    jax.block_until_ready(compiled(*args))
    with tempfile.TemporaryDirectory() as directory:
      with jax.profiler.trace(directory):
        jax.block_until_ready([compiled(*args) for _ in range(sizes.launches)])
      seconds = profile.seconds(directory, compiled.as_text())
    per_call = {scope: s / sizes.launches for scope, s in seconds.items() if s}
    yield {'name': 'layer fwd + bwd', 'variant': case, 'seconds_by_scope': per_call}


def _layer_weights(sizes: gpu_sizes.Sizes) -> tuple[Array, ...]:
  """Routed gate_up and down, shared gate_up and down."""
  d, f, e, width = (
    sizes.embed_dim,
    sizes.mlp_dim,
    sizes.num_experts,
    sizes.num_shared * sizes.mlp_dim,
  )
  return (
    gpu_kernels.normal(3, e, d, 2, f) / d**0.5,
    gpu_kernels.normal(4, e, f, d) / f**0.5,
    gpu_kernels.normal(5, d, 2, width) / d**0.5,
    gpu_kernels.normal(6, width, d) / width**0.5,
  )


def _layer_inputs(sizes: gpu_sizes.Sizes, case: str) -> list[tuple]:
  """(x, d_out, gates, expert_idx) several times."""
  t, d, e, k = sizes.tokens, sizes.embed_dim, sizes.num_experts, sizes.k
  found = []
  for seed in range(gpu_kernels.INPUTS):
    x, d_out = gpu_kernels.normal(seed, t, d), gpu_kernels.normal(seed + 50, t, d)
    gates = jax.random.uniform(jax.random.key(seed), (t, k))
    found.append((x, d_out, gates, jnp.asarray(gpu_sizes.routing(case, t, e, k, seed))))
  return found


def _ffn(x: Array, gate_up: Array, down: Array) -> Array:
  h = layers.swiglu(jnp.einsum('TD,DGF->TGF', x, gate_up).astype(jnp.float32))
  return h.astype(x.dtype) @ down


def _dense(x, gate_up, down):
  return _ffn(x, gate_up, down)


def _experts(x, gates, idx, gate_up, down, shared_gate_up, shared_down):
  routed = dropless.dispatch(x, gates, idx, gate_up, down, 'auto', 0)
  return routed + _ffn(x, shared_gate_up, shared_down)


def _forward(fn):
  return lambda x, d_out, *rest: fn(x, *rest)


def _both(fn):
  """Gradients of everything of floats."""

  def run(x, d_out, *rest):
    floats = [i for i, a in enumerate(rest) if jnp.issubdtype(a.dtype, jnp.floating)]

    def apply(x, *some):
      given = dict(zip(floats, some))
      return fn(x, *(given.get(i, a) for i, a in enumerate(rest)))

    out, pullback = jax.vjp(apply, x, *(rest[i] for i in floats))
    return out, pullback(d_out)

  return run


def step_pages(sizes: gpu_sizes.Sizes) -> Iterator[tuple[str, schema.Config]]:
  """(policy, run): the 2B model with aligned experts by what backward keeps, or a tiny one."""
  for remat in REMATS if sizes.models else REMATS[1:2]:
    page = deepseekmoe_2b.get_config() if sizes.models else deepseekmoe_tiny.get_config()
    page.model.remat, page.model.dtype = remat, 'bfloat16'
    if sizes.models:
      page.model.moe.moe_mlp_dim = 896  # 853 suits no tile
      page.train.batch_size = 32
    else:
      page.model.num_layers, page.model.max_seq_len = 2, 32
      page.train.batch_size = max(2, jax.device_count())
    yield remat, parse.from_dict(page.to_dict())


def train_step(sizes: gpu_sizes.Sizes, peaks: harness.Peaks) -> Iterator[dict[str, Any]]:
  """Whole steps: tokens per second, MFU against both peaks, where the time goes."""
  kind = jax.devices()[0].device_kind
  for remat, cfg in step_pages(sizes):
    one = stepper.Stepper(cfg)
    needed = cfg.train.batch_size * flops.train_flops_per_sequence(cfg.model)
    program = harness.Program(
      '2B step' if sizes.models else 'tiny step',
      f'remat {remat}',
      one.run,
      flops=needed,
      peak_bytes=one.peak_bytes,
    )
    (result,) = harness.measure('gpu', [program], sizes.repeats, peaks)
    rate = needed / result.seconds_median
    detail = {'tokens_per_second': one.tokens / result.seconds_median, 'mfu': rate / peaks.flops}
    for name, peak in step.DATASHEET.items():
      if name in kind:
        detail['mfu_of_datasheet'] = rate / peak
    detail['shares'] = one.shares()
    yield dataclasses.replace(result, detail=detail).to_json()


def generation(sizes: gpu_sizes.Sizes, peaks: harness.Peaks) -> Iterator[dict[str, Any]]:
  """Tokens per second of MLA and of MHA, each with as many rows as its caches leave room for."""
  for kind in ('mla', 'gqa'):  # with as many key-value heads as heads: MHA
    cfg = parse.from_dict(_generating(sizes, kind).to_dict()).model
    yield _generate(cfg, 'MLA' if kind == 'mla' else 'MHA', sizes, peaks)


def _generating(sizes: gpu_sizes.Sizes, kind: str) -> Any:
  page = deepseek_v2_lite.get_config()
  page.model.attention.kind, page.model.dtype = kind, 'bfloat16'
  page.model.num_layers, page.model.param_dtype = GENERATING_LAYERS, 'bfloat16'
  if not sizes.models:
    page.model.num_layers, page.model.embed_dim, page.model.vocab_size = 2, 32, 64
    page.model.num_heads = page.model.attention.num_kv_heads = 2
    page.model.mlp_dim, page.model.moe.moe_mlp_dim, page.model.moe.num_experts = 32, 16, 8
  return page


def _generate(
  cfg: schema.ModelConfig, name: str, sizes: gpu_sizes.Sizes, peaks: harness.Peaks
) -> dict[str, Any]:
  context = CONTEXT if sizes.models else 32
  limit = CACHE_SHARE * (jax.devices()[0].memory_stats() or {}).get('bytes_limit', 2e6)
  variables = partitioning.unbox(model_variables.init(cfg, jax.random.key(0)))
  weights = jax.block_until_ready(cached_model.unstack(cfg, variables))
  del variables
  ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  lengths = jax.ShapeDtypeStruct((1,), jnp.int32)

  def fill(w, t, n):
    return cached_model.prefill(cfg, w, t, n, context).caches

  one = jax.eval_shape(fill, weights, ids, lengths)
  per_row = sum(int(np.prod(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(one))
  rows = max(1, int(limit // per_row))
  caches = jax.tree.map(lambda a: jnp.zeros((rows, *a.shape[1:]), a.dtype), one)

  def next_token(weights, tokens, positions, caches):
    out = cached_model.step(cfg, weights, tokens, positions, caches)
    return jnp.argmax(cached_model.logits_of(cfg, weights, out.hidden), axis=-1), out.caches

  tokens = jnp.ones((rows, 1), jnp.int32)
  positions = jnp.full((rows, 1), context - 1, jnp.int32)
  compiled = jax.jit(next_token, donate_argnums=3)
  compiled = compiled.lower(weights, tokens, positions, caches).compile()
  held = [tokens, caches]

  def run(unused_number: int) -> Any:
    held[:] = compiled(weights, held[0].reshape(rows, 1), positions, held[1])
    return held

  num_bytes = rows * per_row + sum(a.nbytes for a in jax.tree.leaves(weights))
  program = harness.Program(
    f'generation at {context} tokens of context',
    name,
    run,
    bytes=num_bytes,
    peak_bytes=harness.temporaries(compiled),
  )
  (result,) = harness.measure('gpu', [program], sizes.repeats, peaks)
  held.clear()  # the next model needs the room
  detail = {'rows': rows, 'cache_bytes_per_row': per_row}
  detail['tokens_per_second'] = rows / result.seconds_median
  return dataclasses.replace(result, detail=detail).to_json()


def decode_suite(sizes: gpu_sizes.Sizes, peaks: harness.Peaks) -> Iterator[dict[str, Any]]:
  """The suite of the main command, which chooses its sizes by the platform; not at toy sizes."""
  from experiments.bench import decode

  options = harness.Options(repeats=sizes.repeats, transformers=False)
  for result in decode.run(options, peaks) if sizes.models else ():
    yield result.to_json()
