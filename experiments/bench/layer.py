"""The MoE layer, router and statistics included, beside a dense FFN of the same activated FLOPs.

`run` measures `CASES` by every dispatch, forward and forward+backward (gradients of all weights and
of the input). The dense twin is one SwiGLU FFN of width (K + shared) F. Fresh inputs in every
round, and so other assignments of tokens to experts.
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import logging

from configs import base
from experiments.bench import torch_threads
from experiments.common import harness
from moe_jax.config import moe_config, parse
from moe_jax.devices import partitioning
from moe_jax.models import layers, moe_layer
from moe_jax.models.routers import routing

ROW = 512  # tokens of a row of the batch
NUM_INPUTS = 4
MOST_DENSE_EXPERTS = 16  # dispatch `dense` computes all experts for all tokens
PASSES = ('forward', 'forward+backward')


@dataclasses.dataclass(frozen=True)
class Case:
  """Sizes of a layer."""

  tokens: int  # T, rows of at most ROW of them
  embed: int  # D
  experts: int  # E
  width: int  # F, of one expert
  top_k: int  # K
  shared: int
  dtype: str = 'float32'

  @property
  def name(self) -> str:
    return (
      f'T{self.tokens} d{self.embed} E{self.experts} f{self.width} top-{self.top_k}+{self.shared}'
    )

  @property
  def shape(self) -> tuple[int, int, int]:
    row = min(self.tokens, ROW)
    return self.tokens // row, row, self.embed

  @property
  def activated(self) -> int:
    """Width of the dense twin."""
    return (self.top_k + self.shared) * self.width

  def flops(self, backward: bool) -> float:
    """Of the experts' products; the router's 1 % is left out, as the twin has none."""
    return (3 if backward else 1) * 6.0 * self.tokens * self.embed * self.activated

  @property
  def routed_bytes(self) -> int:
    """Of the activations of T K routed rows: in and out D wide, 2 F before SwiGLU, F behind it."""
    row = 2 * self.embed + 3 * self.width
    return self.tokens * self.top_k * row * jnp.dtype(self.dtype).itemsize


TARGET = Case(4096, 512, 64, 176, 6, 2)
CASES = (
  TARGET,
  # Experts, at equal activated width and K; all of the layer's weights grow.
  *(dataclasses.replace(TARGET, experts=e) for e in (8, 16, 128, 256)),
  # Granularity: the same activated width in fewer and in more experts.
  dataclasses.replace(TARGET, experts=16, width=704, top_k=2, shared=0),
  dataclasses.replace(TARGET, experts=128, width=88, top_k=14, shared=2),
  # Tokens and model width, down to the tiny page's.
  dataclasses.replace(TARGET, tokens=1024),
  dataclasses.replace(TARGET, tokens=16384),
  Case(2048, 256, 64, 88, 6, 2),
  Case(1024, 64, 63, 32, 7, 1),
)
GPU_CASES = (
  Case(16384, 2048, 64, 1408, 6, 2, 'bfloat16'),
  Case(16384, 1280, 63, 896, 7, 1, 'bfloat16'),
  *(Case(16384, 2048, e, 1408, 6, 2, 'bfloat16') for e in (8, 16, 128, 256)),
)
# A dispatch, and the format of its products where it is not the layer's own.
LOW_PRECISION = tuple(f'dropless {qtype}' for qtype in moe_config.LOW_PRECISION)
VARIANTS = ('dropless', *LOW_PRECISION, 'capacity', 'dense')
ROLES = {'dense twin': 'dense', 'plain JAX': 'plain'}


def layer_config(case: Case, variant: str) -> moe_config.MoEConfig:
  """The layer of a case; `capacity` drops what exceeds 1.25 times the mean load."""
  dispatch, _, qtype = variant.partition(' ')
  page = base.get_config()
  page.model.moe.update(
    num_experts=case.experts,
    num_shared_experts=case.shared,
    num_experts_per_tok=case.top_k,
    moe_mlp_dim=case.width,
    dispatch=dispatch,
    grouped_matmul=qtype or 'auto',
  )
  if dispatch == 'capacity':
    page.model.moe.capacity.update(policy='position', factor=1.25, group_rows=0)
  return parse.from_dict(page.to_dict()).model.moe


def inputs(case: Case) -> list[jax.Array]:
  """Batches [B, L, D]."""
  keys = jax.random.split(jax.random.key(1), NUM_INPUTS)
  return [jax.random.normal(key, case.shape, jnp.dtype(case.dtype)) for key in keys]


def make_moe(case: Case, variant: str) -> tuple[Callable, Any]:
  """(variables, x [B, L, D]) -> [B, L, D], and variables."""
  dtype = jnp.dtype(case.dtype)
  sizes = routing.Sizes(256, case.shape[1])
  module = moe_layer.MoE(layer_config(case, variant), sizes, 0.02, dtype, dtype, train=True)
  ids = jnp.zeros(case.shape[:2], jnp.int32)
  row = jnp.arange(case.shape[0], dtype=jnp.int32)
  tokens = routing.Tokens(ids, ids == 0, row, jnp.uint32(0))

  def apply(variables, x):
    return module.apply(variables, x, tokens, jnp.int32(0), {})[0]

  make = jax.jit(lambda x: module.init(jax.random.key(0), x, tokens, jnp.int32(0), {}))
  return apply, partitioning.unbox(make(jnp.zeros(case.shape, dtype)))


def make_twin(case: Case) -> tuple[Callable, Any]:
  """The dense FFN as `make_moe` gives the layer."""
  dtype = jnp.dtype(case.dtype)
  module = layers.FeedForward(case.activated, 0.02, dtype, dtype)
  make = jax.jit(lambda x: module.init(jax.random.key(0), x))
  return module.apply, partitioning.unbox(make(jnp.zeros(case.shape, dtype)))


def make_plain(case: Case) -> tuple[Callable, Any]:
  """The dense FFN as anyone would write it in JAX: three kernels, three products."""
  dtype = jnp.dtype(case.dtype)
  shapes = {'gate': (case.embed, case.activated), 'up': (case.embed, case.activated)}
  shapes['down'] = (case.activated, case.embed)
  keys = jax.random.split(jax.random.key(0), len(shapes))
  params = {
    name: 0.02 * jax.random.normal(key, shape, dtype)
    for key, (name, shape) in zip(keys, shapes.items())
  }

  def apply(variables, x):
    p = variables['params']
    return (jax.nn.silu(x @ p['gate']) * (x @ p['up'])) @ p['down']

  return apply, {'params': params}


def program(
  case: Case, variant: str, backward: bool, fn: Callable, variables: Any, xs: list[jax.Array]
) -> harness.Program:
  """The compiled program."""
  if backward:
    # A cotangent that depends on the output, so that nothing can be left out.
    def loss(v, x):
      return (fn(v, x).astype(jnp.float32) ** 2).mean()

    rest = {k: v for k, v in variables.items() if k != 'params'}

    def run(params: Any, x: jax.Array) -> Any:
      return jax.grad(lambda p, x: loss({'params': p, **rest}, x), argnums=(0, 1))(params, x)

    first = variables['params']
  else:
    run, first = fn, variables
  compiled = jax.jit(run).lower(first, xs[0]).compile()
  temporaries = harness.temporaries(compiled)
  return harness.Program(
    name=f'{case.name} {PASSES[backward]}',
    variant=variant,
    run=lambda i: compiled(first, xs[i % len(xs)]),
    role=ROLES.get(variant, ''),
    flops=case.flops(backward),
    peak_bytes=temporaries,
    detail={} if variant in ROLES else {'of_routed': temporaries / case.routed_bytes},
  )


def torch_program(
  case: Case, variables: Any, xs: list[jax.Array], backward: bool
) -> harness.Program:
  """transformers' layer of DeepSeek-V2 with the same weights, experts by `grouped_mm`."""
  import torch
  from transformers.models.deepseek_v2 import configuration_deepseek_v2, modeling_deepseek_v2

  on_gpu = jax.default_backend() == 'gpu'
  cfg = configuration_deepseek_v2.DeepseekV2Config(
    hidden_size=case.embed,
    moe_intermediate_size=case.width,
    n_routed_experts=case.experts,
    n_shared_experts=case.shared,
    num_attention_heads=1,
    num_experts_per_tok=case.top_k,
    topk_method='greedy',
    routed_scaling_factor=1.0,
  )
  cfg._experts_implementation = 'grouped_mm'
  module = modeling_deepseek_v2.DeepseekV2Moe(cfg)

  def to(a):
    return torch.from_numpy(np.array(a.astype(jnp.float32)))

  params = variables['params']

  def flat(a):
    return a.reshape(*a.shape[:-2], -1)  # the pair before F: gate, then up

  state = {
    'gate.weight': params['router'].T,
    'experts.gate_up_proj': jnp.swapaxes(flat(params['gate_up']), 1, 2),
    'experts.down_proj': jnp.swapaxes(params['down'], 1, 2),
    'shared_experts.gate_proj.weight': params['shared']['gate_up'][:, 0].T,
    'shared_experts.up_proj.weight': params['shared']['gate_up'][:, 1].T,
    'shared_experts.down_proj.weight': params['shared']['down'].T,
  }
  module.load_state_dict({name: to(value) for name, value in state.items()})
  place = dict(device='cuda', dtype=torch.bfloat16) if on_gpu else {}
  module = module.to(**place)
  rows = [to(x).to(**place).requires_grad_(backward) for x in xs]

  def run(number: int) -> Any:
    x = rows[number % len(rows)]
    if not backward:
      with torch.inference_mode():
        out = module(x).float().cpu().numpy()
    else:
      x.grad = None
      module.zero_grad()
      out = module(x)
      (out.float() ** 2).mean().backward()
      out = x.grad[0, 0, 0].item()  # waits for a GPU
    return out

  if not on_gpu:
    torch_threads.use_best(run)
  return harness.Program(
    name=f'{case.name} {PASSES[backward]}',
    variant='transformers grouped_mm',
    run=run,
    role='transformers',
    flops=case.flops(backward),
  )


