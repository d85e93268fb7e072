import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from moe_jax import errors
from moe_jax.models.attention import kernels as kernels_lib
from moe_jax.models.attention.kernels import (
  chunked,
  splash,
)
from tests.models.attention.kernels import operands

ROOT = pathlib.Path(__file__).parents[4]


@pytest.fixture(autouse=True, scope='module')
def small_blocks():
  """Several blocks per row, so that there are some before, on and after the diagonal."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(chunked, 'BLOCK', 32)
    patch.setattr(splash, 'BLOCKS', (splash.LANES,))
    yield


# splash


def test_splash_without_a_tpu_says_what_to_do():
  *arrays, _ = operands.operands(operands.SHAPES['MHA'])
  with pytest.raises(errors.InputError, match=r"attention\.impl='splash' .*'cpu'.*'auto'.*chunked"):
    kernels_lib.ATTENDS['splash'](*arrays, *operands.batch(), 1.0)


@pytest.mark.parametrize('length, block', [(128, 128), (512, 512), (640, 128), (1280, 256)])
def test_splash_takes_the_largest_block_that_divides_the_length(monkeypatch, length, block):
  monkeypatch.setattr(splash, 'BLOCKS', (512, 256, 128))
  sizes = splash._kernel(2, length, 1, interpret=True).kwargs['block_sizes']
  assert {sizes.block_q, sizes.block_kv, sizes.block_q_dkv, sizes.block_kv_dq} == {block}


SCRIPT = """
import dataclasses
import functools
import json
import re
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from configs import base
from moe_jax.config import parse
from moe_jax.devices import partitioning
from moe_jax.models.attention import kernels
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
