import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from moe_jax import errors
from moe_jax.checkpoints import checkpointer, stream_reader, stream_writer
from moe_jax.config import schema
from tests.checkpoints import streams

# Orbax leaves coroutines behind when a read fails.
pytestmark = pytest.mark.filterwarnings('ignore:coroutine .* was never awaited')


def test_restores_like_a_step_of_a_training_run(streamed, saved, tree, caplog):
  with (
    checkpointer.Checkpointer(streamed, None) as ours,
    checkpointer.Checkpointer(saved, None) as its,
  ):
    assert ours.read_record() == its.read_record()
    restored = ours.restore(streams.abstract(tree))
    streams.assert_same(restored.state, its.restore(streams.abstract(tree)).state)
  streams.assert_same(restored.state, tree)
  assert restored.meta == {'config': {'train': {'ramp': [1, 2]}}, 'tokenizer': 'digest', 'step': 0}
  assert not caplog.text


def test_restores_sharded(streamed, tree):
  mesh = jax.make_mesh((2, 4), ('data', 'expert'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  target = streams.abstract(tree, jax.NamedSharding(mesh, jax.P()))
  spec = jax.NamedSharding(mesh, jax.P(None, 'expert', 'data'))
  gate_up = target['params']['moe_layers']['gate_up']
  target['params']['moe_layers']['gate_up'] = gate_up.update(sharding=spec)
  with checkpointer.Checkpointer(streamed, None) as ckpt:
    restored = ckpt.restore(target).state
  assert restored['params']['moe_layers']['gate_up'].sharding == spec
  streams.assert_same(restored, tree)


def test_plain_orbax_restores_it_and_its_tree_is_described_alike(streamed, saved, tree):
  with ocp.StandardCheckpointer() as plain:
    target = streams.abstract(tree, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    streams.assert_same(plain.restore(streamed / '0/state', target), tree)
  ours, its = (json.loads((p / '0/state/_METADATA').read_text()) for p in (streamed, saved))
  for node in its['tree_metadata'].values():
    node['value_metadata'].pop('write_shape', None)
  assert ours == {**its, 'use_ocdbt': False}
  ours, its = (json.loads((p / '0/_CHECKPOINT_METADATA').read_text()) for p in (streamed, saved))
  assert ours.keys() == its.keys() and ours['item_handlers'] == its['item_handlers']


def test_incomplete_leaf_is_refused_by_name(tree, tmp_path):
  message = (
    f'{streams.GATE_UP} got 3584 of its 4096 elements, the first of 1 unfinished arrays of step 0'
  )
  with pytest.raises(errors.InputError, match=message):
    streams.write(tmp_path, tree, skip=f'{streams.GATE_UP}/5')
  with pytest.raises(errors.InputError, match='router_state/count got 0 of its 1 elements'):
    streams.write(tmp_path, tree, skip='router_state/count')
  assert not list(tmp_path.iterdir())


def test_killed_writer_leaves_no_step_and_does_not_block_the_next(tree, tmp_path):
  with (
    pytest.raises(KeyboardInterrupt),
    stream_writer.Writer(tmp_path, 0, tree, streams.META) as writer,
  ):
    writer.write('params/embed', (), tree['params']['embed'])
    raise KeyboardInterrupt
  assert not list(tmp_path.iterdir())
  # Killed without a word: nothing is cleaned up.
  killed = stream_writer.Writer(tmp_path, 0, tree, streams.META).__enter__()
  streams.write_all(killed, tree)
  assert [p.name for p in tmp_path.iterdir()] == ['0.orbax-checkpoint-tmp']
  with checkpointer.Checkpointer(tmp_path, None, read_only=True) as ckpt:
    assert ckpt.steps() == [] and ckpt.restore(streams.abstract(tree)) is None
  streams.write(tmp_path, tree)
  assert [p.name for p in tmp_path.iterdir()] == ['0']
  # A training run that opens the directory clears such a leftover away.
  stream_writer.Writer(tmp_path, 1, tree, streams.META).__enter__()
  with checkpointer.Checkpointer(tmp_path, schema.CheckpointConfig(1, 1, 0)) as ckpt:
    streams.assert_same(ckpt.restore(streams.abstract(tree)).state, tree)
  assert [p.name for p in tmp_path.iterdir()] == ['0']


def test_an_existing_step_is_not_overwritten(tree, tmp_path):
  streams.write(tmp_path, tree)
  with pytest.raises(errors.InputError, match='step=0 is already among the checkpoints'):
    streams.write(tmp_path, tree)
  with pytest.raises(errors.InputError, match='step=5 is already'):
    with stream_writer.Writer(tmp_path, 5, tree, streams.META) as writer:
      streams.write_all(writer, tree)
      (tmp_path / '5').mkdir()  # somebody else was faster
  assert sorted(p.name for p in tmp_path.iterdir()) == ['0', '5']
  with checkpointer.Checkpointer(tmp_path, None) as ckpt:
    assert ckpt.restore(streams.abstract(tree), step=0).step == 0


def test_misuse_is_refused(tree, streamed, tmp_path):
  with pytest.raises(RuntimeError, match='done'):
    with stream_writer.Writer(tmp_path, 0, tree, streams.META) as writer:
      gate = np.zeros((streams.EMBED, streams.FFN), jnp.bfloat16)
      with pytest.raises(ValueError, match="not a leaf .* did you mean 'params/embed'"):
        writer.write('params/embedd', (), gate)
      with pytest.raises(ValueError, match=r'takes bfloat16\[16, 8\], not bfloat16\[8, 16\]'):
        writer.write(streams.GATE_UP, (0, 0, slice(None), 0), gate.T)
      with pytest.raises(ValueError, match=r'not float32\[16, 8\]'):
        writer.write(streams.GATE_UP, (0, 0, slice(None), 0), gate.astype(np.float32))
      for index in ((0, streams.EXPERTS), (-1, 0), (0, 0, slice(0, 4, 2))):
        with pytest.raises(ValueError, match='is no block of an array'):
          writer.write(streams.GATE_UP, index, gate)
      writer.write(streams.GATE_UP, (0, 0, slice(None), 0), gate)
      with pytest.raises(ValueError, match='already written'):
        writer.write(
          streams.GATE_UP, (0, 0), np.zeros((streams.EMBED, 2, streams.FFN), jnp.bfloat16)
        )
      raise RuntimeError('done')
  with stream_reader.Reader(streamed) as reader:
    with pytest.raises(ValueError, match='more axes'):
      reader.read('params/bias', (0, 0))
    with pytest.raises(ValueError, match='not a leaf'):
      reader.read('params/none')
  with pytest.raises(errors.InputError, match='step=3 is not among'):
    stream_reader.Reader(streamed, 3)
  with pytest.raises(errors.InputError, match='holds no checkpoints'):
    stream_reader.Reader(tmp_path / 'none')
  with pytest.raises(errors.InputError, match='not on a local disk'):
    stream_writer.Writer('gs://bucket/checkpoints', 0, tree, streams.META)


def test_too_little_room_is_refused_before_a_byte_is_written(tmp_path):
  leaves = {'params': {'x': jax.ShapeDtypeStruct((2**30, 2**20), jnp.float32)}}
  with pytest.raises(errors.InputError, match='a checkpoint of 4503599.6 GB is to be written'):
    with stream_writer.Writer(tmp_path / 'new', 0, leaves, streams.META):
      pass
  assert not list(tmp_path.iterdir())


def test_a_training_run_is_told_to_start_from_an_import(streamed, tree):
  full = streams.abstract({**tree, 'step': np.array(0), 'opt_state': {'mu': tree['params']}})
  with checkpointer.Checkpointer(streamed, None) as ckpt:
    message = f'holds weights only.*--config.init_from={streamed.parent} and another --workdir'
    with pytest.raises(errors.InputError, match=message):
      ckpt.restore(full)


_PROGRAM = """
import resource, sys
import jax, jax.numpy as jnp, numpy as np
from moe_jax.checkpoints import stream_reader, stream_writer
mode, path = sys.argv[1:]
shape = (24, 16, 512, 2, 2048)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
leaf = np.arange(shape[2] * shape[4], dtype=np.uint32).reshape(shape[2], shape[4])
piece = lambda *at: (leaf * np.uint32(1 + sum(at))).view(np.uint16)[:, ::2].view(jnp.bfloat16)
piece(0)
leaves = {'params': {'x': jax.ShapeDtypeStruct(shape, jnp.bfloat16)}}
before = peak()
if mode == 'write':
  with stream_writer.Writer(path, 0, leaves, {}) as writer:
    for at in np.ndindex(shape[0], shape[1], 2):
      writer.write('params/x', (at[0], at[1], slice(None), at[2]), piece(*at))
else:
  with stream_reader.Reader(path, verify=True) as reader:
    for at in np.ndindex(shape[0], shape[1], 2):
      got = reader.read('params/x', (at[0], at[1], slice(None), at[2]))
      assert (got.view(np.uint16) == piece(*at).view(np.uint16)).all()
print((peak() - before) // 1024)
"""


@pytest.mark.slow
def test_memory_stays_far_below_the_size_of_a_leaf(tmp_path):
  for mode in ('write', 'read'):
    command = [sys.executable, '-c', _PROGRAM, mode, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # The leaf has 1,611 MB.
    assert int(done.stdout) < 600
