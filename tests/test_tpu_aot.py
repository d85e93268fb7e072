"""The train step compiles for TPU chips that are not there (extra `tpu`)."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SCRIPT = """
import json
import re
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from configs import base
from moe_jax import config, partitioning, train

page = base.get_config()
page.update_from_flattened_dict({
  'model.vocab_size': 512, 'model.max_seq_len': 256, 'model.num_layers': 3,
  'model.num_heads': 2, 'model.attention.num_kv_heads': 2, 'model.attention.head_dim': 128,
  'model.moe.num_experts': 16, 'model.moe.num_experts_per_tok': 4, 'model.moe.moe_mlp_dim': 128,
  'model.moe.grouped_matmul': 'ragged_dot', 'model.dtype': 'bfloat16', 'model.remat': 'moe_core',
  'train.batch_size': 16, 'train.micro_batch_size': 8,
})
cfg = config.from_dict(page.to_dict())
chips = topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2').devices
mesh = partitioning.make_mesh(cfg.mesh, chips)
rows = jax.NamedSharding(mesh, partitioning.BATCH_SPEC)
batch = {k: jax.ShapeDtypeStruct((16, 256), jnp.int32, sharding=rows) for k in train.BATCH_KEYS}
with partitioning.activate(mesh):
  state = train.abstract_state(cfg, mesh)
  compiled = train.make_train_step(cfg, mesh).lower(state, batch).compile()
hlo, memory = compiled.as_text(), compiled.memory_analysis()
print(json.dumps({
  'grouped_kernels': hlo.count('tpu_custom_call'),
  'all_gathers': len(re.findall(r' all-gather(-start)?[(]', hlo)),
  # Rows of width embed_dim = 256 may be scattered into the embedding's gradient only.
  'wide_scatters': re.findall(r'(?:f32|bf16)[[](\\d+,256)[^ ]* scatter[(]', hlo),
  'donated_share': memory.alias_size_in_bytes / memory.argument_size_in_bytes,
}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec('libtpu'), reason="needs the extra 'tpu'")
def test_the_train_step_compiles_for_four_chips():
  env = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'TPU_SKIP_MDS_QUERY': '1',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': 'true',
    'PYTHONPATH': str(ROOT),
  }
  command = [sys.executable, '-c', SCRIPT]
  done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=True)
  found = json.loads(done.stdout.splitlines()[-1])
  assert found['grouped_kernels'] >= 6  # two products forward, four backward
  assert found['all_gathers'] == 0  # tokens stay on their chip
  assert set(found['wide_scatters']) <= {'512,256'}
  assert found['donated_share'] > 0.99
