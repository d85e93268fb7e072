"""The dump of a step that was not finite: written by the run that stops, read by `replay_step`.

Layout of `WORKDIR/nonfinite/<step>/`: report.json (step, rows, loss), config.json, batch.npz (the
global batch), checkpoints/<step>/ (weights and router state before the step, finite or not).
"""

import contextlib
import dataclasses
import json
import math
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_jax import atomic_files, errors, trees
from moe_jax.checkpoints import checkpointer as checkpointer_lib
from moe_jax.config import mesh_config, parse, schema
from moe_jax.data import tokenizer as tokenizer_lib
from moe_jax.devices import partitioning
from moe_jax.processes import agreement
from moe_jax.runs import loop_actions, trained_run
from moe_jax.training import objective, train_state

_SAVING = schema.CheckpointConfig(save_every=1, keep_last=1, keep_every=0)


class Dump(NamedTuple):
  """One step, ready to be taken again."""

  cfg: schema.Config
  mesh: jax.sharding.Mesh
  figures: dict[str, Any]  # step, rows, last_step, loss, grad_norm (None = not finite)
  state: dict[str, Any]  # seed, params, router_state, on the mesh
  batch: dict[str, np.ndarray]  # [B, L] int32


def write(
  directory: pathlib.Path,
  one: loop_actions.Member,
  figures: Mapping[str, Any],
  state: train_state.TrainState,
  batch: Mapping[str, np.ndarray],
):
  """Writes a dump in place of an older one; all processes call it.

  Args:
    directory: `WORKDIR/nonfinite/<step>`.
    one: whose step it is.
    figures: see `Dump`.
    state: of the loop.
    batch: of the member, whole.
  """
  first = agreement.is_first()
  if first or one.parts:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
  agreement.wait_for_all()
  values = one.take(_saved(state))
  steps = directory / 'checkpoints'
  with checkpointer_lib.Checkpointer(steps, _SAVING, parts=one.parts) as checkpointer:
    meta = trained_run.meta(one.cfg, one.corpus)
    checkpointer.save(figures['step'], values, meta, allow_nonfinite=True)
  if first:
    np.savez(directory / 'batch.npz', **objective.inputs(batch))
    record = {'config': parse.to_dict(one.cfg)}
    atomic_files.write_text(directory / 'config.json', json.dumps(record, indent=2) + '\n')
    line = {key: _finite_or_none(value) for key, value in figures.items()}
    atomic_files.write_text(directory / 'report.json', json.dumps(line, allow_nan=False) + '\n')
  agreement.wait_for_all()


def read(workdir: pathlib.Path, step: int | None) -> Dump:
  """Reads the dump of a step, or of the latest one, onto the devices that are here.

  Raises:
    errors.InputError: there is none, or it is damaged.
  """
  found = sorted(
    int(path.parent.name) for path in (workdir / 'nonfinite').glob('[0-9]*/report.json')
  )
  errors.require(
    bool(found),
    f'--workdir={workdir} holds no dump in nonfinite/; one is written when a run stops because '
    'its steps are not finite',
  )
  errors.require(
    step is None or step in found,
    f'--step={step} has no dump in {workdir / "nonfinite"}; there are steps '
    f'{", ".join(map(str, found))}',
  )
  step = found[-1] if step is None else step
  directory = workdir / 'nonfinite' / str(step)
  cfg, mesh = _placed(trained_run.read_config(directory, step))
  with trained_run.reader(directory) as checkpointer:
    restored = errors.present(
      checkpointer.restore(_saved(train_state.abstract_state(cfg, mesh)), step),
      f'{directory} has lost its checkpoint; train again to the same error',
    )
  with np.load(directory / 'batch.npz') as arrays:
    batch = objective.inputs(arrays)
  figures = json.loads((directory / 'report.json').read_text(encoding='utf-8'))
  return Dump(cfg, mesh, figures, restored.state, batch)


def texts(workdir: pathlib.Path, dump: Dump, rows: Sequence[int]) -> dict[int, str]:
  """The text of some rows of a dump's batch; token ids that the tokenizer lacks are left out."""
  data = dump.cfg.data
  tokenizer = tokenizer_lib.load(workdir / 'tokenizer.json', data.bos_token, data.eos_token)
  real = (dump.batch['segment_ids'] > 0) & (dump.batch['tokens'] >= 0)
  return {row: tokenizer.decode(dump.batch['tokens'][row][real[row]].tolist()) for row in rows}


def _placed(cfg: schema.Config) -> tuple[schema.Config, jax.sharding.Mesh]:
  """The mesh that the run had, where as many devices are here; else its first device alone.

  Stages of a pipeline become copies, in which single layers can be observed.
  """
  sizes = cfg.mesh.stage, cfg.mesh.data
  merged = dict(stage=1, data=-1 if -1 in sizes else math.prod(sizes))
  cfg = dataclasses.replace(cfg, mesh=dataclasses.replace(cfg.mesh, **merged))
  rows = cfg.train.micro_batch_size or cfg.train.batch_size
  with contextlib.suppress(errors.InputError):  # of another number of devices
    mesh = partitioning.make_mesh(cfg.mesh)
    if rows % partitioning.row_ways(mesh) == 0:
      return cfg, mesh
  alone = dataclasses.replace(cfg.mesh, **dict.fromkeys(mesh_config.AXES, 1), zero1=False)
  cfg = dataclasses.replace(cfg, mesh=alone)
  return cfg, partitioning.make_mesh(alone, jax.devices()[:1])


def _saved(state: train_state.TrainState) -> dict[str, Any]:
  """What decides a step's loss and gradient; the optimizer's moments do not."""
  return {'seed': state.seed, 'params': state.params, 'router_state': state.router_state}


def _finite_or_none(value: Any) -> trees.Json | Any:
  return None if isinstance(value, float) and not math.isfinite(value) else value
