"""Opens the directory of a run, or a downloaded checkpoint."""

import os

from moe_jax import errors
from moe_jax.api import run as run_lib
from moe_jax.config import pages
from moe_jax.devices import host_allocator
from moe_jax.interop import huggingface
from moe_jax.post_training import adapters
from moe_jax.runs import trained_run
from moe_jax.storage import fetch


def load(
  directory: str | os.PathLike[str],
  *,
  step: int | None = None,
  param_dtype: str = '',
  adapter: str | os.PathLike[str] = '',
  flag: str = 'directory',
) -> run_lib.Run:
  """Loads a model onto the devices that are here.

      run = moe_jax.load('runs/quickstart')
      run = moe_jax.load('downloads/DeepSeek-V2-Lite', param_dtype='bfloat16')
      run = moe_jax.load('runs/quickstart', adapter='adapters/sums')

  A downloaded checkpoint is read as it lies there, tensor by tensor onto the devices; nothing is
  written.

  Args:
    directory: the workdir of a run; or config.json, tokenizer.json and *.safetensors of a
      Hugging Face checkpoint of the families deepseek, deepseek_v2, deepseek_v3 and llama.
    step: of a run, the checkpoint; None for the newest whole one.
    param_dtype: of a downloaded checkpoint, what weights are kept and computed in: 'float32' or
      'bfloat16'; '' for that of the files.
    adapter: an adapter that is put onto the model, see `Run.with_adapter`; '' for none.
    flag: what the user calls the directory, for messages.

  Raises:
    errors.InputError: the directory is neither, or what it holds is damaged.
  """
  directory = fetch.local(directory, flag)
  found = read(directory, step=step, param_dtype=param_dtype, adapter=adapter, flag=flag)
  return run_lib.Run(found, directory)


def read(
  directory: str | os.PathLike[str],
  *,
  step: int | None = None,
  param_dtype: str = '',
  adapter: str | os.PathLike[str] = '',
  flag: str = 'directory',
) -> trained_run.Run:
  """What `load` wraps, with the same arguments."""
  found = _read(directory, step, param_dtype, flag)
  return adapters.applied(found, adapter) if adapter else found


def _read(
  directory: str | os.PathLike[str], step: int | None, param_dtype: str, flag: str
) -> trained_run.Run:
  host_allocator.keep_freed_memory()
  directory = fetch.local(directory, flag)
  if not is_downloaded(directory, flag):
    errors.require(
      not param_dtype,
      f'param_dtype={param_dtype!r} has no effect on a run, which keeps its own; leave it out',
    )
    return trained_run.load(directory, step, flag)
  errors.require(
    step is None, f'step={step}: {directory} is a downloaded checkpoint, which has no steps'
  )
  values = pages.values('base').to_dict()
  return huggingface.load(directory, values, param_dtype=param_dtype)


def is_downloaded(directory: str | os.PathLike[str], flag: str = 'directory') -> bool:
  """Whether a directory holds a Hugging Face checkpoint; False if it is the workdir of a run.

  Raises:
    errors.InputError: it is neither.
  """
  path = fetch.local(directory, flag)
  downloaded = huggingface.is_checkpoint(path)
  errors.require(
    downloaded or (path / 'checkpoints').is_dir(),
    f'{flag}={directory} is neither a run (it holds no checkpoints) nor a downloaded Hugging Face '
    'checkpoint (config.json with *.safetensors); train first: python -m experiments.train '
    f'--config=configs/quickstart.py --workdir={directory}, or name another directory: nothing is '
    'downloaded here, hf download ORG/NAME --local-dir=DIR does that',
  )
  return downloaded
