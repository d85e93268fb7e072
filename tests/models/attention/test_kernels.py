"""Every implementation against attention and its gradients written out in float64 numpy.

`splash` runs in Pallas' interpreter here, and compiles for chips that are not there in a slow test.
`tokamax` runs through its XLA forms; its kernels compile for a GPU in
tests/planning/test_compile_ahead_gpu.py.
"""

import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import backend

from moe_jax import errors
from moe_jax.config import attention_config
from moe_jax.devices import hardware, partitioning
from moe_jax.models.attention import kernels as kernels_lib
from moe_jax.models.attention.kernels import (
  chunked,
  dot_product,
  reference,
  splash,
  tokamax,
)
from tests import tiny

ROOT = pathlib.Path(__file__).parents[3]
ATTENDS = kernels_lib.ATTENDS | {
  'splash': functools.partial(splash.attend, interpret=True),
  'tokamax': functools.partial(tokamax.attend, kernels=('xla',)),
  'tokamax_chunked': functools.partial(tokamax.attend, kernels=('xla_chunked',)),
}
L = 150  # no multiple of the blocks below
# One document; three and padding inside and across blocks; padding only; a document of one token.
LENGTHS = ((150,), (40, 70, 20), (), (1, 33, 64, 52))
# Both sides multiply float32 numbers of order 1 and add up to 150 of them.
CLOSE = dict(rtol=1e-4, atol=1e-5)
BACKENDS = ('tpu', 'gpu', 'cpu')


class Shape(NamedTuple):
  heads: int
  kv_heads: int
  head_dim: int
  v_head_dim: int
  scale: float


SHAPES = {
  'MHA': Shape(2, 2, 8, 8, 8**-0.5),
  'GQA': Shape(4, 2, 8, 8, 0.5),
  'MQA': Shape(3, 1, 8, 8, 0.2),
  'MLA': Shape(2, 2, 24, 16, 0.3),
}


