"""Attention on meshes against `reference` on one device: values, gradients, and what travels.

`splash` runs in Pallas' interpreter here; that it compiles for chips that are not there, with heads
and queries split, is a slow test of test_attend.py.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import errors
from moe_jax.devices import hardware, partitioning
from moe_jax.models.attention import kernels
from moe_jax.models.attention.kernels import chunked, sharded, short, splash
from tests import tiny
from tests.models import blocks

ATTENDS = kernels.ATTENDS | {'splash': functools.partial(splash.attend, interpret=True)}
SCALE = 0.4
# Both sides multiply float32 numbers of order 1 and add up to 256 of them, in another order.
CLOSE = dict(rtol=1e-4, atol=2e-5)


class Shape(NamedTuple):
  heads: int
  kv_heads: int
  head_dim: int
  v_head_dim: int


GQA, MLA = Shape(4, 2, 8, 8), Shape(2, 2, 12, 8)
MESHES = {
  'data=2, sequence=4': dict(data=2, sequence=4),
  'sequence=2, tensor=2': dict(sequence=2, tensor=2),
  'data=4, tensor=2': dict(data=4, tensor=2),
  'fsdp=2, sequence=2, tensor=2': dict(fsdp=2, sequence=2, tensor=2),
}
# Documents that cross the cuts at quarters and halves, start on them, end in padding; padding only.
SHORT, LONG = 40, 256
LENGTHS = {
  SHORT: ((40,), (7, 13, 12), (), (10, 10, 1, 19)),
  LONG: ((256,), (40, 170, 20), (), (1, 127, 64, 64)),
}


@pytest.fixture(autouse=True, scope='module')
def small_blocks():
  """Parts of 10 and 20 queries in blocks of 8: no cut is at the border of a block."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(chunked, 'BLOCK', 8)
    patch.setattr(short, 'BLOCK', 16)
    patch.setattr(splash, 'BLOCKS', (splash.LANES,))
    yield


@functools.cache
def operands(shape, length):
  """q, k, v, a cotangent of the outputs, positions and segment ids."""
  rng = np.random.default_rng(0)
  rows = [tiny.row(entry, length) for entry in LENGTHS[length]]

  def draw(n, h):
    return jnp.asarray(rng.normal(size=(len(rows), length, n, h)), jnp.float32)

  n, kv, h, hv = shape
  ids = [jnp.asarray(np.stack([row[key] for row in rows])) for key in ('positions', 'segment_ids')]
  return (draw(n, h), draw(kv, h), draw(kv, hv), draw(n, hv), *ids)


def run(name, q, k, v, d_out, positions, segment_ids):
  """(out, the gradients of q, k and v); 0 for padding."""

  def fn(q, k, v):
    source = sharded.Source((k, v), lambda k, v: (k, v))
    program = functools.partial(ATTENDS[name], scale=SCALE)
    return sharded.attend(program, q, source, positions, segment_ids)

  real = (segment_ids > 0)[..., None, None]
  out, pullback = jax.vjp(fn, q, k, v)
  return jnp.where(real, out, 0), pullback(jnp.where(real, d_out, 0))


def compile_on(axes, name, shape, length):
  """(the program, its arguments on the mesh)."""
  mesh = tiny.mesh(**axes)
  with partitioning.activate(mesh):
    heads = partitioning.spec('act_batch', 'act_len', 'act_heads', None)
    specs = [heads] * 4 + [partitioning.BATCH_SPEC] * 2

    def put(a, spec):
      return jax.device_put(a, jax.NamedSharding(mesh, spec))

    arrays = list(map(put, operands(shape, length), specs))
    program = tiny.jit(functools.partial(run, name)).lower(*arrays).compile()
  return program, arrays


@functools.cache
def on_one_device(shape, length):
  return tiny.jit(functools.partial(run, 'reference'))(*operands(shape, length))


CASES = {
  f'{name}, {mesh}': (name, axes)
  for name in ('reference', 'short', 'chunked', 'dot_product')
  for mesh, axes in MESHES.items()
  if name not in ('short', 'dot_product') or 'sequence' not in axes  # refused, see below
}


@pytest.mark.parametrize('shape', [GQA, MLA], ids=['GQA', 'MLA'])
@pytest.mark.parametrize('name, axes', CASES.values(), ids=CASES)
def test_parts_are_those_of_one_device(name, axes, shape):
  program, arrays = compile_on(axes, name, shape, SHORT)
  tiny.assert_trees_close(program(*arrays), on_one_device(shape, SHORT), **CLOSE)


@pytest.mark.parametrize('axes', [dict(sequence=2, tensor=2), dict(data=4, tensor=2)], ids=str)
def test_parts_of_splash_are_those_of_one_device(axes):
  """The kernel's tables for each part of the queries, in the interpreter."""
  program, arrays = compile_on(axes, 'splash', GQA, LONG)
  tiny.assert_trees_close(program(*arrays), on_one_device(GQA, LONG), **CLOSE)


@pytest.mark.parametrize('name', ['reference', 'short', 'chunked', 'splash'])
def test_rows_and_heads_stay_where_they_are(name):
  """Nothing travels where no row is split."""
  length = LONG if name == 'splash' else SHORT
  axes = dict(data=4, tensor=2)
  program, _ = compile_on(axes, name, GQA, length)
  assert blocks.travelling(program, axes) == {}


@pytest.mark.parametrize('name', ['reference', 'chunked'])
def test_keys_are_gathered_and_their_gradients_scattered(name):
  """Each device has two rows, of which three of four parts are sent."""
  axes = dict(data=2, sequence=4)
  program, (_, k, v, *_, ids) = compile_on(axes, name, GQA, SHORT)
  share = 3 / 4 / 2
  sent = blocks.travelling(program, axes)['sequence']
  keys, rows = share * (k.nbytes + v.nbytes), share * ids.nbytes
  assert keys + rows <= sent.pop('all-gather') <= keys + 2 * rows  # documents, maybe positions
  assert sent == {'reduce-scatter': keys}


def test_an_implementation_that_cannot_split_rows_is_refused_and_auto_takes_another(monkeypatch):
  sizes = dict(head_dim=64, v_head_dim=64, length=4096, dtype='bfloat16')
  with partitioning.activate(tiny.mesh(sequence=4)):
    with pytest.raises(errors.InputError, match=r"'dot_product' .*mesh\.sequence=4 .*'chunked'"):
      kernels.choose('dot_product', **sizes)
    with pytest.raises(errors.InputError, match=r"'short' .*mesh\.sequence=4 .*'auto'"):
      kernels.choose('short', **sizes)
    assert kernels.choose('auto', **sizes | {'length': 128}) == 'reference'
    monkeypatch.setattr(hardware, 'platform', lambda: 'gpu')
    monkeypatch.setattr(hardware, 'compute_capability', lambda: (9, 0))
    assert kernels.choose('auto', **sizes) == 'tokamax'
    assert kernels.choose('auto', **sizes | {'dtype': 'float32'}) == 'chunked'
    monkeypatch.setattr(hardware, 'platform', lambda: 'tpu')
    assert kernels.choose('auto', **sizes) == kernels.choose('splash', **sizes) == 'splash'
    sizes['length'] = 4096 + 4 * 64
    message = r'max_seq_len=4352 over config\.mesh\.sequence=4 gives 1088; .*multiple of 512'
    with pytest.raises(errors.InputError, match=message):
      kernels.choose('splash', **sizes)
    assert kernels.choose('auto', **sizes) == 'chunked'
  with partitioning.activate(tiny.mesh(tensor=4)):
    assert kernels.choose('dot_product', **sizes) == 'dot_product'
