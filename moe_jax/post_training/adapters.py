"""Adapters: the weights that ESFT has trained, as files apart from the model (arXiv 2407.01906).

A directory with `expert_cfg.json` and one or several *.safetensors, which hold exactly the tensors
that it marks, under the official names: a tensor per matrix of an expert. A tensor too many or too
few is refused. Several adapters of one base may be in memory, or be merged one after the other.
"""

import dataclasses
import functools
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from moe_jax import errors, trees
from moe_jax.checkpoints import stream_reader, stream_writer
from moe_jax.config import parse, schema
from moe_jax.data import kept_files
from moe_jax.interop import huggingface, mapping, merged_leaves, safetensors_files
from moe_jax.interop import source as source_lib
from moe_jax.models import model_variables
from moe_jax.post_training import expert_config
from moe_jax.runs import run_record, trained_run, working_directory
from moe_jax.storage import fetch
from moe_jax.training import trainable

CONFIG = 'expert_cfg.json'
_ROUTED = ('params/moe_layers/moe/gate_up', 'params/moe_layers/moe/down')
_DTYPES = {dtype: name for name, dtype in safetensors_files.DTYPES.items()}
_FLOATS = ('F32', 'BF16', 'F16')


def entries(cfg: schema.Config) -> list[mapping.Entry]:
  """The tensors of what `cfg.trainable` marks, and what they are in our leaves.

  Raises:
    errors.InputError: something that is trained has no name in the official files.
  """
  chosen = set(zip(*(axis.tolist() for axis in trainable.places(cfg.trainable))))

  def is_marked(entry: mapping.Entry) -> bool:
    collection, *path = entry.leaf.split('/')
    if collection != 'params' or entry.role != mapping.WEIGHT:
      return False
    marked = trainable.is_trained(cfg.trainable, path)
    return marked and (entry.leaf not in _ROUTED or entry.index[:2] in chosen)

  found = [e for e in mapping.entries(cfg.model, mapping.Layout()) if is_marked(e)]
  number = sum(entry.size for entry in found)
  errors.require(
    number == trainable.count(cfg),
    f'config.trainable: {number} of {trainable.count(cfg)} trained parameters have a name in '
    'checkpoints of the DeepSeek families; only what they know can be an adapter',
  )
  return found


def extract(
  workdir: str | os.PathLike[str],
  directory: str | os.PathLike[str],
  *,
  step: int | None = None,
  say: Callable[[str], None] = print,
):
  """Writes the trained tensors of a run, in its dtype, and the config that marks them.

  Args:
    workdir: a run with `trainable.kind='experts'`.
    directory: absent or empty.
    step: the checkpoint; None for the newest.
    say: prints one line.

  Raises:
    errors.InputError: the run trains something else, or a number is not finite.
  """
  workdir = fetch.local(workdir, '--workdir')
  cfg = trained_run.read_config(workdir, step)
  errors.require(
    cfg.trainable.kind == 'experts',
    f'--workdir={workdir} was trained with config.trainable.kind={cfg.trainable.kind!r}; an '
    "adapter comes of a run with 'experts' (configs/esft.py)",
  )
  parts = entries(cfg)
  with stream_reader.Reader(workdir / 'checkpoints', step, verify=True) as reader:
    specs = list(
      dict.fromkeys(
        safetensors_files.Spec(e.hf_name, _DTYPES[reader.leaves[e.leaf][1]], e.hf_shape)
        for e in parts
      )
    )

    def values() -> Iterator[np.ndarray]:
      for entry in parts:
        array = reader.read(entry.leaf, entry.index)
        _require_finite(array, f'--workdir={workdir}: {entry.leaf}')
        yield entry.to_hf(array)

    num_bytes = sum(spec.num_bytes for spec in specs)
    with huggingface.staged(directory, '--out', num_bytes) as staging:
      safetensors_files.write(staging, specs, values())
      marked = expert_config.of(cfg.trainable, cfg.model.num_dense_layers)
      expert_config.write(staging / CONFIG, marked)
  say(f'{directory}: {len(specs)} tensors, {num_bytes:,} bytes, of step {reader.step} of {workdir}')


def read(
  directory: str | os.PathLike[str], base: schema.Config
) -> tuple[schema.Config, trees.Params]:
  """(the config of a run that trains what an adapter holds, `trainable.select` of its weights).

  Args:
    directory: of the adapter.
    base: config of the model that it is for.

  Raises:
    errors.InputError: it is of another model, or its tensors are not those that its config marks.
  """
  directory = fetch.local(directory, '--adapter')
  model = base.model
  layers = range(model.num_dense_layers, model.num_layers)
  marked = expert_config.read(directory / CONFIG, layers, model.moe.num_experts)
  given: dict[str, Any] = (
    parse.ADDED['trainable'] | expert_config.fields(marked) | {'kind': 'experts'}
  )
  values = schema.TrainableConfig(**given)
  cfg = dataclasses.replace(base, trainable=values)
  shapes = jax.eval_shape(
    functools.partial(trainable.select, cfg), model_variables.abstract_params(model)
  )
  arrays = {
    f'params/{name}': np.empty(leaf.shape, leaf.dtype)
    for name, leaf in source_lib.by_name(shapes).items()
  }
  row = {place: i for i, place in enumerate(zip(*(a.tolist() for a in trainable.places(values))))}
  parts = entries(cfg)
  tensors = _checked(directory, parts)
  with safetensors_files.Reader(tensors) as reader:
    for entry in parts:
      index = entry.index
      if entry.leaf in _ROUTED:
        index = (row[index[:2]], *index[2:])
      array = reader.read(entry.hf_name, entry.start, entry.hf_part)
      _require_finite(array, f'--adapter={directory}: {entry.hf_name}')
      arrays[entry.leaf][index] = entry.to_ours(array).astype(arrays[entry.leaf].dtype)
  return cfg, jax.tree.unflatten(jax.tree.structure(shapes), list(arrays.values()))