@pytest.fixture(autouse=True, scope='module')
def small_blocks():
  """Several blocks per row, so that there are some before, on and after the diagonal."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(chunked, 'BLOCK', 32)
    patch.setattr(splash, 'BLOCKS', (splash.LANES,))
    yield


def batch(lengths=LENGTHS, length=L):
  """(positions, segment_ids)."""
  rows = [tiny.row(entry, length) for entry in lengths]
  return tuple(
    jnp.asarray(np.stack([row[key] for row in rows])) for key in ('positions', 'segment_ids')
  )


def operands(shape, dtype='float32', rows=4, length=L, seed=0):
  """q, k, v and a cotangent of the outputs."""
  rng = np.random.default_rng(seed)

  def draw(n, h):
    return jnp.asarray(rng.normal(size=(rows, length, n, h)), dtype)

  n, kv, h, hv, _ = shape
  return draw(n, h), draw(kv, h), draw(kv, hv), draw(n, hv)


@functools.cache
def compiled(name, scale):
  """(q, k, v, d_out, positions, segment_ids) -> (out, the gradients of q, k and v)."""

  def run(q, k, v, d_out, positions, segment_ids):
    def fn(q, k, v):
      return ATTENDS[name](q, k, v, positions, segment_ids, scale)

    out, pullback = jax.vjp(fn, q, k, v)
    return out, pullback(jnp.where(segment_ids[..., None, None] > 0, d_out, 0))

  return tiny.jit(run)


def written_out(q, k, v, d_out, segment_ids, scale):
  """The same in numpy; earlier in the row is earlier in the text. Rows of padding are 0."""
  q, k, v, d_out = (np.asarray(a, np.float64) for a in (q, k, v, d_out))
  ids = np.asarray(segment_ids)
  out = np.zeros_like(d_out)
  d_q, d_k, d_v = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
  group = q.shape[2] // k.shape[2]
  for b, n in np.ndindex(len(q), q.shape[2]):
    m = n // group
    seen = np.tril(ids[b][:, None] == ids[b]) & (ids[b] > 0)
    weight = np.where(seen, np.exp(q[b, :, n] @ k[b, :, m].T * scale), 0)
    prob = weight / np.maximum(weight.sum(-1, keepdims=True), 1e-30)
    out[b, :, n] = prob @ v[b, :, m]
    d_prob = d_out[b, :, n] @ v[b, :, m].T
    d_score = prob * (d_prob - (prob * d_prob).sum(-1, keepdims=True)) * scale
    d_q[b, :, n] = d_score @ k[b, :, m]
    d_k[b, :, m] += d_score.T @ q[b, :, n]
    d_v[b, :, m] += prob.T @ d_out[b, :, n]
  return out, (d_q, d_k, d_v)


@pytest.mark.parametrize('kind', SHAPES)
@pytest.mark.parametrize('name', ATTENDS)
def test_outputs_and_gradients_are_those_of_the_formula(name, kind):
  shape, (positions, ids) = SHAPES[kind], batch()
  arrays = operands(shape)
  out, grads = compiled(name, shape.scale)(*arrays, positions, ids)
  want, want_grads = written_out(*arrays, ids, shape.scale)
  real = np.asarray(ids) > 0
  assert out.shape == (len(LENGTHS), L, shape.heads, shape.v_head_dim)
  np.testing.assert_allclose(np.asarray(out)[real], want[real], **CLOSE)
  assert np.isfinite(out).all()  # padding too
  for got, wanted in zip(grads, want_grads):
    np.testing.assert_allclose(got, wanted, **CLOSE)
    assert not np.asarray(got)[~real].any()  # nothing comes from padding, nothing goes to it


@pytest.mark.parametrize('name', ATTENDS)
def test_bfloat16(name):
  """Probabilities and score gradients are rounded to bfloat16: 2^-8 each, a few of them in a row.

  Sums of rounded terms cancel, so errors are held against the largest magnitude of an array.
  """
  shape, (positions, ids) = SHAPES['GQA'], batch()
  arrays = operands(shape, 'bfloat16')
  out, grads = compiled(name, shape.scale)(*arrays, positions, ids)
  assert {out.dtype, *(g.dtype for g in grads)} == {jnp.dtype('bfloat16')}
  want, want_grads = written_out(*arrays, ids, shape.scale)
  out = jnp.where(ids[..., None, None] > 0, out, 0)
  for got, wanted in zip((out, *grads), (want, *want_grads)):
    error = np.abs(np.asarray(got, np.float64) - wanted).max()
    assert error < 2**-6 * np.abs(wanted).max()


@pytest.mark.parametrize('name', ATTENDS)
def test_documents_do_not_leak(name):
  """Another document leaves every bit of the others, and of their gradients, as it was."""
  shape, (positions, ids) = SHAPES['GQA'], batch()
  run = compiled(name, shape.scale)
  before, other = operands(shape), operands(shape, seed=1)
  touched = np.asarray(ids) == 2

  def where(a, b):
    return jnp.where(touched[..., None, None], b, a)

  after = [where(a, b) for a, b in zip(before, other)]
  (out, grads), (new_out, new_grads) = (run(*a, positions, ids) for a in (before, after))
  rest = (np.asarray(ids) > 0) & ~touched
  for a, b in zip((out, *grads), (new_out, *new_grads)):
    np.testing.assert_array_equal(np.asarray(a)[rest], np.asarray(b)[rest])
    assert (np.asarray(a)[touched] != np.asarray(b)[touched]).any()


def test_the_mask_of_a_cache_by_hand():
  """One query of position 1 and three slots: its own document's slots 0 and 1, of values 1 and 3.

  Equal keys weigh the same, so that it gets (1 + 3) / 2; a query that sees nothing the mean of all.
  """

  def of(*ids):
    return jnp.array([ids])

  mask = reference.visible(of(1), of(7), of(0, 1, 2), of(7, 7, 7))
  np.testing.assert_array_equal(mask, [[[True, True, False]]])
  assert not reference.visible(of(5), of(0), of(0, 1, 2), of(0, 7, 7)).any()
  k, v = jnp.ones((1, 3, 1, 2)), jnp.array([1.0, 3.0, 8.0]).reshape(1, 3, 1, 1)
  q = jnp.ones((1, 1, 2, 2))
  masked = tiny.jit(functools.partial(reference.masked, scale=0.5))
  for seen, want in ((mask, 2), (jnp.zeros_like(mask), 4)):
    np.testing.assert_allclose(masked(q, k, v, seen)[0, 0, :, 0], [want] * 2, rtol=1e-6)


@pytest.mark.parametrize('name', ['reference', 'chunked', 'dot_product'])
def test_softmax_is_in_float32(name):
  arrays = operands(SHAPES['GQA'], 'bfloat16')[:3]
  program = jax.make_jaxpr(functools.partial(ATTENDS[name], scale=0.5))(*arrays, *batch())
  exps = [eqn for eqn in tiny.equations(program) if eqn.primitive.name == 'exp']
  assert exps and all(eqn.invars[0].aval.dtype == jnp.float32 for eqn in exps)


@pytest.mark.parametrize('name', ATTENDS)
def test_outputs_carry_the_name_that_remat_policies_save(name):
  program = jax.make_jaxpr(functools.partial(ATTENDS[name], scale=0.5))(
    *operands(SHAPES['MHA'])[:3], *batch()
  )
  names = {e.params['name'] for e in tiny.equations(program) if e.primitive.name == 'name'}
  assert names == {'attn_out'}


# chunked


def temporary_bytes(fn, length):
  def shape(*s, t=jnp.float32):
    return jax.ShapeDtypeStruct((1, length, *s), t)

  ids = shape(t=jnp.int32)
  program = tiny.jit(functools.partial(fn, scale=1.0))
  compiled = program.lower(*[shape(2, 16)] * 3, ids, ids).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def gradients_of(attend_fn):
  def run(q, k, v, positions, segment_ids, scale):
    def fn(q, k, v):
      return (attend_fn(q, k, v, positions, segment_ids, scale) ** 2).sum()

    return jax.grad(fn, argnums=(0, 1, 2))(q, k, v)

  return run


@pytest.mark.parametrize('wrap', [lambda fn: fn, gradients_of], ids=['forward', 'backward'])
def test_memory_of_chunked_is_linear_in_the_length(wrap):
  """Four times the length: 16 times the scores of `reference`, at most 4 times of `chunked`."""
  linear = [temporary_bytes(wrap(chunked.attend), length) for length in (512, 2048)]
  square = [temporary_bytes(wrap(reference.attend), length) for length in (512, 2048)]
  assert square[1] > 12 * square[0]
  assert linear[1] < 4.4 * linear[0]
  assert linear[1] < square[1] / 10


def test_chunked_skips_blocks_before_the_first_document(monkeypatch):
  monkeypatch.setattr(chunked, 'BLOCK', 4)
  a = [1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 0]  # document 2 starts in block 1
  b = [1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 0, 0, 0, 0]  # block 2 still sees document 1

  def blocks(*rows, length=14, first=0):
    rows = chunked._rows(jnp.array(rows), length, first, block=4)
    return list(zip(rows.first.tolist(), rows.end.tolist()))

  assert blocks(a) == [(0, 1), (0, 2), (1, 3), (1, 4)]
  assert blocks(b) == [(0, 1), (0, 2), (0, 3), (3, 4)]
  assert blocks(a, b) == [(0, 1), (0, 2), (0, 3), (1, 4)]  # what some row needs
  # The second half, tokens 7 to 13, in blocks 7-10 and 11-13.
  assert blocks(a, length=7, first=7) == [(1, 3), (1, 4)]


def test_a_remat_policy_that_saves_chunked_outputs_spares_the_second_forward():
  arrays, rows = operands(SHAPES['MHA'])[:3], batch()

  def loops(*saved):
    policy = jax.checkpoint_policies.save_only_these_names(*saved)
    fn = jax.checkpoint(lambda *a: jnp.tanh(chunked.attend(*a, *rows, 0.5)), policy=policy)
    program = jax.make_jaxpr(jax.grad(lambda *a: jnp.sin(fn(*a)).sum()))(*arrays)
    return sum(eqn.primitive.name == 'while' for eqn in tiny.equations(program))

  assert loops('attn_out') == loops() - 1


# dot_product


@pytest.mark.parametrize('length, head_dims', [(16, (8, 8)), (15, (12, 6)), (15, (6, 12))])
def test_what_cudnn_is_given(monkeypatch, length, head_dims):
  """Even length, equal widths, a multiple of 8; the result is as without."""
  given = []

  def record(q, k, v, *, implementation, **rest):
    given.append((implementation, q.shape, k.shape, v.shape, rest['mask'].shape))
    return original(q, k, v, implementation='xla', **rest)

  original = jax.nn.dot_product_attention
  monkeypatch.setattr(jax.nn, 'dot_product_attention', record)
  monkeypatch.setattr(dot_product, 'cudnn_runs', lambda *args: True)
  shape = Shape(2, 1, *head_dims, 0.4)
  *arrays, d_out = operands(shape, rows=1, length=length)
  positions, ids = batch([(5, 7)], length)
  got = dot_product.attend(*arrays, positions, ids, shape.scale)
  want, _ = written_out(*arrays, d_out, ids, shape.scale)
  np.testing.assert_allclose(got[:, :12], want[:, :12], **CLOSE)
  width = -max(head_dims) // 8 * -8
  q, kv = (1, 16, 2, width), (1, 16, 1, width)
  assert given == [('cudnn', q, kv, kv, (1, 1, 16, 16))]


# tokamax


def test_tokamax_without_a_gpu_says_what_to_do(monkeypatch):
  arrays = operands(SHAPES['MHA'])[:3]
  with pytest.raises(
    errors.InputError, match=r"attention\.impl='tokamax' .*'cpu'.*'auto'.*chunked"
  ):
    kernels_lib.ATTENDS['tokamax'](*arrays, *batch(), 1.0)
  on(monkeypatch, 'gpu', (9, 0))
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(errors.InputError, match=r"attention\.impl='tokamax' .*moe_jax\[cuda\]"):
    choose('tokamax')


def test_document_starts_by_hand():
  ids = jnp.array([[3, 3, 5, 5, 5, 0, 0], [1, 2, 2, 2, 2, 2, 2]])
  np.testing.assert_array_equal(
    tokamax.document_starts(ids), [[0, 0, 2, 2, 2, 5, 6], [0, 1, 1, 1, 1, 1, 1]]
  )


@pytest.mark.parametrize('kernels', [('xla',), ('xla_chunked',)])
def test_tokamax_for_a_part_of_the_queries_is_that_part(kernels):
  """The last 100 tokens against keys of whole rows; sums of up to 150 float32 terms."""
  shape, (positions, ids) = SHAPES['MLA'], batch()
  q, k, v, _ = operands(shape)
  run = tiny.jit(functools.partial(tokamax.attend, scale=shape.scale, kernels=kernels))
  whole, part = run(q, k, v, positions, ids), run(q[:, 50:], k, v, positions, ids, first=50)
  real = np.asarray(ids[:, 50:]) > 0
  np.testing.assert_allclose(np.asarray(part)[real], np.asarray(whole[:, 50:])[real], **CLOSE)


# splash


def test_splash_without_a_tpu_says_what_to_do():
  *arrays, _ = operands(SHAPES['MHA'])
  with pytest.raises(errors.InputError, match=r"attention\.impl='splash' .*'cpu'.*'auto'.*chunked"):
    kernels_lib.ATTENDS['splash'](*arrays, *batch(), 1.0)


@pytest.mark.parametrize('length, block', [(128, 128), (512, 512), (640, 128), (1280, 256)])
def test_splash_takes_the_largest_block_that_divides_the_length(monkeypatch, length, block):
  monkeypatch.setattr(splash, 'BLOCKS', (512, 256, 128))
  sizes = splash._kernel(2, length, 1, interpret=True).kwargs['block_sizes']
  assert {sizes.block_q, sizes.block_kv, sizes.block_q_dkv, sizes.block_kv_dq} == {block}


# choose


def choose(name='auto', dims=(64, 64), length=256, dtype='bfloat16'):
  head_dim, v_head_dim = dims
  return kernels_lib.choose(
    name, head_dim=head_dim, v_head_dim=v_head_dim, length=length, dtype=dtype
  )


def on(monkeypatch, platform, capability=()):
  monkeypatch.setattr(hardware, 'platform', lambda: platform)
  monkeypatch.setattr(hardware, 'compute_capability', lambda: capability)


def test_auto_on_a_cpu_asks_the_length():
  assert choose(length=511) == 'reference'
  assert choose(length=512) == 'chunked'


def test_auto_on_a_tpu_is_splash(monkeypatch):
  on(monkeypatch, 'tpu')
  assert choose() == choose('splash') == choose(dims=(192, 128), dtype='float32') == 'splash'


@pytest.mark.parametrize(
  'capability, dims, dtype, short, long',
  [
    ((9, 0), (128, 128), 'bfloat16', 'dot_product', 'tokamax'),  # no mask of a long row
    ((9, 0), (192, 128), 'float16', 'tokamax', 'tokamax'),  # nothing is padded
    ((10, 0), (256, 256), 'bfloat16', 'dot_product', 'tokamax'),
    ((9, 0), (264, 264), 'bfloat16', 'reference', 'tokamax'),  # too wide for cuDNN
    ((9, 0), (128, 128), 'float32', 'reference', 'chunked'),
    ((8, 0), (128, 128), 'bfloat16', 'dot_product', 'tokamax'),
    ((8, 9), (136, 136), 'bfloat16', 'reference', 'tokamax'),
    ((8, 0), (64, 136), 'bfloat16', 'tokamax', 'tokamax'),
    ((7, 5), (64, 64), 'bfloat16', 'reference', 'chunked'),
    ((), (64, 64), 'bfloat16', 'reference', 'chunked'),  # no NVIDIA GPU
  ],
)
def test_auto_on_a_gpu(monkeypatch, capability, dims, dtype, short, long):
  on(monkeypatch, 'gpu', capability)
  assert choose(dims=dims, dtype=dtype, length=256) == short
  assert choose(dims=dims, dtype=dtype, length=4096) == long


def test_auto_on_a_gpu_without_tokamax_is_cudnn_where_it_serves(monkeypatch):
  on(monkeypatch, 'gpu', (9, 0))
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  assert choose(dims=(192, 128), length=4096) == 'dot_product'
  assert choose(dims=(264, 128), length=4096) == 'chunked'


def test_a_named_implementation_is_taken_where_it_runs(monkeypatch):
  for platform in BACKENDS:
    on(monkeypatch, platform)
    for name in ('reference', 'chunked', 'dot_product'):
      assert choose(name, length=10_000) == name
  for platform in ('cpu', 'gpu'):
    on(monkeypatch, platform)
    with pytest.raises(errors.InputError, match=rf"attention\.impl='splash' .*'{platform}'.*auto"):
      choose('splash')


def test_the_config_and_the_table_know_the_same_names():
  assert ('auto', *kernels_lib.ATTENDS) == attention_config.IMPLS


def test_an_unknown_name():
  with pytest.raises(errors.InputError, match=r"attention\.impl='chunk'.*did you mean 'chunked'"):
    choose('chunk')


@pytest.mark.parametrize(
  'kind, want',
  [('TPU v5 lite', 'tpu'), ('TPU7x', 'tpu'), ('NVIDIA H100 80GB HBM3', 'gpu'), ('cpu', 'cpu')],
)
def test_the_platform_is_that_of_the_mesh_in_force(monkeypatch, kind, want):
  mesh = types.SimpleNamespace(abstract_device=types.SimpleNamespace(device_kind=kind))
  monkeypatch.setattr(jax.sharding, 'get_abstract_mesh', lambda: mesh)
  assert hardware.platform() == want


def test_the_platform_without_a_mesh_and_under_one_of_this_host():
  assert hardware.platform() == 'cpu'
  with partitioning.activate(tiny.mesh(data=8)):
    assert hardware.platform() == 'cpu'


@pytest.mark.parametrize(
  'version, want', [('9.0', (9, 0)), ('12.1', (12, 1)), ('gfx90a', ()), (None, ())]
)
def test_compute_capability(monkeypatch, version, want):
  device = type('Device', (), {'compute_capability': version} if version else {})
  monkeypatch.setattr(backend, 'get_default_device', lambda: device)
  assert hardware.compute_capability() == want


SCRIPT = """
import dataclasses
import functools
import json
import re
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from configs import base
from moe_jax import config, partitioning
from moe_jax.models import attend
from moe_jax.models.attention.kernels import sharded

