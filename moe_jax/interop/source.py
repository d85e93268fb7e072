"""A checkpoint that is about to be read: what it is, and that it is whole.

Everything is found out from config.json and the headers of the files, before anything is written:
names that are missing or too many, shapes, types, scales of float8 weights, and copies of the
embedding and the head that differ from them.
"""

import collections
import dataclasses
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from moe_jax import errors, trees
from moe_jax.checkpoints import integrity
from moe_jax.config import parse, schema
from moe_jax.data import json_files
from moe_jax.devices import partitioning
from moe_jax.interop import (
  field_checks,
  float8,
  hf_config,
  hf_values,
  mapping,
  safetensors_files,
)
from moe_jax.models import model_variables

LM_HEAD, EMBEDDING = 'lm_head.weight', 'model.embed_tokens.weight'
_FUSED = re.compile(r'\.mlp\.experts\.gate_up_proj$')
_IGNORED = 'rotary_emb.inv_freq'  # old files hold the frequencies, which follow from the config
_FLOATS = ('F32', 'F16', 'BF16', 'F8_E4M3')
_COMPARED = 2**24  # elements that are compared at once


@dataclasses.dataclass(frozen=True)
class Source:
  """A checked checkpoint."""

  directory: pathlib.Path
  hf: trees.Json  # config.json
  cfg: schema.Config
  layout: mapping.Layout
  tensors: Mapping[str, safetensors_files.Tensor]  # scales included
  entries: list[mapping.Entry]
  leaves: Mapping[str, jax.ShapeDtypeStruct]  # of params and router_state, by name
  block: tuple[int, int] | None  # of float8 weights
  notes: tuple[str, ...]  # what is not imported as it is there, and why
  allow_nonfinite: bool = False

  @property
  def family(self) -> str:
    """The `model_type`."""
    return hf_config.family(self.hf)

  def parts(self) -> Iterator[tuple[mapping.Entry, np.ndarray]]:
    """Every entry that fills a leaf, with its values in the leaf's shape and dtype."""
    with safetensors_files.Reader(self.tensors) as reader:
      for entry in self.entries:
        if entry.role != mapping.COPY:
          yield entry, self._convert(reader, entry)

  def stored_bytes(self, entry: mapping.Entry) -> int:
    """Bytes of an entry in the files."""
    return entry.size * safetensors_files.DTYPES[self.tensors[entry.hf_name].dtype].itemsize

  def _convert(self, reader: safetensors_files.Reader, entry: mapping.Entry) -> np.ndarray:
    values = reader.read(entry.hf_name, entry.start, entry.hf_part)
    dtype = self.leaves[entry.leaf].dtype
    if self.tensors[entry.hf_name].dtype == 'F8_E4M3':
      name = entry.hf_name + float8.SCALE_SUFFIX
      scale = reader.read(name, 0, self.tensors[name].shape)
      block = errors.present(self.block, f'tensor {entry.hf_name!r} is float8 of no known block')
      values = float8.dequantise(values, scale, block, dtype)
    values = values.astype(dtype, copy=False)
    if not self.allow_nonfinite:
      self._require_finite(entry, values)
    return entry.to_ours(values)

  def _require_finite(self, entry: mapping.Entry, values: np.ndarray):
    finite = np.isfinite(values).reshape(-1)
    if not finite.all():
      flat = int(finite.argmin())
      index = [int(i) for i in np.unravel_index(entry.start + flat, entry.hf_shape)]
      raise errors.InputError(
        f'tensor {entry.hf_name!r} in {self.tensors[entry.hf_name].path} holds '
        f'{float(values.reshape(-1)[flat])} at {index}: the file is damaged or its model diverged; '
        'download it again, or import it as it is with --allow_nonfinite'
      )


def abstract_leaves(model: schema.ModelConfig) -> trees.Variables:
  """{'params', 'router_state'} as nested dicts of ShapeDtypeStruct; allocates nothing."""
  made = jax.eval_shape(lambda: model_variables.init(model, jax.random.key(0)))
  return partitioning.unbox(made)


