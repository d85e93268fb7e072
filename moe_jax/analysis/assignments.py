"""Which experts a checkpoint gives the tokens of its training batches, and what that would cost.

The recording is the one source of two things: the virtual-device report, and the file that router
'replay' reads.

Axis letters are those of `moe_jax.models`.
"""

import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_jax import errors, trees
from moe_jax.balance import routing_figures
from moe_jax.config import batch_sizes, moe_config, moe_rules, schema
from moe_jax.data import corpus as corpus_lib
from moe_jax.data import pipeline
from moe_jax.devices import partitioning
from moe_jax.models import transformer
from moe_jax.planning import virtual_devices
from moe_jax.runs import trained_run

_INPUTS = ('tokens', 'positions', 'segment_ids')


class Recording(NamedTuple):
  """The rows of several batches, one after the other."""

  expert_idx: np.ndarray  # [layers, rows, L, K] int32, before drops; E = no expert
  mask: np.ndarray  # [rows, L] bool, False = padding
  row: np.ndarray  # [rows] int32, number of the row in its batch
  batch: np.ndarray  # [rows] int32, number of the batch


def check(model: schema.ModelConfig):
  """Refuses a model that routes nothing.

  Raises:
    errors.InputError: it has no experts.
  """
  errors.require(
    model.is_moe,
    'config.model.moe.num_experts=0: this run is a dense model, which routes nothing; name the '
    'workdir of an MoE run',
  )


def check_devices(moe: moe_config.MoEConfig, num_devices: int):
  """Refuses a number of devices on which one would have no expert.

  Raises:
    errors.InputError: names the rule.
  """
  try:
    moe_rules.validate(dataclasses.replace(moe, num_virtual_devices=num_devices))
  except errors.InputError as e:
    raise errors.InputError(f'--devices={num_devices}: {e}') from e


def apply(
  model: schema.ModelConfig, variables: trees.Variables, batch: trees.Batch
) -> tuple[jax.Array, jax.Array]:
  """Logits [B, L, V] and choices [layers, B, L, K] of a batch, outside of training."""
  inputs = [batch[key] for key in _INPUTS]
  result: Any = transformer.Transformer(model).apply(
    variables, *inputs, row=batch['row'], mutable=['intermediates']
  )
  out, sown = result
  (expert_idx,) = sown['intermediates']['moe_layers']['moe']['expert_idx']
  return out.logits, expert_idx


@functools.partial(jax.jit, static_argnums=0)
def _choices(
  model: schema.ModelConfig, variables: trees.Variables, batch: trees.Batch
) -> jax.Array:
  return apply(model, variables, batch)[1]


def collect(run: trained_run.Run, corpus: corpus_lib.Corpus, num_batches: int) -> Recording:
  """Records the choices for the training batches 0 .. num_batches - 1.

  Batches are those that training saw, in micro-batches of the same rows; the model is the
  checkpoint's, in evaluation mode.

  Raises:
    errors.InputError: a dense model, or batches that the corpus cannot fill.
  """
  check(run.cfg.model)
  cfg, parts = run.cfg, []
  batches = pipeline.TrainBatches(
    corpus,
    seed=cfg.train.seed,
    max_seq_len=cfg.model.max_seq_len,
    batch_sizes=batch_sizes.of(cfg.train),
    num_steps=num_batches,
  )
  for number in range(num_batches):
    batch = batches[number]
    rows = np.arange(len(batch['tokens']), dtype=np.int32)
    choices = _record({key: batch[key] for key in _INPUTS} | {'row': rows}, run)
    parts.append(Recording(choices, batch['segment_ids'] > 0, rows, np.full_like(rows, number)))
  arrays = [np.concatenate(part, axis=1 if i == 0 else 0) for i, part in enumerate(zip(*parts))]
  return Recording(*arrays)


