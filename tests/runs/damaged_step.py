"""A workdir whose newest step is damaged and had another config than the one before it."""

import functools
import operator
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.checkpoints import checkpointer as checkpointer_lib
from moe_jax.runs import trained_run


def add(workdir: pathlib.Path, values: Mapping[str, Any]):
  """Saves the newest weights of a workdir as one more step under other values, and damages it.

  As a run leaves it that was continued with --allow_config_change.
  """
  run = trained_run.load(workdir)
  meta = {k: v for k, v in trained_run.read_meta(workdir).items() if k != 'step'}
  for path, value in values.items():
    *sections, key = path.split('.')
    functools.reduce(operator.getitem, sections, meta['config'])[key] = value
  known = {path: leaf for path, leaf in jax.tree_util.tree_leaves_with_path(run.variables)}

  def array(path, like):
    leaf = known.get(path)
    return leaf if leaf is not None and leaf.shape == like.shape else jnp.zeros_like(like)

  variables = jax.tree_util.tree_map_with_path(array, trained_run.abstract_variables(meta))
  with checkpointer_lib.Checkpointer(workdir / 'checkpoints', run.cfg.checkpoint) as checkpointer:
    checkpointer.restore(run.variables, partial=True)
    checkpointer.save(run.step + 1, variables, meta, force=True)
  step = workdir / 'checkpoints' / str(run.step + 1)
  chunk = max(step.glob('state/**/d/*'), key=lambda path: path.stat().st_size)
  data = bytearray(chunk.read_bytes())
  data[len(data) // 2] ^= 0x55
  chunk.write_bytes(data)
