"""The train step compiles for TPU chips that are not there (extra `tpu`)."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = """
import json
import re
import sys
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from configs import base
from moe_jax.config import parse
from moe_jax.devices import partitioning
from moe_jax.planning import flops
from moe_jax.planning.hlo import collectives, hlo_cost
from moe_jax.training import objective, optimizer_step, train_state

page = base.get_config()
page.update_from_flattened_dict({
  'model.vocab_size': 512, 'model.max_seq_len': 256, 'model.num_layers': 3,
  'model.num_heads': 2, 'model.attention.num_kv_heads': 2, 'model.attention.head_dim': 128,
  'model.moe.num_experts': 16, 'model.moe.num_experts_per_tok': 4, 'model.moe.moe_mlp_dim': 128,
  'model.dtype': 'bfloat16', 'model.remat': 'moe_core',
  'train.batch_size': 16, 'train.micro_batch_size': 8, **json.loads(sys.argv[1]),
})
cfg = parse.from_dict(page.to_dict())
chips = topologies.get_topology_desc(platform='tpu', topology_name=sys.argv[2]).devices
mesh = partitioning.make_mesh(cfg.mesh, chips)
rows = jax.NamedSharding(mesh, partitioning.BATCH_SPEC)
shape = jax.ShapeDtypeStruct((cfg.train.batch_size, 256), jnp.int32, sharding=rows)
batch = dict.fromkeys(objective.BATCH_KEYS, shape)
with partitioning.activate(mesh):
  state = train_state.abstract_state(cfg, mesh)
  compiled = optimizer_step.make_train_step(cfg, mesh).lower(state, batch).compile()
text, memory = compiled.as_text(), compiled.memory_analysis()
along = {}
for one in collectives.collectives(text, mesh):
  along.setdefault('+'.join(one.axes), set()).add(one.kind)
# The text is in the order of the schedule: what stands between start and done runs meanwhile.
meanwhile = [
  part.split('all-to-all-done(', 1)[0] for part in text.split(' all-to-all-start(')[1:]
]
model_flops = flops.train_flops_per_token(cfg.model) * cfg.train.batch_size * 256
model_flops /= mesh.size
print(json.dumps({
  'row_kernels': len(re.findall(r'%ragged-dot-none[.\\w]* =', text)),
  'weight_kernels': len(re.findall(r'%tgmm[.\\w]* =', text)),
  # Of the products outside of kernels, which are the rest of the model.
  'flops_ratio': hlo_cost.cost(text).dot_flops / model_flops,
  'along': {axes: sorted(kinds) for axes, kinds in along.items()},
  'shared_meanwhile': sum('/shared/' in part for part in meanwhile),
  # Rows of width embed_dim = 256 may be scattered into the embedding's gradient only.
  'wide_scatters': re.findall(r'(?:f32|bf16)[[](\\d+,256)[^ ]* scatter[(]', text),
  'donated_share': memory.alias_size_in_bytes / memory.argument_size_in_bytes,
}))
"""


LAYER = """
import json
import re
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from configs import base
from moe_jax.config import parse
from moe_jax.devices import partitioning
from moe_jax.models.dispatch import dropless

tokens, d, e, f, k = 32768, 1024, 16, 512, 6
chips = topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2').devices
mesh = partitioning.make_mesh(parse.from_dict(base.get_config().to_dict()).mesh, chips[:1])
place = jax.NamedSharding(mesh, jax.P())
array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
cast = lambda a: a.astype(jnp.bfloat16)

def forward(x, gates, idx, gate_up, down):
  experts = lambda x, gates, a, b: dropless.dispatch(x, gates, idx, cast(a), cast(b), 'auto', 0)
  return jax.vjp(experts, x, gates, gate_up, down)