def _applies(case: Case, variant: str) -> bool:
  if variant in LOW_PRECISION:
    return case in (TARGET, GPU_CASES[0]) and importlib.util.find_spec('qwix') is not None
  return variant != 'dense' or case.experts <= MOST_DENSE_EXPERTS


def programs(
  case: Case, options: harness.Options, with_torch: bool
) -> Iterator[Callable[[], harness.Program]]:
  """Makers of the programs of a case that were asked for, baselines included."""
  xs = inputs(case)
  for backward in (False, True):
    name = f'{case.name} {PASSES[backward]}'
    variants = [v for v in VARIANTS if options.wants(name, v) and _applies(case, v)]
    if not variants:
      continue
    for variant in variants:
      yield lambda v=variant, b=backward: program(case, v, b, *make_moe(case, v), xs)
    yield lambda b=backward: program(case, 'dense twin', b, *make_twin(case), xs)
    yield lambda b=backward: program(case, 'plain JAX', b, *make_plain(case), xs)
    if with_torch and case.shared:
      yield lambda b=backward: torch_program(case, make_moe(case, 'dropless')[1], xs, b)


def run(options: harness.Options, peaks: harness.Peaks) -> list[harness.Result]:
  """Measures the cases for this platform, one after the other."""
  with_torch = options.transformers and all(
    importlib.util.find_spec(name) for name in ('torch', 'transformers')
  )
  if not importlib.util.find_spec('qwix'):
    logging.warning(f'no {" or ".join(LOW_PRECISION)}: qwix is not installed (extra quant)')
  cases = GPU_CASES if jax.default_backend() == 'gpu' else CASES
  found = []
  for case in tqdm.tqdm(cases, desc='cases', leave=False, disable=None):
    made = [make() for make in programs(case, options, with_torch)]
    found += harness.measure('layer', made, options.repeats, peaks)
  return found
