import asyncio
import json

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from moe_jax import errors
from moe_jax.checkpoints import checkpointer, parts_handler
from moe_jax.config import schema

TREE = {'w': np.arange(6, dtype=np.float32)}
CONFIG = schema.CheckpointConfig(1, 2, 0)


class Parts:
  """Notes what it is asked for."""

  def __init__(self, process):
    self.process, self.asked, self.failure = process, [], None

  def check(self):
    if self.failure is not None:
      raise self.failure

  def give(self, step, folder):
    names = {path.relative_to(folder).parts[0] for path in folder.rglob('*') if path.is_file()}
    self.asked.append(('give', step, names))

  def collect(self, step, folder):
    merged = (folder / 'manifest.ocdbt').exists()
    self.asked.append(('collect', step, merged))


def test_parts_are_collected_before_the_merge(tmp_path):
  parts, state = Parts(0), jax.tree.map(jnp.asarray, TREE)
  with checkpointer.Checkpointer(tmp_path / 'c', CONFIG, parts=parts) as writer:
    for step in (3, 4):
      writer.save(step, state, {})
  assert parts.asked == [('collect', 3, False), ('collect', 4, False)]
  step = tmp_path / 'c/4'
  assert (step / 'state/manifest.ocdbt').exists()
  handlers = json.loads((step / '_CHECKPOINT_METADATA').read_text())['item_handlers']
  assert handlers['state'].endswith('standard_checkpoint_handler.StandardCheckpointHandler')
  with checkpointer.Checkpointer(tmp_path / 'c', CONFIG) as reader:
    restored = reader.restore(jax.eval_shape(lambda: state))
  np.testing.assert_array_equal(restored.state['w'], TREE['w'])


def test_a_part_is_given_when_it_is_written_and_leaves_no_step(tmp_path):
  steps = epath.Path(tmp_path / 'checkpoints')
  (steps / '4/state').mkdir(parents=True)
  parts = Parts(1)
  handler = parts_handler.PartsHandler(parts)
  directory = steps / '8.orbax-checkpoint-tmp/state.orbax-checkpoint-tmp'
  args = ocp.args.StandardSave(jax.tree.map(jnp.asarray, TREE))
  (given,) = asyncio.run(handler.async_save(directory, args=args))
  assert parts.asked == [] and (steps / '4').exists()
  given.result()
  ((kind, step, names),) = parts.asked
  assert (kind, step) == ('give', 8) and {'ocdbt.process_0', 'array_metadatas'} <= names
  assert list(steps.iterdir()) == []


def test_each_process_moves_aside_on_its_own_disk(tmp_path, monkeypatch):
  state = jax.tree.map(jnp.asarray, TREE)
  with checkpointer.Checkpointer(tmp_path / 'c', CONFIG) as writer:
    for step in (3, 4):
      writer.save(step, state, {})
  (tmp_path / 'c/4/meta/metadata').write_text('{')
  with checkpointer.Checkpointer(tmp_path / 'c', CONFIG, parts=Parts(1)) as writer:
    monkeypatch.setattr(jax, 'process_index', lambda: 1)
    assert writer.restore(jax.eval_shape(lambda: state)).step == 3
    monkeypatch.undo()
    assert writer.steps() == [3]


def test_a_failed_hand_over_is_raised_while_orbax_waits_for_others(tmp_path, monkeypatch):
  """Neither the next save nor the end waits for a save that never ends."""
  parts, state = Parts(0), jax.tree.map(jnp.asarray, TREE)
  writer = checkpointer.Checkpointer(tmp_path / 'c', CONFIG, parts=parts)
  writer.save(3, state, {})
  writer.wait()
  monkeypatch.setattr(writer._manager, 'is_saving_in_progress', lambda: True)
  parts.failure = errors.InputError('cut')
  for again in (lambda: writer.save(4, state, {}), writer.wait):
    with pytest.raises(errors.InputError, match='cut'):
      again()
  writer.close()
  assert writer.steps() == [3]
  monkeypatch.undo()
  parts.failure = None
  writer.close()
