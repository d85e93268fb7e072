"""What tensors a model becomes in Hugging Face files, in which dtypes, and its config.json."""

import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import tqdm

from moe_jax import errors
from moe_jax.checkpoints import stream_reader
from moe_jax.config import parse, schema
from moe_jax.data import tokenizer as tokenizer_lib
from moe_jax.interop import hf_config, hf_config_export, mapping, safetensors_files, sidecar
from moe_jax.interop import source as source_lib

ReadLeaf = Callable[[str, tuple[int | slice, ...]], np.ndarray]

DTYPES = ('original', 'bfloat16', 'float32')  # of an export
_FILE_DTYPE = {'float32': 'F32', 'bfloat16': 'BF16'}


class Plan:
  """What tensors a model becomes, and how they are written."""

  def __init__(
    self, model: schema.ModelConfig, leaves: Mapping[str, Any], record: sidecar.Record, dtype: str
  ):
    errors.require(
      dtype in DTYPES,
      f'--dtype={dtype!r} must be one of {", ".join(DTYPES)}{errors.did_you_mean(dtype, DTYPES)}',
    )
    self.family = hf_config_export.family_of(model)
    entries = mapping.entries(model, record.layout)
    self.entries = [entry for entry in entries if entry.role != mapping.TIED]
    held = {name: leaf for name, leaf in leaves.items() if not _is_for_training(name)}
    mapping.check_covers(list(mapping.entries(model, record.layout)), held, self.family)
    self.dtype = record.dtype if dtype == 'original' else _FILE_DTYPE[dtype]
    self.changes_dtype = self.dtype != record.dtype
    others = record.other_dtypes if dtype == 'original' else {}
    self.specs = list(
      dict.fromkeys(
        safetensors_files.Spec(
          entry.hf_name, others.get(entry.hf_name, self._dtype_of(entry)), entry.hf_shape
        )
        for entry in self.entries
      )
    )

  def _dtype_of(self, entry: mapping.Entry) -> str:
    # Biases are sums of many small steps; no reader has them in another dtype.
    return 'F32' if entry.leaf.startswith('router_state/') else self.dtype

  @property
  def num_bytes(self) -> int:
    """Bytes of all tensors."""
    return sum(spec.num_bytes for spec in self.specs)

  def write(self, directory: pathlib.Path, read: ReadLeaf, shard_bytes: int):
    """Writes the tensors, and an index if there are several files."""
    dtype_of = {spec.name: safetensors_files.DTYPES[spec.dtype] for spec in self.specs}

    def parts(bar: tqdm.tqdm) -> Iterator[np.ndarray]:
      for entry in self.entries:
        values = read(entry.leaf, entry.index)
        errors.require(
          bool(np.isfinite(values).all()),
          f'{entry.leaf} holds numbers that are not finite where {entry.hf_name!r} is made of it; '
          'export an earlier step (--step), nothing was written',
        )
        values = values.astype(dtype_of[entry.hf_name], copy=False)
        yield entry.to_hf(values)
        bar.update(values.nbytes)

    with progress(self.num_bytes, f'export {self.family}') as bar:
      safetensors_files.write(directory, self.specs, parts(bar), shard_bytes=shard_bytes)


def _is_for_training(name: str) -> bool:
  """Router state that outputs do not depend on."""
  return name.startswith('router_state/') and not name.endswith('/expert_bias')


def own_record(model: schema.ModelConfig, layout: mapping.Layout) -> sidecar.Record:
  """How a model that was never imported is written."""
  layout = layout._replace(lm_head=not model.tie_embeddings)
  return sidecar.Record(layout, _FILE_DTYPE[model.param_dtype], {}, False)


def trained_record(model: schema.ModelConfig, record: sidecar.Record) -> sidecar.Record:
  """How a model is written that was imported and then trained: as it is kept, what was wider so."""
  wide = {name: dtype for name, dtype in record.other_dtypes.items() if dtype == 'F32'}
  return record._replace(dtype=_FILE_DTYPE[model.param_dtype], other_dtypes=wide)


def config_json(
  kept: pathlib.Path,
  cfg: schema.Config,
  plan: Plan,
  record: sidecar.Record | None,
  untied: bool,
  trained: bool,
) -> tuple[dict[str, Any], list[str]]:
  """The config.json of an export, and its keys that an imported one had otherwise."""
  made = hf_config_export.from_config(cfg)
  if record is None:
    tokenizer = tokenizer_lib.load(
      kept.parent / sidecar.TOKENIZER, cfg.data.bos_token, cfg.data.eos_token, trusted=True
    )
    ids = {'bos_token_id': tokenizer.bos_id, 'eos_token_id': tokenizer.eos_id}
    return made | ids | dtype_key(plan), []
  original = source_lib.read_json(kept / 'config.json')
  values = hf_config.to_values(original, parse.to_dict(cfg), cfg.model.num_mtp_layers)
  before = hf_config_export.from_config(parse.from_dict(values))
  missing = object()
  changed = {k: v for k, v in made.items() if before.get(k, missing) != v}
  # Imports of before there was model.tie_embeddings hold one matrix twice.
  changed.pop('tie_word_embeddings', None)
  changed |= {'tie_word_embeddings': False} if untied else {}
  if cfg.model.num_mtp_layers not in (0, hf_config.declared_mtp_layers(original)):
    changed['num_nextn_predict_layers'] = cfg.model.num_mtp_layers
  key = 'dtype' if 'dtype' in original else 'torch_dtype'
  dtype = dtype_key(plan)['torch_dtype']
  if plan.changes_dtype or record.was_float8 or (trained and original.get(key, dtype) != dtype):
    changed[key] = dtype
  dropped = ['quantization_config'] if record.was_float8 else []
  if original.get('rope_parameters') and {'rope_scaling', 'rope_theta'} & changed.keys():
    changed |= {key: made[key] for key in ('rope_scaling', 'rope_theta')}
    dropped.append('rope_parameters')  # the newer spelling of the same
  content = {k: v for k, v in original.items() if k not in dropped} | changed
  keys = content.keys() | original.keys()
  return content, sorted(k for k in keys if content.get(k, missing) != original.get(k, missing))


def dtype_key(plan: Plan) -> dict[str, str]:
  """What a config.json says of the dtype."""
  names = {'F32': 'float32', 'BF16': 'bfloat16', 'F16': 'float16'}
  return {'torch_dtype': names[plan.dtype]}


def is_tied(reader: stream_reader.Reader, model: schema.ModelConfig) -> bool:
  """Whether the head is still the embedding, from which it was copied."""
  entries = mapping.entries(model, mapping.Layout(lm_head=False))
  for entry in entries:
    if entry.role == mapping.TIED:
      rows = entry.index[1]
      head, embedding = reader.read(entry.leaf, entry.index), reader.read('params/embedding', rows)
      if not np.array_equal(entry.to_hf(head), embedding):
        return False
  return True


def progress(total: int, name: str) -> tqdm.tqdm:
  """Counts bytes; shown on terminals only."""
  return tqdm.tqdm(total=total, desc=name, unit='B', unit_scale=True, disable=None)
