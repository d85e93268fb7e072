"""What grows, and what should not: cost against experts, sequence length, batch and devices.

At fixed activation (K and widths) more experts cost parameters, not arithmetic, so the time should
stay flat but for the optimizer, which updates all of them.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs import base, recipes, sizes
from experiments.bench import twins
from experiments.common import harness, stepper
from moe_jax.config import parse, schema
from moe_jax.models.attention import kernels
from moe_jax.planning import flops

ROOT = pathlib.Path(__file__).parents[2]
EXPERTS, PER_TOK = (16, 64, 128, 256), 6
EXPERTS_BATCH = {'train__batch_size': 16, 'model__max_seq_len': 512}
LENGTHS = (1024, 2048, 4096, 8192, 16384)
ATTENTION_LENGTHS = {'cpu': (8192, 32_768, 131_072)}
ATTENTION_REPEATS = 3  # one at 128K takes the time of hundreds of others
BATCHES = (1, 2, 4, 8, 16, 32)
DEVICES = (1, 2, 4, 8)


def page(**overrides: Any) -> Any:
  """A toy whose experts are most of it; an override is written section__key=value."""
  c = sizes.tiny(base.get_config())
  c.model.embed_dim, c.model.num_layers, c.model.max_seq_len = 128, 2, 256
  recipes.experts(c, shared=2, routed=64, per_tok=PER_TOK, width=128)
  c.train.batch_size = 8
  c.update_from_flattened_dict({k.replace('__', '.'): v for k, v in overrides.items()})
  return c


def run(options: harness.Options, peaks: harness.Peaks) -> list[harness.Result]:
  """Measures what was asked for."""
  results = []
  for group in (_experts, _lengths, _batches):
    programs = list(group(options))
    found = harness.measure('scale', programs, options.repeats, peaks) if programs else []
    results += _flatness(found)
  programs = list(_attention(options))
  if programs:
    repeats = min(options.repeats, ATTENTION_REPEATS)
    results += harness.measure('scale', programs, repeats, peaks)
  with contextlib.ExitStack() as stack:
    programs = list(_devices(options, stack))
    found = harness.measure('scale', programs, options.repeats, peaks) if programs else []
  return results + _flatness(found)


def _make(**overrides: Any) -> schema.Config:
  return parse.from_dict(page(**overrides).to_dict())


def _step(name: str, variant: str, cfg: schema.Config, role: str = '') -> harness.Program:
  one = stepper.Stepper(cfg)
  num_flops = cfg.train.batch_size * flops.train_flops_per_sequence(cfg.model)
  parameters = flops.count_parameters(cfg.model).total
  return harness.Program(
    name,
    variant,
    one.run,
    role=role,
    flops=num_flops,
    bytes=stepper.OPTIMIZER_BYTES * parameters,
    peak_bytes=one.peak_bytes,
    detail={'tokens': one.tokens, 'parameters': parameters},
  )


def _experts(options: harness.Options) -> Iterator[harness.Program]:
  """The step, per number of experts, and one dense twin for all."""
  rows, length = EXPERTS_BATCH.values()
  name = f'step, top-{PER_TOK}, {rows} x {length} tokens'
  asked = [e for e in EXPERTS if options.wants(name, f'{e} experts')]
  for e in asked:
    yield _step(name, f'{e} experts', _make(**EXPERTS_BATCH, model__moe__num_experts=e))
  if asked:
    yield _step(name, 'dense twin', twins.dense_twin(_make(**EXPERTS_BATCH)), role='dense')


def _lengths(options: harness.Options) -> Iterator[harness.Program]:
  """The step on one row, per length; and its dense twin."""
  for length in LENGTHS:
    name = f'step, 1 row of {length}'
    if not options.wants(name, 'dropless'):
      continue
    cfg = _make(model__max_seq_len=length, train__batch_size=1)
    yield _step(name, 'dropless', cfg)
    yield _step(name, 'dense twin', twins.dense_twin(cfg), role='dense')


def _batches(options: harness.Options) -> Iterator[harness.Program]:
  for rows in BATCHES:
    name = f'step, {rows} rows of 256'
    if not options.wants(name, 'dropless'):
      continue
    cfg = _make(train__batch_size=rows)
    yield _step(name, 'dropless', cfg)
    yield _step(name, 'dense twin', twins.dense_twin(cfg), role='dense')


def _flatness(results: list[harness.Result]) -> list[harness.Result]:
  """Adds tokens per second, and the time over that of the first of ours with that name."""
  found, firsts = [], {}
  for r in results:
    detail = dict(r.detail)
    detail['tokens_per_second'] = detail['tokens'] / r.seconds_median
    first = firsts.setdefault(r.name, r)
    if first is not r and r.variant != 'dense twin':
      detail[f'of {first.variant}'] = r.seconds_median / first.seconds_median
    found.append(dataclasses.replace(r, detail=detail))
  return found


def _attention(options: harness.Options) -> Iterator[harness.Program]:
  """Forward pass of attention alone, one head of 64, as the model chooses its implementation."""
  lengths = ATTENTION_LENGTHS.get(jax.default_backend(), ATTENTION_LENGTHS['cpu'])
  heads, width = 1, 64
  for length in lengths:
    name, dtype = f'attention, 1 head, {length} tokens', jnp.dtype('float32')
    impl = kernels.choose('auto', head_dim=width, v_head_dim=width, length=length, dtype=dtype)
    if options.wants(name, impl):
      q = jax.random.normal(jax.random.key(0), (1, length, heads, width), dtype)
      yield _attend_program(name, impl, q)


def _attend_program(name: str, impl: str, q: jax.Array) -> harness.Program:
  length = q.shape[1]
  positions = np.arange(length, dtype=np.int32)[None]
  fn = functools.partial(kernels.ATTENDS[impl], scale=q.shape[-1] ** -0.5)
  call = jax.jit(lambda q: fn(q, q, q, positions, np.ones_like(positions)))
  compiled = call.lower(q).compile()
  return harness.Program(
    name,
    impl,
    lambda unused_number: compiled(q),
    flops=4 * q.shape[2] * q.shape[3] * length * (length + 1) / 2,
    peak_bytes=harness.temporaries(compiled),
  )


def _devices(options: harness.Options, stack: contextlib.ExitStack) -> Iterator[harness.Program]:
  """The step of a batch cut over virtual devices, which share the cores: overhead, no speed-up."""
  for axis in ('data', 'expert'):
    name = f'step on virtual CPU devices, {axis}'
    for number in DEVICES:
      if options.wants(name, f'{number} devices'):
        cfg = _make(**{'mesh__data': 1, f'mesh__{axis}': number})
        yield _server_program(name, number, cfg, stack)


def _server_program(
  name: str, num_devices: int, cfg: schema.Config, stack: contextlib.ExitStack
) -> harness.Program:
  """Steps of a process of its own, which lives as long as `stack`."""
  environment = os.environ | {'JAX_NUM_CPU_DEVICES': str(num_devices), 'JAX_PLATFORMS': 'cpu'}
  environment.pop('XLA_FLAGS', None)  # they might say another number
  server = subprocess.Popen(
    [sys.executable, '-m', 'experiments.bench.step_server'],
    cwd=ROOT,
    env=environment,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  stack.callback(server.wait)
  stack.callback(server.stdin.close)

  def ask(line: str) -> str:
    server.stdin.write(line + '\n')
    server.stdin.flush()
    answer = server.stdout.readline().strip()
    if not answer:
      raise RuntimeError(f'{name}, {num_devices} devices: its process ended')
    return answer

  peak_bytes = int(ask(json.dumps(parse.to_dict(cfg))))
  tokens = cfg.train.batch_size * cfg.model.max_seq_len
  return harness.Program(
    name,
    f'{num_devices} devices',
    lambda number: ask(str(number)),
    flops=cfg.train.batch_size * flops.train_flops_per_sequence(cfg.model),
    peak_bytes=peak_bytes,
    detail={'tokens': tokens},
  )
