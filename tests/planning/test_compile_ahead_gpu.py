"""What the compiler makes of the fast paths for an H100 that is not there (JAX's CUDA plugin).

Compiled only, never run: which kernels serve, which buffers exist and how large they are. Sizes are
those of real models; small ones take as long to compile.
"""

import importlib.util
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import pytest

from moe_jax.planning import gpu_targets

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = r"""
import dataclasses
import json
import re
import sys
import jax
import jax.numpy as jnp
from configs import deepseek_v2_lite
from moe_jax.config import parse
from moe_jax.devices import compile_options, partitioning
from moe_jax.models.attention import kernels, latent, multi_head
from moe_jax.models.attention.kernels import tokamax
from moe_jax.models.dispatch import dropless
from moe_jax.planning import gpu_targets
from moe_jax.training import cross_entropy

cfg = parse.from_dict(deepseek_v2_lite.get_config().to_dict())
(device,) = gpu_targets.describe('h100')
mesh = partitioning.make_mesh(cfg.mesh, [device])
whole = jax.NamedSharding(mesh, jax.P())


def array(*shape, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)


def found(fn, *args, **options):
  program = jax.jit(fn, **options).lower(*args).compile()
  text = program.as_text()
  operands = re.compile(r' dot\((%[\w.]+), (%[\w.]+)\)')
  dtype = lambda name, body: re.search(re.escape(name[1:]) + r'(?: = |: )(\w+)\[', body)[1]
  dots = []
  for body in text.split('\n\n'):
    dots += [sorted(dtype(name, body) for name in pair) for pair in operands.findall(body)]
  return {
    'temporaries': program.memory_analysis().temp_size_in_bytes,
    'aliased': program.memory_analysis().alias_size_in_bytes,
    'kernels': re.findall(r'custom_call_target="([^"]*)"', text),
    'scatters': re.findall(r'= (\w+\[[\d,]*\])\S* scatter\(', text),
    'arrays': sorted(set(re.findall(r'\w+\[[\d,]+\]', text))),
    'copies': re.findall(r'= (\w+\[[\d,]+\])\S* (?:copy|slice|transpose)\(', text),
    'dots': dots,
  }


def layer(tokens, d, e, f, k, grouped_matmul='auto'):
  # Two programs, since between forward and backward of a layer lies the rest of the model.
  cast = lambda a: a.astype(jnp.bfloat16)

  def forward(x, gates, idx, gate_up, down):
    experts = lambda x, gates, a, b: dropless.dispatch(
      x, gates, idx, cast(a), cast(b), grouped_matmul, 0)
    return jax.vjp(experts, x, gates, gate_up, down)

  f32 = dict(dtype=jnp.float32)
  args = (array(tokens, d), array(tokens, k, **f32), array(tokens, k, dtype=jnp.int32))
  args += array(e, d, 2, f, **f32), array(e, f, d, **f32)
  out, pullback = jax.tree.map(
    lambda a: array(*a.shape, dtype=a.dtype), jax.eval_shape(forward, *args)
  )
  return {'forward': found(forward, *args), 'backward': found(lambda g, d: g(d), pullback, out)}


def flash(kernel, rows, length, heads):
  assert kernels.choose(
    'auto', head_dim=192, v_head_dim=128, length=length, dtype=jnp.bfloat16) == 'tokamax'

  def run(q, k, v, d_out, ids):
    fn = lambda q, k, v: tokamax.attend(q, k, v, ids, ids, 0.1, kernels=(kernel,))
    out, pullback = jax.vjp(fn, q, k, v)
    return out, pullback(d_out)

  wide, narrow = (array(rows, length, heads, width) for width in (192, 128))
  return found(run, wide, wide, narrow, narrow, array(rows, length, dtype=jnp.int32))


def head(tokens, d, vocab, chunk):
  loss = lambda x, w, t: cross_entropy.head_loss(x, w, t, chunk=chunk, z_weight=1e-4).total
  args = array(1, tokens, d), array(d, vocab, dtype=jnp.float32), array(1, tokens, dtype=jnp.int32)
  return found(jax.grad(loss, argnums=(0, 1)), *args)


def decode(rows, slots, heads, impl):
  chosen = dataclasses.replace(cfg.model.attention, impl=impl)

  def step(q, cache, own, up, positions):
    cache = multi_head.write(cache, own, positions)
    return latent.absorbed(q, cache, up, positions, chosen), cache

  token = lambda width: array(rows, 1, heads, width)
  return found(
    step,
    latent.Queries(token(128), token(64)),
    latent.LatentCache(array(rows, slots, 512), array(rows, slots, 64)),
    latent.LatentCache(array(rows, 1, 512), array(rows, 1, 64)),
    latent.Absorbed(array(heads, 128, 512), array(heads, 512, 128)),
    array(rows, 1, dtype=jnp.int32),
    donate_argnums=1,
  )


def several(count):
  node = partitioning.make_mesh(cfg.mesh, gpu_targets.describe('h200', count))
  options = compile_options.for_step(node)
  rows = jax.NamedSharding(node, jax.P(partitioning.ROW_AXES))
  x = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=rows)
  with partitioning.activate(node):
    program = jax.jit(lambda x: x.sum(axis=0), compiler_options=options).lower(x).compile()
  return {'options': list(options), 'reductions': program.as_text().count('all-reduce')}


with gpu_targets.as_default(device), partitioning.activate(mesh):
  cases = json.loads(sys.argv[1]).items()
  print(json.dumps({name: globals()[name](*args) for name, args in cases}))
"""
MOSAIC, TRITON = 'mosaic_gpu_v2', '__gpu$xla.gpu.triton'
NEWER_NAMES = {'triton_kernel_call_ffi': TRITON}  # of jax-triton, which newer tokamax goes through

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    not gpu_targets.installed(), reason="needs JAX's CUDA plugin: see planning/gpu_targets.py"
  ),
]