def _record(batch: trees.HostBatch, run: trained_run.Run) -> np.ndarray:
  """[layers, B, L, K] of a whole batch; micro-batch i has rows i, i + n, ... as in training."""
  num_rows = len(batch['row'])
  num_micro = num_rows // (run.cfg.train.micro_batch_size or num_rows)
  record = np.empty(0, np.int32)
  for i in range(num_micro):
    micro = pad_rows({key: value[i::num_micro] for key, value in batch.items()}, run.mesh)
    with partitioning.activate(run.mesh):
      put = partitioning.put_global_batch(micro, run.mesh)
      choices = np.asarray(jax.device_get(_choices(run.cfg.model, run.variables, put)))
    if not i:
      record = np.empty((len(choices), num_rows, *choices.shape[2:]), np.int32)
    record[:, i::num_micro] = choices[:, : num_rows // num_micro]
  return record


def pad_rows(batch: trees.HostBatch, mesh: jax.sharding.Mesh) -> dict[str, np.ndarray]:
  """Adds rows of padding until the devices can share the batch evenly."""
  missing = -len(batch['tokens']) % partitioning.row_ways(mesh)

  def pad(a):
    return np.pad(a, [(0, missing)] + [(0, 0)] * (a.ndim - 1))

  return {key: pad(value) for key, value in batch.items()}


def device_figures(
  recording: Recording,
  model: schema.ModelConfig,
  num_devices: int,
  limits: Sequence[int],
  capacity_factors: Sequence[float],
) -> dict[str, np.ndarray]:
  """What the recorded batches would cost on `num_devices` devices, see `virtual_devices`.

  Every figure is [layers] float64: the mean over the batches, as each batch waits for its own
  slowest device and fills its own buffers. Only least_load and most_load are extremes.

  Args:
    recording: the batches.
    model: whose assignments they are.
    num_devices: P.
    limits: the M of the shares `over_<M>`.
    capacity_factors: of the drop rates.

  Returns:
    least_load and most_load of a device in any batch, as multiples of that batch's mean;
    straggler_factor, devices_per_token, over_<M> (share of the tokens that need more than M
    devices), all_to_all_bytes_per_token, expert_drops_<factor>, device_drops_<factor>.

  Raises:
    errors.InputError: P leaves a device without an expert.
  """
  batches = [recording.batch == number for number in np.unique(recording.batch)]
  report = functools.partial(
    virtual_devices.report,
    num_experts=model.moe.num_experts,
    num_devices=num_devices,
    embed_dim=model.embed_dim,
    bytes_per_number=np.dtype(jax.numpy.dtype(model.dtype)).itemsize,
  )

  def reports(factor: float) -> list[virtual_devices.Report]:
    return [
      report(
        recording.expert_idx[:, rows],
        rows=recording.row[rows],
        mask=recording.mask[rows],
        capacity_factor=factor,
      )
      for rows in batches
    ]

  by_factor = {factor: reports(factor) for factor in capacity_factors}
  first = next(iter(by_factor.values()))

  def mean(get, found=first):
    return np.mean([get(r) for r in found], axis=0)

  load = np.stack([r.device_load / r.device_load.mean(axis=1, keepdims=True) for r in first])
  figures = {
    'least_load': load.min(axis=(0, 2)),
    'most_load': load.max(axis=(0, 2)),
    'straggler_factor': mean(lambda r: r.straggler_factor),
    'devices_per_token': mean(lambda r: r.mean_devices),
    **{f'over_{m}': mean(lambda r, m=m: r.over_limit(m)) for m in limits},
    'all_to_all_bytes_per_token': mean(lambda r: r.all_to_all_bytes_per_token),
  }
  for factor, found in by_factor.items():
    figures[f'expert_drops_{factor:g}'] = mean(lambda r: r.expert_drop_rate, found)
    figures[f'device_drops_{factor:g}'] = mean(lambda r: r.device_drop_rate, found)
  return figures


def table(figures: Mapping[str, np.ndarray], first_layer: int) -> str:
  """A line per layer, numbered from `first_layer`, and one of means over layers."""
  lines = [['layer', *map(_label, figures)]]
  for layer in range(len(figures['straggler_factor'])):
    cells = (_cell(key, value[layer]) for key, value in figures.items())
    lines.append([str(first_layer + layer), *cells])
  lines.append(['mean', *(_cell(key, value.mean()) for key, value in figures.items())])
  widths = [max(map(len, column)) for column in zip(*lines)]
  return '\n'.join('  '.join(c.rjust(w) for c, w in zip(line, widths)) for line in lines)


def _label(key: str) -> str:
  return key.replace('over_', '> ').replace('all_to_all_', '').replace('_', ' ')


def _cell(key: str, value: float) -> str:
  if key.startswith(('over_', 'expert_drops_', 'device_drops_')):
    return f'{value:.1%}'
  return f'{value:,.0f}' if key == 'all_to_all_bytes_per_token' else f'{value:.2f}'


def check_writable(path: pathlib.Path):
  """Makes the directory of a file that `save` will write.

  Raises:
    errors.InputError: the file cannot be written there.
  """
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
      pass
  except OSError as e:
    raise errors.InputError(
      f'--save={path} cannot be written: {e.strerror or e}; choose another file'
    ) from e
  errors.require(not path.is_dir(), f'--save={path} is a directory; choose a file')


def save(path: pathlib.Path, recording: Recording):
  """Writes the .npz file that router 'replay' reads."""
  routing_figures.write(path, {'expert_idx': recording.expert_idx})


def replay_overrides(
  model: schema.ModelConfig, path: pathlib.Path, recording: Recording
) -> dict[str, Any]:
  """The settings, by dotted key, under which the same model trains on the recording."""
  moe = model.moe
  num_rows, _, k = recording.expert_idx.shape[1:]
  overrides = {
    'model.moe.router': 'replay',
    'model.moe.options.replay_path': str(path),
    'model.moe.options.replay_rows': num_rows,
  }
  # What only the recorded router may have.
  if moe.num_experts_per_tok != k:
    overrides['model.moe.num_experts_per_tok'] = k
  if moe.num_expert_groups > 1:
    overrides['model.moe.num_expert_groups'] = 1
  if moe.expert_bias.update_rule != 'none':
    overrides['model.moe.expert_bias.update_rule'] = 'none'
  if moe.dispatch == 'capacity' and moe.capacity.policy == 'none':
    overrides['model.moe.dispatch'] = 'dropless'
  return overrides