chips = topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x4').devices
page = parse.from_dict(base.get_config().to_dict()).mesh
found = []
for axes, heads, kv_heads, h, hv, length in (
    (dict(data=8), 8, 8, 192, 128, 2048), (dict(data=8), 8, 2, 128, 128, 1000),
    (dict(data=2, sequence=2, tensor=2), 8, 8, 192, 128, 2048),
    (dict(data=1, sequence=8), 8, 2, 128, 128, 8192)):
  mesh = partitioning.make_mesh(dataclasses.replace(page, **axes), chips)

  def loss(q, k, v, positions, ids):
    sizes = dict(head_dim=h, v_head_dim=hv, length=length, dtype='bfloat16')
    fn = functools.partial(kernels.ATTENDS[kernels.choose('auto', **sizes)], scale=0.1)
    source = sharded.Source((k, v), lambda k, v: (k, v))
    return sharded.attend(fn, q, source, positions, ids).astype(jnp.float32).sum()

  with partitioning.activate(mesh):
    put = lambda dtype, *names: lambda *shape: jax.ShapeDtypeStruct(
        (8, length, *shape), dtype, sharding=jax.NamedSharding(mesh, partitioning.spec(*names)))
    array = put('bfloat16', 'act_batch', 'act_len', 'act_heads', None)
    ids = put('int32', 'act_batch', 'act_len')()
    args = array(heads, h), array(kv_heads, h), array(kv_heads, hv), ids, ids
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*args).compile()
  hlo = compiled.as_text()
  found.append({
    'kernels': hlo.count('tpu_custom_call'),
    'all_gathers': len(re.findall(r' all-gather(-start)?[(]', hlo)),
    'reduce_scatters': len(re.findall(r'reduce-scatter', hlo)),
    'mib': compiled.memory_analysis().temp_size_in_bytes / 2**20,
  })
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec('libtpu'), reason="needs the extra 'tpu'")
def test_splash_compiles_for_eight_chips_with_rows_heads_and_queries_split():
  env = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'TPU_SKIP_MDS_QUERY': '1',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': 'true',
    'PYTHONPATH': str(ROOT),
  }
  command = [sys.executable, '-c', SCRIPT]
  done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=True)
  found = json.loads(done.stdout.splitlines()[-1])
  for program in found:
    assert program['kernels'] == 3  # forward; gradients of the queries; of keys and values
  assert [program['all_gathers'] > 0 for program in found] == [False, False, True, True]
  assert [program['reduce_scatters'] > 0 for program in found] == [False, False, True, True]
  # One score matrix [1, 8, 2048, 2048] in float32 would be 128, one [8, 8, 1024, 8192] 2048.
  assert max(program['mib'] for program in found[:3]) < 64
  assert found[3]['mib'] < 512