def _checked(
  directory: pathlib.Path, parts: Sequence[mapping.Entry]
) -> dict[str, safetensors_files.Tensor]:
  """The tensors of an adapter by their official names: those of `parts`, all and no others."""
  found = {
    # Older adapters lack the prefix.
    name if name.startswith(('model.', 'lm_head.')) else f'model.{name}': tensor
    for name, tensor in safetensors_files.find_all(directory).items()
  }
  wanted = {entry.hf_name: entry.hf_shape for entry in parts}
  some = safetensors_files.some
  missing, others = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
  errors.require(
    not missing and not others,
    f'--adapter={directory} must hold the tensors that its {CONFIG} marks and no others: '
    f'missing {some(missing) or "none"}, too many {some(others) or "none"}; take the files of '
    'one extraction together',
  )
  for name, shape in wanted.items():
    tensor = found[name]
    errors.require(
      tensor.shape == shape and tensor.dtype in _FLOATS,
      f'--adapter={directory}: {name!r} is {tensor.dtype}{list(tensor.shape)}, where the model '
      f'needs {list(shape)} of {", ".join(_FLOATS)}; it is the adapter of another model',
    )
  return found


def applied(run: trained_run.Run, directory: str | os.PathLike[str]) -> trained_run.Run:
  """A loaded model with the tensors of an adapter in their place.

  What the adapter does not change is shared with `run`, which stays as it is.
  """
  cfg, part = read(directory, run.cfg)
  old = run.variables['params']
  params = trainable.merge(cfg, old, part)
  params = jax.tree.map(
    lambda new, x: x if new is x else jax.device_put(new, x.sharding), params, old
  )
  return dataclasses.replace(run, variables={**run.variables, 'params': params})


def merge(
  workdir: str | os.PathLike[str],
  directory: str | os.PathLike[str],
  target: str | os.PathLike[str],
  *,
  argv: Sequence[str] = (),
  say: Callable[[str], None] = print,
):
  """Writes a new run: the newest weights of `workdir` with an adapter's tensors in their place.

  Needs memory for the adapter and for the experts of one layer.

  Args:
    workdir: the base.
    directory: of the adapter.
    target: workdir of the new run, absent or empty.
    argv: command line, for the record.
    say: prints one line.

  Raises:
    errors.InputError: see `read`; nothing has been written then.
  """
  workdir = fetch.local(workdir, '--workdir')
  base = trained_run.read_config(workdir)
  tuned, part = read(directory, base)
  new = {f'params/{name}': array for name, array in source_lib.by_name(part).items()}
  cfg = merged_leaves.config(base)
  leaves = source_lib.abstract_leaves(cfg.model)
  num_bytes = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(leaves))
  with (
    stream_reader.Reader(workdir / 'checkpoints', verify=True) as reader,
    huggingface.staged(target, '--out', num_bytes) as staging,
  ):
    meta = {key: reader.meta[key] for key in ('data_fingerprint', 'tokenizer')}
    meta['config'] = parse.to_dict(cfg)
    # What is written of step 0 is an import as it came.
    step = max(reader.step, 1)
    with stream_writer.Writer(staging / 'checkpoints', step, leaves, meta) as writer:
      for name, index, array in _merged(tuned, leaves, new, reader):
        writer.write(name, index, array)
    shutil.copyfile(workdir / 'tokenizer.json', staging / 'tokenizer.json')
    kept_files.carry(workdir, staging)
    run_record.write(
      staging,
      cfg,
      argv=argv,
      data_fingerprint=meta['data_fingerprint'],
      directory=working_directory.recorded(workdir),
    )
  say(f'{target}: step {reader.step} of {workdir} with {len(new)} arrays of {directory}')


def _merged(
  tuned: schema.Config,
  leaves: trees.Tree,
  new: Mapping[str, np.ndarray],
  reader: stream_reader.Reader,
) -> Iterator[tuple[str, tuple[int, ...], np.ndarray]]:
  """(name, index, values) of all leaves, those of stacked layers one layer after the other."""
  layers, experts = trainable.places(tuned.trainable)
  for name, leaf in source_lib.by_name(leaves).items():
    is_stacked = name.split('/')[1].endswith('_layers')
    indices: list[tuple[int, ...]] = [(i,) for i in range(leaf.shape[0])] if is_stacked else [()]
    for index in indices:
      if name in _ROUTED and name in new:
        values = merged_leaves.read(reader, name, index)
        here = layers == index[0]
        values[experts[here]] = new[name][here]
        yield name, index, values
      else:
        yield (
          name,
          index,
          new[name][index] if name in new else merged_leaves.read(reader, name, index),
        )


def _require_finite(array: np.ndarray, where: str):
  errors.require(
    bool(np.isfinite(array).all()),
    f'{where} holds numbers that are not finite; use another step, nothing was written',
  )
