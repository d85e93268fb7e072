"""Hugging Face checkpoints of the DeepSeek families in and out of workdirs, a tensor at a time.

`import_checkpoint` makes a workdir with a checkpoint of step 0, which `trained_run.load` and
`config.init_from` read like any other; `export_checkpoint` makes a directory that transformers (or
a released model's own code) reads. Both write beside their target and rename at the end. `load`
reads a checkpoint for use, straight onto the devices; `load_variables` and `save` are import and
export of a model in memory.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tqdm

from moe_jax import atomic_files, errors, trees
from moe_jax.checkpoints import stream_reader, stream_writer
from moe_jax.config import parse, schema
from moe_jax.data import kept_files
from moe_jax.data import tokenizer as tokenizer_lib
from moe_jax.interop import (
  export_plan,
  exported_tokenizer,
  hf_config,
  hf_config_export,
  mapping,
  merged_leaves,
  placement,
  safetensors_files,
  sidecar,
)
from moe_jax.interop import source as source_lib
from moe_jax.models import model_variables
from moe_jax.planning import host_memory
from moe_jax.runs import run_record, trained_run
from moe_jax.storage import fetch, upload

Say = Callable[[str], None]


def load(
  directory: str | os.PathLike[str],
  values: trees.Json,
  *,
  param_dtype: str = '',
  say: Say = print,
) -> trained_run.Run:
  """Reads a downloaded checkpoint for use on the devices that are here; writes nothing.

  The result is that of `import_checkpoint` and `trained_run.load`. Needs memory for the model, and
  host memory for one tensor more.

  Args:
    directory: config.json, tokenizer.json and *.safetensors.
    values: nested dicts of a whole config; model and special tokens are replaced.
    param_dtype: of weights and computation, one of schema.DTYPES; '' for that of the files.
    say: prints one line about what is not read as it is there.

  Raises:
    errors.InputError: see the message.
  """
  directory = fetch.local(directory)
  source, tokenizer = opened(directory, values, directory, param_dtype)
  for note in source.notes:
    say(note)
  cfg, mesh = trained_run.on_devices_here(source.cfg)
  abstract = model_variables.abstract_variables(cfg.model, mesh)
  return trained_run.Run(cfg, mesh, placed(source, abstract), tokenizer, 0, trained_run.NO_DATA)


def is_checkpoint(directory: pathlib.Path) -> bool:
  """Whether a directory holds the files of a Hugging Face checkpoint, and is not a workdir."""
  files = (directory / 'config.json').is_file() and any(directory.glob('*.safetensors'))
  return files and not (directory / 'checkpoints').is_dir()


def read_config(directory: str | os.PathLike[str], values: trees.Json) -> schema.Config:
  """The config of a downloaded checkpoint, with its tokenizer; arguments as of `load`."""
  directory = fetch.local(directory)
  return opened(directory, values, directory)[0].cfg


def load_variables(
  directory: str | os.PathLike[str], values: trees.Json, *, param_dtype: str = ''
) -> tuple[schema.Config, dict[str, Any]]:
  """Reads the weights of a checkpoint, which may lack a tokenizer, onto the default device.

  Args:
    directory: config.json and *.safetensors.
    values: nested dicts of a whole config; the model section is replaced.
    param_dtype: of weights and computation, one of schema.DTYPES; '' for that of the files.

  Returns:
    The config, and {'params', 'router_state'} as nested dicts of arrays.

  Raises:
    errors.InputError: see the message.
  """
  source = source_lib.read(directory, values, param_dtype)
  return source.cfg, placed(source, source_lib.abstract_leaves(source.cfg.model))


def placed(source: source_lib.Source, abstract: Any) -> dict[str, Any]:
  """The variables of a source, placed as the tree of shapes `abstract` says."""
  leaves = placement.Leaves(source_lib.by_name(abstract))
  with _progress(source, 'read') as bar:
    for entry, part in source.parts():
      leaves.write(entry, part)
      bar.update(source.stored_bytes(entry))
  return jax.tree.unflatten(jax.tree.structure(abstract), list(leaves.finish().values()))


def save(
  cfg: schema.Config,
  variables: trees.Variables,
  directory: str | os.PathLike[str],
  hf: trees.Json | None = None,
  *,
  dtype: str = 'original',
  fused_experts: bool = False,
  shard_bytes: int = safetensors_files.SHARD_BYTES,
):
  """Writes a model from memory.

  Args:
    cfg: its config.
    variables: {'params', 'router_state'}, nested dicts of arrays.
    directory: absent or empty.
    hf: the config.json to write; None makes one.
    dtype: one of export_plan.DTYPES; 'original' is cfg.model.param_dtype.
    fused_experts: all experts of a layer in two tensors.
    shard_bytes: largest size of a file.

  Raises:
    errors.InputError: no family can hold the model, or the directory is in use.
  """
  leaves = {name: np.asarray(x) for name, x in source_lib.by_name(variables).items()}
  record = export_plan.own_record(cfg.model, mapping.Layout(fused_experts=fused_experts))
  plan = export_plan.Plan(cfg.model, leaves, record, dtype)
  content = (
    dict(hf) if hf is not None else hf_config_export.from_config(cfg) | export_plan.dtype_key(plan)
  )
  with staged(directory, '--to_hf', plan.num_bytes) as staging:
    _write_json(staging / 'config.json', content)
    plan.write(staging, lambda name, index: leaves[name][index], shard_bytes)


def import_checkpoint(
  directory: str | os.PathLike[str],
  values: trees.Json,
  workdir: str | os.PathLike[str],
  *,
  param_dtype: str = '',
  allow_nonfinite: bool = False,
  untie: bool = False,
  argv: Sequence[str] = (),
  say: Say = print,
):
  """Makes a workdir out of a downloaded checkpoint.

  It holds config.json, tokenizer.json, checkpoints/0 without an optimizer, and the small files of
  the checkpoint in hf/. Needs memory for one tensor.

  Args:
    directory: config.json, tokenizer.json and *.safetensors.
    values: nested dicts of a whole config; model and special tokens are replaced.
    workdir: absent or empty.
    param_dtype: of weights and computation, one of schema.DTYPES; '' for that of the files.
    allow_nonfinite: take tensors with NaN or infinity as they are.
    untie: an embedding that is the head too becomes two matrices, which are trained apart.
    argv: command line, for the record.
    say: prints one line.

  Raises:
    errors.InputError: see the message; nothing has been written then.
  """
  began = time.monotonic()
  directory = fetch.local(directory, '--from_hf')
  source, tokenizer = opened(directory, values, workdir, param_dtype, untie)
  source = dataclasses.replace(source, allow_nonfinite=allow_nonfinite)
  cfg = source.cfg
  for note in source.notes:
    say(note)
  meta = {
    'config': parse.to_dict(cfg),
    'data_fingerprint': trained_run.NO_DATA,
    'tokenizer': trained_run.digest(tokenizer),
  }
  leaves = source_lib.abstract_leaves(cfg.model)
  num_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(leaves))
  with staged(workdir, '--workdir', num_bytes) as staging:
    with (
      stream_writer.Writer(staging / 'checkpoints', 0, leaves, meta) as writer,
      _progress(source, 'import') as bar,
    ):
      for entry, part in source.parts():
        writer.write(entry.leaf, entry.index, part)
        bar.update(source.stored_bytes(entry))
    sidecar.keep(directory, staging / sidecar.DIRECTORY)
    sidecar.write_record(source, staging / sidecar.DIRECTORY, untie)
    shutil.copyfile(directory / sidecar.TOKENIZER, staging / sidecar.TOKENIZER)
    run_record.write(staging, cfg, argv=argv, data_fingerprint=trained_run.NO_DATA)
  say(
    _closing_line(
      'imported', source.family, _num_parameters(source.leaves), len(source.tensors), began
    )
  )


def export_checkpoint(
  workdir: str | os.PathLike[str],
  directory: str | os.PathLike[str],
  *,
  step: int | None = None,
  dtype: str = 'original',
  shard_bytes: int = safetensors_files.SHARD_BYTES,
  say: Say = print,
):
  """Writes a checkpoint of a workdir as Hugging Face files.

  One that was imported comes back under the names and in the dtypes that it had; its config.json is
  changed only where the model is another one. Needs memory for one tensor.

  Args:
    workdir: a run, or an import.
    directory: absent or empty.
    step: the checkpoint; None for the newest.
    dtype: one of export_plan.DTYPES; 'original' is that of the imported files, or
      model.param_dtype.
    shard_bytes: largest size of a file.
    say: prints one line.

  Raises:
    errors.InputError: see the message; nothing has been written then.
  """
  began = time.monotonic()
  workdir = fetch.local(workdir, '--workdir')
  cfg = trained_run.read_config(workdir, step)
  record = sidecar.read_record(workdir)
  kept = workdir / sidecar.DIRECTORY
  errors.require(
    (workdir / sidecar.TOKENIZER).is_file(),
    f'--workdir={workdir} has lost its {sidecar.TOKENIZER}; put the file back',
  )
  with stream_reader.Reader(workdir / 'checkpoints', step, verify=True) as reader:
    names = [name for name in reader.leaves if name.startswith(('params/', 'router_state/'))]
    names = [name for name in names if not name.startswith(merged_leaves.ADDED)]
    leaves = {name: jax.ShapeDtypeStruct(*reader.leaves[name]) for name in names}
    tied = bool(record and source_lib.read_json(kept / 'config.json').get('tie_word_embeddings'))
    untied = (
      record is not None and tied and (record.untied or not export_plan.is_tied(reader, cfg.model))
    )
    if record is not None and reader.step:  # trained further
      record = export_plan.trained_record(cfg.model, record)
    if record is not None and untied:
      record = record._replace(layout=record.layout._replace(lm_head=True))
      say('head and embedding are written as two tensors: they are trained apart')
    if record is not None and record.was_float8:
      say('the files came in float8; they are exported without quantisation')
    layout = record or export_plan.own_record(cfg.model, mapping.Layout())
    plan = export_plan.Plan(cfg.model, leaves, layout, dtype)
    content, changed = export_plan.config_json(kept, cfg, plan, record, untied, bool(reader.step))
    for line in hf_config_export.caveats(cfg.model):
      say(line)
    same = record is not None and not changed
    with staged(directory, '--to_hf', plan.num_bytes) as staging:
      _copy_small_files(workdir, staging, cfg, record is not None, say)
      if not same:
        _write_json(staging / 'config.json', content)
      if record is not None and not same:
        say(f'config.json differs from the imported one in {", ".join(changed)}')
      plan.write(staging, functools.partial(merged_leaves.read, reader), shard_bytes)
  say(
    _closing_line(
      f'exported step {reader.step} as',
      content['model_type'],
      _num_parameters(leaves),
      len(plan.specs),
      began,
    )
  )


def _copy_small_files(
  workdir: pathlib.Path, into: pathlib.Path, cfg: schema.Config, imported: bool, say: Say
):
  """Puts back what an import has kept; of another run, its tokenizer."""
  if imported:
    for path in (workdir / sidecar.DIRECTORY).iterdir():
      if path.name != sidecar.RECORD:
        shutil.copyfile(path, into / path.name)
  else:
    data = cfg.data
    tokenizer = tokenizer_lib.load(
      workdir / sidecar.TOKENIZER, data.bos_token, data.eos_token, trusted=True
    )
    exported_tokenizer.write(tokenizer, data, cfg.model.max_seq_len, into, say)


def opened(
  directory: pathlib.Path,
  values: trees.Json,
  home: str | os.PathLike[str],
  param_dtype: str = '',
  untie: bool = False,
) -> tuple[source_lib.Source, tokenizer_lib.Tokenizer]:
  """Checks a downloaded checkpoint.

  Args:
    directory: of the checkpoint.
    values: see `load`.
    home: directory in which the config is to expect the tokenizer.
    param_dtype: see `load`.
    untie: see `import_checkpoint`.

  Returns:
    (the checkpoint, its tokenizer).

  Raises:
    errors.InputError: see the message.
  """
  hf = source_lib.read_json(directory / 'config.json')
  hf_config.family(hf)  # before anything is said about its tokenizer
  bos, eos = sidecar.special_tokens(directory, hf)
  path = os.path.join(home, sidecar.TOKENIZER)
  data = values['data'] | {'bos_token': bos, 'eos_token': eos, 'tokenizer': path}
  if template := kept_files.chat_template(directory):
    data |= {'chat_template': template, 'chat_format': 'template'}
  source = source_lib.read(directory, dict(values) | {'data': data}, param_dtype, untie=untie)
  tokenizer = tokenizer_lib.load(directory / sidecar.TOKENIZER, bos, eos)
  tokenizer_lib.check_vocab_size(tokenizer, source.cfg.model.vocab_size)
  tokenizer.end_ids = kept_files.end_ids(directory, tokenizer)
  return source, tokenizer


def _progress(source: source_lib.Source, doing: str) -> tqdm.tqdm:
  total = sum(tensor.num_bytes for tensor in source.tensors.values())
  return export_plan.progress(total, f'{doing} {source.family}')


@contextlib.contextmanager
def staged(target: str | os.PathLike[str], flag: str, needed: int) -> Iterator[pathlib.Path]:
  """A temporary directory that becomes `target`, here or in a bucket; see `_renamed`."""
  with upload.folder(target, flag) as made, _renamed(made, flag, needed) as staging:
    yield staging


@contextlib.contextmanager
def _renamed(target: pathlib.Path, flag: str, needed: int) -> Iterator[pathlib.Path]:
  """A temporary directory, renamed to `target` on success and removed on an exception.

  What a killed process left behind is cleared by the next one.

  Raises:
    errors.InputError: the target is in use, or cannot be made, or its disk has no room for the
      tensors, which are `needed` bytes.
  """
  absolute = pathlib.Path(os.path.abspath(target))
  staging = absolute.with_name(f'.{absolute.name}.converting')
  try:
    errors.require(
      not absolute.exists() or (absolute.is_dir() and not any(absolute.iterdir())),
      f'{flag}={target} must be absent or an empty directory: nothing is overwritten; choose '
      'another one',
    )
    staging.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise errors.InputError(
      f'{flag}={target} cannot be made ({e.strerror or e}); choose another place'
    ) from e
  with atomic_files.told_if_full(target, needed), atomic_files.lock(staging):
    try:
      for path in staging.iterdir():
        if path.name != atomic_files.LOCK:
          shutil.rmtree(path) if path.is_dir() else path.unlink()
      yield staging
      (staging / atomic_files.LOCK).unlink()
      staging.rename(absolute)
    except BaseException:
      shutil.rmtree(staging, ignore_errors=True)
      raise


def _num_parameters(leaves: Mapping[str, Any]) -> int:
  sizes = {name: int(np.prod(leaf.shape, dtype=np.int64)) for name, leaf in leaves.items()}
  return sum(size for name, size in sizes.items() if name.startswith('params/'))


def _closing_line(done: str, family: str, parameters: int, tensors: int, began: float) -> str:
  return (
    f'{done} {family}: {parameters:,} parameters, {tensors:,} tensors, '
    f'{time.monotonic() - began:.1f} s, peak host memory {host_memory.peak() / 2**30:.2f} GiB'
  )


def _write_json(path: pathlib.Path, content: trees.Json):
  path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