def by_name(tree: trees.Tree) -> dict[str, Any]:
  """The leaves of a nested dict, by the names that checkpoints use."""
  return {
    integrity.leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def read(
  directory: str | os.PathLike[str],
  values: trees.Json,
  param_dtype: str = '',
  *,
  untie: bool = False,
) -> Source:
  """Reads config.json and all headers, and checks them.

  Args:
    directory: a downloaded checkpoint.
    values: nested dicts of a whole config, whose model section is replaced.
    param_dtype: of the kept weights, '' for that of the files.
    untie: an embedding that is the head too becomes two matrices.

  Raises:
    errors.InputError: see the message.
  """
  errors.require(
    param_dtype in ('', *schema.DTYPES),
    f'--param_dtype={param_dtype!r} must be one of {", ".join(schema.DTYPES)}; leave it out for '
    'that of the files',
  )
  directory = pathlib.Path(directory)
  hf = read_json(directory / 'config.json')
  family, block = hf_config.family(hf), hf_config.quantization(hf)
  found = safetensors_files.find(directory)
  ignored = [name for name in found if name.endswith(_IGNORED)]
  tensors = {name: tensor for name, tensor in found.items() if name not in ignored}
  declared = hf_config.declared_mtp_layers(hf)
  present = _present_mtp_layers(tensors, hf) if declared else 0
  values = hf_config.to_values(hf, values, present)
  file_dtype = _file_dtype(tensors)
  values['model']['param_dtype'] = param_dtype or file_dtype
  values['model']['dtype'] = param_dtype or file_dtype
  values['model']['tie_embeddings'] &= not untie
  cfg = parse.from_dict(values)
  field_checks.check_counts(hf, cfg.model, tensors, directory)
  tied = hf_values.flag(hf, 'tie_word_embeddings', False)
  layout = mapping.Layout(
    fused_experts=any(map(_FUSED.search, tensors)), lm_head=LM_HEAD in tensors or not tied
  )
  entries = list(mapping.entries(cfg.model, layout))
  _check_names(entries, tensors, directory)
  _check_types(cfg.model, entries, tensors, block)
  leaves = by_name(abstract_leaves(cfg.model))
  mapping.check_covers(entries, leaves, family)
  _check_copies(entries, tensors, tied)
  notes = _notes(tensors, ignored, declared - present, cfg.model.param_dtype, file_dtype)
  return Source(directory, hf, cfg, layout, tensors, entries, leaves, block, notes)


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """A JSON object.

  Raises:
    errors.InputError: there is no such file, or it holds something else.
  """
  return json_files.read_object(path, 'give the directory of a downloaded checkpoint')


def _present_mtp_layers(tensors: Mapping[str, Any], hf: trees.Json) -> int:
  """All the prediction modules that config.json speaks of, or none of them."""
  first, declared = hf_values.count(hf, 'num_hidden_layers'), hf_config.declared_mtp_layers(hf)
  errors.require(
    declared <= len(tensors),
    f'config.json: num_nextn_predict_layers={declared}, but the files hold {len(tensors)} tensors; '
    'correct it',
  )
  prefixes = tuple(f'model.layers.{first + i}.' for i in range(declared))
  return declared if any(name.startswith(prefixes) for name in tensors) else 0


def _file_dtype(tensors: Mapping[str, safetensors_files.Tensor]) -> str:
  """The dtype of ours that holds the matrices of the files without rounding."""
  small = ('BF16', 'F8_E4M3')
  wide = [
    name
    for name, tensor in tensors.items()
    if len(tensor.shape) > 1
    and tensor.dtype not in small
    and not name.endswith((float8.SCALE_SUFFIX, 'mlp.gate.weight'))
  ]
  return 'float32' if wide else 'bfloat16'


def _notes(
  tensors: Mapping[str, safetensors_files.Tensor],
  ignored: list[str],
  absent_mtp: int,
  param_dtype: str,
  file_dtype: str,
) -> tuple[str, ...]:
  notes = []
  if absent_mtp:
    notes.append(
      f'config.json has num_nextn_predict_layers={absent_mtp}, but the files hold no such layers '
      '(transformers drops them): imported without multi-token prediction'
    )
  if ignored:
    notes.append(f'{len(ignored)} tensors *.{_IGNORED} were left out: the config has them')
  dtypes = {tensor.dtype for tensor in tensors.values()}
  if 'F8_E4M3' in dtypes:
    notes.append(
      f'float8 weights are multiplied by the scales of their blocks and kept in {param_dtype}'
    )
  if 'F16' in dtypes and param_dtype == 'float32':
    notes.append('float16 weights are kept in float32, which holds them exactly')
  if param_dtype != file_dtype and file_dtype == 'float32':
    notes.append(f'float32 weights are rounded to {param_dtype}')
  return tuple(notes)


def _check_names(entries: list[mapping.Entry], tensors: Mapping[str, Any], where: pathlib.Path):
  wanted = dict.fromkeys(entry.hf_name for entry in entries)
  missing = [name for name in wanted if name not in tensors]
  errors.require(
    not missing,
    f'--from_hf={where} lacks {len(missing)} tensors that config.json asks for: '
    f'{safetensors_files.some(missing)}; download what is missing, or correct config.json',
  )
  weights = (name.removesuffix(float8.SCALE_SUFFIX) for name in tensors)
  surplus = [name for name, weight in zip(tensors, weights) if weight not in wanted]
  errors.require(
    not surplus,
    f'--from_hf={where} holds {len(surplus)} tensors that config.json does not ask for: '
    f'{safetensors_files.some(surplus)}; a model with them is not supported',
  )


def _check_types(
  model: schema.ModelConfig,
  entries: list[mapping.Entry],
  tensors: Mapping[str, safetensors_files.Tensor],
  block: tuple[int, int] | None,
):
  for name, shape in {entry.hf_name: entry.hf_shape for entry in entries}.items():
    tensor = tensors[name]
    errors.require(
      tensor.shape == shape,
      f'tensor {name!r} is {list(tensor.shape)} in {tensor.path}, but {list(shape)} by '
      f'config.json ({field_checks.fields(model, name)}); one of the two belongs to another model',
    )
    errors.require(
      tensor.dtype in _FLOATS,
      f'tensor {name!r} in {tensor.path} is of dtype {tensor.dtype}; only {", ".join(_FLOATS)} '
      'are supported',
    )
    scale = tensors.get(name + float8.SCALE_SUFFIX)
    errors.require(
      (tensor.dtype == 'F8_E4M3') == (scale is not None),
      f'tensor {name!r} in {tensor.path} is of dtype {tensor.dtype} '
      + ('with' if scale is not None else 'without')
      + f' a tensor of scales *{float8.SCALE_SUFFIX}; float8 weights, and they alone, need one',
    )
    if scale is None:
      continue
    block = errors.present(
      block if len(shape) == 2 else None,
      f'tensor {name!r} in {tensor.path} is float8, which needs a quantization_config in '
      'config.json and a matrix of its own (not experts in one tensor)',
    )
    wanted = float8.scale_shape(shape, block)
    errors.require(
      scale.shape == wanted and scale.dtype == 'F32',
      f'the scales of tensor {name!r} are {scale.dtype}{list(scale.shape)} in {scale.path}, but '
      f'must be F32{list(wanted)} for weight_block_size {list(block)}',
    )


def _check_copies(
  entries: list[mapping.Entry], tensors: Mapping[str, safetensors_files.Tensor], tied: bool
):
  """Tensors that must be equal: what prediction modules repeat, and both ends of a tied model."""
  original = {entry.leaf: entry.hf_name for entry in entries if entry.role != mapping.COPY}
  pairs = {entry.hf_name: original[entry.leaf] for entry in entries if entry.role == mapping.COPY}
  if tied and LM_HEAD in tensors:
    pairs[LM_HEAD] = EMBEDDING
  for name, other in pairs.items():
    errors.require(
      _same(tensors, name, other),
      f'tensor {name!r} in {tensors[name].path} must repeat {other!r}, which this model has once, '
      'but differs from it',
    )


def _same(tensors: Mapping[str, safetensors_files.Tensor], name: str, other: str) -> bool:
  """Whether two tensors are equal bit by bit."""
  a, b = tensors[name], tensors[other]
  if (a.dtype, a.shape) != (b.dtype, b.shape):
    return False
  size = math.prod(a.shape)
  with safetensors_files.Reader(tensors) as one, safetensors_files.Reader(tensors) as two:
    for start in range(0, size, _COMPARED):
      shape = (min(_COMPARED, size - start),)
      x, y = one.read(name, start, shape), two.read(other, start, shape)
      if not np.array_equal(x.view(np.uint8), y.view(np.uint8)):
        return False
  return True


def dtypes(source: Source) -> tuple[str, dict[str, str]]:
  """The commonest dtype of the weights in the files, and the dtypes of the others by name.

  Float8 weights count as BF16, in which they are exported.
  """
  names = dict.fromkeys(entry.hf_name for entry in source.entries)
  dtype_of = {name: source.tensors[name].dtype.replace('F8_E4M3', 'BF16') for name in names}
  common = collections.Counter(dtype_of.values()).most_common(1)[0][0]
  return common, {name: dtype for name, dtype in dtype_of.items() if dtype != common}