def compile_for_h100(**cases):
  """Name of a function in SCRIPT -> what the compiler made of it with these arguments."""
  env = os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
  # An assembler of the machine may be older than Triton; that of the virtual environment is first.
  assembler = importlib.util.find_spec('nvidia') and importlib.util.find_spec('nvidia.cu13')
  if assembler:
    folders = [f'{place}/bin' for place in assembler.submodule_search_locations]
    env['PATH'] = os.pathsep.join([*folders, env['PATH']])
  command = [sys.executable, '-c', SCRIPT, json.dumps(cases)]
  done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
  assert done.returncode == 0, done.stderr[-3000:]
  found = json.loads(done.stdout.splitlines()[-1])
  return {name: _named_alike(case) for name, case in found.items()}


def _named_alike(found):
  """`found` with the kernels' names of the oldest versions, at any depth."""
  if not isinstance(found, dict):
    return found
  found = {key: _named_alike(value) for key, value in found.items()}
  if 'kernels' in found:
    found['kernels'] = [NEWER_NAMES.get(name, name) for name in found['kernels']]
  return found


def sizes(array):
  """'bf16[2,3]' -> [2, 3]."""
  return [int(n) for n in re.search(r'\[(.*)\]', array)[1].split(',')]


def test_experts():
  """With as many tokens that weights are small beside them: gradients of weights are temporary."""
  tokens, d, e, f, k = 131072, 2048, 64, 1408, 6
  made = compile_for_h100(layer=(tokens, d, e, f, k))['layer']
  forward, backward = made['forward'], made['backward']
  assert forward['kernels'] == [MOSAIC] * 2
  assert sorted(backward['kernels']) == [TRITON] * 2 + [MOSAIC] * 2
  routed = tokens * k * d * 2
  for program in (forward, backward):
    assert program['temporaries'] <= 3 * routed
    assert not program['dots']  # nothing is multiplied outside of the kernels
    assert not any(array.startswith(('f', 'bf')) for array in program['scatters'])
    # The widest thing is the rows' gate and up: no expert has a copy of the rows.
    assert max(math.prod(sizes(array)) for array in program['arrays']) == tokens * k * 2 * f


@pytest.mark.parametrize('qtype', ['int8', 'float8_e4m3fn'])
def test_low_precision_reaches_the_kernels(qtype):
  """Both forward products take the rounded values as they are; backward is in 16 bits."""
  made = compile_for_h100(layer=(16384, 2048, 64, 1408, 6, qtype))['layer']
  forward, backward = made['forward'], made['backward']
  assert forward['kernels'] == [TRITON] * 2 and not forward['dots']
  assert sorted(backward['kernels']) == [TRITON] * 2 + [MOSAIC] * 2 and not backward['dots']
  held = {'int8': 's8', 'float8_e4m3fn': 'f8e4m3fn'}[qtype]
  assert f'{held}[64,2048,2816]' in forward['arrays']


@pytest.mark.parametrize(
  'kernel, targets', [('mosaic_gpu', [MOSAIC] * 3), ('triton', [TRITON] * 2)]
)
def test_flash_attention_at_the_head_sizes_of_mla(kernel, targets):
  rows, length, heads = 4, 2000, 16
  made = compile_for_h100(flash=(kernel, rows, length, heads))['flash']
  assert made['kernels'] == targets  # forward and backward
  square = [a for a in made['arrays'] if math.prod(n for n in sizes(a) if n >= length) > 2 * 2048]
  assert all(math.prod(sizes(a)) <= rows * 2048**2 for a in square)  # never one for every head
  assert not square or kernel == 'triton'  # whose backward makes a mask of the bounds
  assert made['temporaries'] < 5 * rows * length * heads * 128 * 2


def test_head_loss():
  tokens, d, vocab, chunk = 16384, 2048, 102400, 4096
  loss = compile_for_h100(head=(tokens, d, vocab, chunk))['head']
  assert loss['dots'] == [['bf16', 'bf16']] * 3  # logits, and both gradients
  assert not any(sizes(a)[-2:] == [tokens, vocab] for a in loss['arrays'])
  assert loss['temporaries'] < 1.1 * (chunk * vocab * 6 + d * vocab * 6)


@pytest.mark.parametrize('impl', ['auto', 'reference'])
def test_decoding(impl):
  rows, slots, heads = 64, 8192, 16
  step = compile_for_h100(decode=(rows, slots, heads, impl))['decode']
  cache = rows * slots * (512 + 64) * 2
  assert step['aliased'] == cache  # written in place
  assert not any(math.prod(sizes(a)) >= rows * slots * 64 for a in step['copies'])
  if impl == 'reference':
    assert step['temporaries'] <= 3 * rows * slots * heads * 4  # scores in float32, a few times
    return
  # One kernel, and no array as large as the scores: the cache is read once, by the kernel alone.
  assert step['kernels'].count(TRITON) == 1
  caches = {(rows, slots, 512), (rows, slots, 64)}
  large = [a for a in step['arrays'] if math.prod(sizes(a)) >= rows * slots * heads]
  assert {tuple(sizes(a)) for a in large} <= caches
  assert step['temporaries'] < 0.05 * cache


def test_options_of_steps_on_several_gpus_are_known_to_the_compiler():
  made = compile_for_h100(several=(8,))['several']
  assert made['options'] and made['reductions']
