"""The train step of a config, compiled and ready to be timed on random tokens."""

import pathlib
import shutil
import tempfile
from typing import Any

import jax
import numpy as np

from experiments.common import harness
from moe_jax.config import schema
from moe_jax.devices import partitioning
from moe_jax.planning import profile
from moe_jax.training import optimizer_step, train_state

NUM_BATCHES = 8  # that a run goes through in turn, so that routing is never learnt by heart
PROFILED_STEPS = 3
# AdamW in float32 reads parameter, gradient and both moments and writes all but the gradient.
OPTIMIZER_BYTES = 28  # per parameter and step


def rows(cfg: schema.Config, seed: int) -> dict[str, np.ndarray]:
  """A batch of whole documents of random tokens: arrays [B, L] int32."""
  shape = (cfg.train.batch_size, cfg.model.max_seq_len)
  ids = np.random.default_rng(seed).integers(cfg.model.vocab_size, size=shape).astype(np.int32)
  targets = np.roll(ids, -1, axis=1)
  targets[:, -1] = -1
  positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape).copy()
  return {
    'tokens': ids,
    'targets': targets,
    'positions': positions,
    'segment_ids': np.ones(shape, np.int32),
  }


class Stepper:
  """Holds the state of a run and takes steps with it.

  Args:
    cfg: the run.
    num_batches: different batches that steps take in turn.
  """

  def __init__(self, cfg: schema.Config, num_batches: int = NUM_BATCHES):
    self._mesh = partitioning.make_mesh(cfg.mesh)
    self._batches = [
      partitioning.put_batch(rows(cfg, seed), self._mesh) for seed in range(num_batches)
    ]
    self._state = train_state.init_state(cfg, self._mesh)
    self.tokens = cfg.train.batch_size * cfg.model.max_seq_len  # of one step
    with partitioning.activate(self._mesh):
      step = optimizer_step.make_train_step(cfg, self._mesh)
      self._step = step.lower(self._state, self._batches[0]).compile()

  def run(self, number: int, steps: int = 1) -> Any:
    """Starts steps on the batches from `number` on; returns what to wait for."""
    for i in range(number, number + steps):
      self._state, metrics = self._step(self._state, self._batches[i % len(self._batches)])
    return self._state, metrics

  @property
  def peak_bytes(self) -> int:
    """Bytes that the compiled step allocates beside state and batch."""
    return harness.temporaries(self._step)

  def shares(self, steps: int = PROFILED_STEPS) -> dict[str, float]:
    """Of the time of some steps, by the groups of `profile.GROUPS`, from a profile of them."""
    jax.block_until_ready(self.run(0))
    directory = pathlib.Path(tempfile.mkdtemp(prefix='profile-'))
    try:
      with jax.profiler.trace(str(directory), profiler_options=profile.options()):
        jax.block_until_ready(self.run(0, steps))
      return profile.shares(directory, self._step.as_text())
    finally:
      shutil.rmtree(directory, ignore_errors=True)
