"""NaN and damage in weights: no reader takes them in silence, and none is ever saved."""

import json
import logging
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from experiments import convert
from moe_jax import errors
from moe_jax.checkpoints import checkpointer as checkpointer_lib
from moe_jax.config import schema
from moe_jax.interop import huggingface
from moe_jax.runs import trained_run
from tests import in_process
from tests.interop import checkpoints

KEEP = schema.CheckpointConfig(save_every=1, keep_last=1, keep_every=0)


def import_(directory, workdir, *flags):
  in_process.run(convert, f'--from_hf={directory}', f'--workdir={workdir}', *flags)


def export(workdir, directory, *flags):
  in_process.run(convert, f'--to_hf={directory}', f'--workdir={workdir}', *flags)


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_a_state_that_is_not_finite_is_not_saved_over_a_good_one(tmp_path, value):
  good = {'params': {'w': jnp.ones((2, 3))}, 'opt_state': {'nu': jnp.ones(3)}}
  bad = {'params': good['params'], 'opt_state': {'nu': jnp.array([1.0, value, 1.0])}}
  with checkpointer_lib.Checkpointer(tmp_path / 'checkpoints', KEEP) as checkpointer:
    checkpointer.save(1, good, {})
    checkpointer.wait()
    with pytest.raises(errors.InputError, match=r'1 arrays .*not finite, first opt_state/nu'):
      checkpointer.save(2, bad, {})
    assert checkpointer.steps() == [1]


@pytest.fixture
def broken(tmp_path):
  """A downloaded checkpoint with one NaN in a matrix of expert 2 of the second MoE layer."""
  hf = checkpoints.config('deepseek_v2_lite')
  weights = checkpoints.tensors(hf, dtype=np.float32)
  name = sorted(n for n in weights if 'mlp.experts.2.down_proj' in n)[-1]
  weights[name] = weights[name].copy()
  weights[name][1, 2] = np.nan
  return checkpoints.write(tmp_path / 'in', hf, weights), name


def test_an_import_names_tensor_and_place(broken, tmp_path, capsys):
  directory, name = broken
  with pytest.raises(errors.InputError, match=rf"'{name}' in .* holds nan at \[1, 2\].*download"):
    import_(directory, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()
  import_(directory, tmp_path / 'run', '--allow_nonfinite')
  with pytest.raises(errors.InputError, match=r'holds nan in params/moe_layers/moe/down at \['):
    trained_run.load(tmp_path / 'run')
  with pytest.raises(errors.InputError, match=r'params/moe_layers/moe/down holds numbers that are'):
    export(tmp_path / 'run', tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


@pytest.fixture
def imported(tmp_path):
  hf = checkpoints.config('deepseek_v2_lite')
  original = checkpoints.write(tmp_path / 'in', hf, checkpoints.tensors(hf))
  import_(original, tmp_path / 'run')
  return tmp_path / 'run'


def test_a_flipped_byte_is_never_exported(imported, tmp_path):
  """In the largest file of every array: the export refuses, and leaves nothing."""
  state = imported / 'checkpoints/0/state'
  arrays = [d for d in sorted(state.iterdir()) if d.is_dir() and d.name.startswith('params.')]
  assert len(arrays) > 10
  for number, array in enumerate(arrays):
    files = [p for p in array.rglob('*') if p.is_file() and not p.name.startswith('.')]
    path = max(files, key=lambda p: p.stat().st_size)
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(errors.InputError, match=f'{array.name.replace(".", "/")} of checkpoint'):
      export(imported, tmp_path / f'out{number}')
    assert not (tmp_path / f'out{number}').exists()
    path.write_bytes(whole)
  export(imported, tmp_path / 'out')


def test_an_older_step_is_exported_with_a_warning_that_names_it(imported, tmp_path, capsys, caplog):
  newest = imported / 'checkpoints/7'
  (newest / 'meta').mkdir(parents=True)
  for name in ('_CHECKPOINT_METADATA', 'meta/metadata'):
    (newest / name).write_text(json.dumps({}))
  with caplog.at_level(logging.WARNING):
    export(imported, tmp_path / 'out')
  assert 'Checkpoint step 7 in' in caplog.text and 'Using step 0 in its place' in caplog.text
  assert 'exported step 0 as deepseek_v2' in capsys.readouterr().out
  with pytest.raises(errors.InputError, match='step 7'):
    export(imported, tmp_path / 'other', '--step=7')
  assert not pathlib.Path(tmp_path / 'other').exists()


def test_a_model_in_memory_is_read_as_strictly(broken):
  directory, name = broken
  with pytest.raises(errors.InputError, match=f"'{name}'"):
    huggingface.load(directory, base.get_config().to_dict())
