"""The whole train step: tokens per second, MFU, and which part of the model the time goes to.

Every model stands beside its dense twin of equal activated FLOPs; the MLA model also beside the
same model in transformers, trained by torch from the same weights.
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from configs import deepseekmoe_2b, deepseekmoe_small, deepseekmoe_tiny, quickstart, recipes
from experiments.bench import torch_step, twins
from experiments.common import harness, stepper
from moe_jax.config import parse, schema
from moe_jax.planning import flops

DATASHEET = {'H100': 989e12, 'H200': 989e12}  # dense bfloat16 FLOP/s


@dataclasses.dataclass(frozen=True)
class Case:
  """A model to train."""

  name: str
  page: Callable[[], Any]
  dispatches: tuple[str, ...] = ('dropless',)
  transformers: bool = False  # whether it has this model
  steps: int = 1  # per timed call: a step of a few milliseconds is timed with others
  platforms: tuple[str, ...] = ('cpu', 'gpu', 'tpu')


def tiny_mla() -> Any:
  """The tiny page with latent attention, as DeepSeek-V2 has it, and no heads in common."""
  page = recipes.latent_attention(deepseekmoe_tiny.get_config(), q_lora_rank=0)
  mla = page.model.attention.mla
  mla.kv_lora_rank, mla.v_head_dim = 32, 16
  mla.qk_nope_head_dim, mla.qk_rope_head_dim = 16, 8
  return page


def mla_26m() -> Any:
  """Latent attention and 64 experts in 26 million parameters, 8 rows of 256 tokens."""
  page = tiny_mla()
  page.model.update(vocab_size=4096, max_seq_len=256, embed_dim=256, num_layers=6, num_heads=8)
  page.model.mlp_dim = 8 * 88
  mla = page.model.attention.mla
  mla.kv_lora_rank, mla.v_head_dim = 64, 32
  mla.qk_nope_head_dim, mla.qk_rope_head_dim = 32, 16
  page.model.moe.update(num_experts=64, num_experts_per_tok=6, num_shared_experts=2, moe_mlp_dim=96)
  page.train.batch_size = 8
  return page


def small() -> Any:
  """The small page; on a CPU one shorter row in float32, so that a step takes seconds."""
  page = deepseekmoe_small.get_config()
  if jax.default_backend() == 'cpu':
    page.model.dtype = 'float32'
    page.model.max_seq_len, page.train.batch_size = 512, 1
  return page


def two_billion() -> Any:
  """The 2B page with 32 rows, which fill one device."""
  page = deepseekmoe_2b.get_config()
  page.train.batch_size = 32
  return page


CASES = (
  Case('tiny', deepseekmoe_tiny.get_config, ('dropless', 'capacity', 'dense'), steps=4),
  Case('tiny MLA', tiny_mla, transformers=True, steps=4),
  Case('quickstart', quickstart.get_config, steps=2),
  Case('26M MLA', mla_26m, transformers=True),
  Case('small', small),
  Case('2b', two_billion, platforms=('gpu',)),
)


def run(
  options: harness.Options, peaks: harness.Peaks, cases: Sequence[Case] = CASES
) -> list[harness.Result]:
  """Measures what was asked for.

  Args:
    options: of the command.
    peaks: for float32 matrices; those of another dtype are measured when a model needs them.
    cases: models.
  """
  results, platform = [], jax.default_backend()
  by_dtype = {'float32': peaks}
  for case in cases:
    if platform not in case.platforms:
      continue
    cfg = parse.from_dict(case.page().to_dict())
    programs = list(_programs(case, cfg, options))
    if not programs:
      continue
    dtype = cfg.model.dtype
    if dtype not in by_dtype:
      by_dtype[dtype] = harness.measure_peaks(jnp.dtype(dtype))
    found = harness.measure('step', programs, options.repeats, by_dtype[dtype])
    results += [_per_step(case, r, p, by_dtype[dtype]) for r, p in zip(found, programs)]
  return results


def _programs(
  case: Case, cfg: schema.Config, options: harness.Options
) -> Iterator[harness.Program]:
  """Ours by dispatch, then what they are compared with, if any of ours is asked for."""
  name = f'{case.name}, {cfg.train.batch_size} x {cfg.model.max_seq_len} tokens'
  asked = [d for d in case.dispatches if options.wants(name, d)]
  if not asked:
    return
  for dispatch in asked:
    yield _ours(name, dispatch, _with_dispatch(cfg, dispatch), case.steps)
  yield _ours(name, 'dense twin', twins.dense_twin(cfg), case.steps, role='dense')
  has = importlib.util.find_spec('transformers') and importlib.util.find_spec('torch')
  if case.transformers and options.transformers and has:
    step = torch_step.make_step(cfg)

    def several(number):
      return [step(case.steps * number + i) for i in range(case.steps)]

    variant = f'transformers {torch_step.EXPERTS}'
    yield harness.Program(
      name, variant, several, role='transformers', flops=case.steps * _flops(cfg)
    )


def _with_dispatch(cfg: schema.Config, dispatch: str) -> schema.Config:
  """Buffers of a capacity need a policy that bounds them."""
  moe = dataclasses.replace(cfg.model.moe, dispatch=dispatch)
  if dispatch == 'capacity':
    moe = dataclasses.replace(moe, capacity=dataclasses.replace(moe.capacity, policy='score'))
  return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, moe=moe))


def _flops(cfg: schema.Config) -> int:
  return cfg.train.batch_size * flops.train_flops_per_sequence(cfg.model)


def _ours(
  name: str, variant: str, cfg: schema.Config, steps: int, role: str = ''
) -> harness.Program:
  one = stepper.Stepper(cfg)
  parameters = flops.count_parameters(cfg.model).total
  return harness.Program(
    name,
    variant,
    lambda number: one.run(steps * number, steps),
    role=role,
    flops=steps * _flops(cfg),
    bytes=steps * stepper.OPTIMIZER_BYTES * parameters,
    peak_bytes=one.peak_bytes,
    detail={'tokens': one.tokens, **{k: v for k, v in one.shares().items() if v}},
  )


def _per_step(
  case: Case, result: harness.Result, program: harness.Program, peaks: harness.Peaks
) -> harness.Result:
  """Seconds per step, and the rates that follow from them."""
  times = ('seconds_median', 'seconds_min', 'seconds_max')
  scaled = {name: getattr(result, name) / case.steps for name in times}
  seconds, detail = scaled['seconds_median'], dict(result.detail)
  rate = program.flops / case.steps / seconds
  detail = {'mfu': rate / peaks.flops} | detail
  if 'tokens' in detail:
    detail = {'tokens_per_second': detail.pop('tokens') / seconds} | detail
  kind = jax.devices()[0].device_kind
  for device, peak in DATASHEET.items():
    if device in kind:
      detail['mfu_of_datasheet'] = rate / peak
  return dataclasses.replace(result, **scaled, detail=detail)