def found(fn, *args):
  program = jax.jit(fn).lower(*args).compile()
  shapes = set(re.findall(r'[[]([0-9]+(?:,[0-9]+)*)[]]', program.as_text()))
  return {
    'ratio': program.memory_analysis().temp_size_in_bytes / (tokens * k * d * 2),
    'expanded': [s for s in shapes if {str(e), str(tokens * k)} <= set(s.split(','))],
  }

with partitioning.activate(mesh):
  args = array((tokens, d), jnp.bfloat16), array((tokens, k), jnp.float32)
  args += array((tokens, k), jnp.int32), array((e, d, 2, f), jnp.float32)
  args += (array((e, f, d), jnp.float32),)
  made = jax.eval_shape(forward, *args)
  out, pullback = jax.tree.map(lambda a: array(a.shape, a.dtype), made)
  print(json.dumps([found(forward, *args), found(lambda g, d: g(d), pullback, out)]))
"""


needs_libtpu = pytest.mark.skipif(
  not importlib.util.find_spec('libtpu'), reason="needs the extra 'tpu'"
)


def run_script(script, *arguments):
  """What it prints last."""
  env = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'TPU_SKIP_MDS_QUERY': '1',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': 'true',
    'PYTHONPATH': str(ROOT),
  }
  command = [sys.executable, '-c', script, *arguments]
  done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


def compile_step(settings, topology):
  """What the compiler made of the step, see SCRIPT."""
  found = run_script(SCRIPT, json.dumps(settings), topology)
  assert found['row_kernels'] >= 4  # two products forward, two backward
  assert found['weight_kernels'] >= 2
  assert found['flops_ratio'] < 1.2  # no product over all experts
  assert set(found['wide_scatters']) <= {'512,256'}
  assert found['donated_share'] > 0.99
  return found


@pytest.mark.slow
@needs_libtpu
def test_data_parallel_steps_exchange_gradients_only():
  found = compile_step({}, 'v5e:2x2')
  assert found['along'] == {'data': ['all-reduce']}  # tokens stay on their chip


@pytest.mark.slow
@needs_libtpu
def test_expert_parallel_steps_send_tokens_while_they_compute():
  found = compile_step({'mesh.data': 1, 'mesh.fsdp': 2, 'mesh.expert': 4}, 'v5e:2x4')
  assert 'all-to-all' in found['along']['expert']
  assert 'all-gather' not in found['along']['expert']
  assert {'all-gather', 'reduce-scatter'} <= set(found['along']['fsdp'])
  assert found['shared_meanwhile'] > 0  # forward or backward, in one of the layers


@pytest.mark.slow
@needs_libtpu
def test_expert_parallel_steps_compile_for_a_large_v5e():
  """Its compiler refuses asynchronous and ragged all-to-alls there."""
  mesh = {'mesh.data': 1, 'mesh.fsdp': 4, 'mesh.expert': 16, 'train.micro_batch_size': 0}
  found = compile_step(mesh | {'train.batch_size': 64}, 'v5e:8x8')
  assert 'all-to-all' in found['along']['expert'] and not found['shared_meanwhile']


@pytest.mark.slow
@needs_libtpu
def test_a_three_dimensional_torus_sends_what_is_needed():
  found = compile_step({'mesh.data': 2, 'mesh.expert': 4, 'mesh.zero1': True}, 'v5p:2x2x2')
  assert 'ragged-all-to-all' in found['along']['expert']


@pytest.mark.slow
@needs_libtpu
def test_stages_hand_their_states_on():
  found = compile_step({'mesh.data': 1, 'mesh.stage': 2, 'mesh.expert': 2}, 'v5e:2x2')
  assert 'collective-permute' in found['along']['stage']
  assert 'all-to-all' in found['along']['expert'] and found['shared_meanwhile'] > 0


@pytest.mark.slow
@needs_libtpu
def test_experts_hold_at_most_three_times_the_rows_that_are_routed():
  """Forward and backward of a layer, in bytes of [T K, D]; no expert has a copy of the rows."""
  for program in run_script(LAYER):
    assert program['ratio'] <= 3 and not program['expanded']
