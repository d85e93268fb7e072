"""Training speed of several configs, measured in turns."""

import statistics
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from moe_jax import config, partitioning, train

ROUNDS, STEPS = 7, 8  # per config: rounds in turn with the others, steps per round


def tokens_per_second(configs: Mapping[str, config.Config]) -> dict[str, float]:
  """Median over rounds of real tokens per second of the training step, data loading left out."""
  runners = {name: _runner(cfg) for name, cfg in tqdm.tqdm(configs.items(), desc='compiling')}
  rates = {name: [] for name in configs}
  for _ in tqdm.trange(ROUNDS, desc='timing', unit='round'):
    for name, runner in runners.items():
      start = time.perf_counter()
      num_tokens = runner()
      rates[name].append(num_tokens / (time.perf_counter() - start))
  return {name: statistics.median(values) for name, values in rates.items()}


def _runner(cfg: config.Config):
  """A function that trains a few steps on random tokens and returns how many tokens that were."""
  mesh = partitioning.make_mesh(cfg.mesh)
  shape = (cfg.train.batch_size, cfg.model.max_seq_len)
  ids = np.random.default_rng(0).integers(cfg.model.vocab_size, size=shape).astype(np.int32)
  rows = {
    'tokens': ids,
    'targets': np.roll(ids, -1, axis=1),
    'positions': np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape).copy(),
    'segment_ids': np.ones(shape, np.int32),
  }
  batch = partitioning.put_batch(rows, mesh)
  holder = {'state': train.init_state(cfg, mesh)}
  with partitioning.activate(mesh):
    step = train.make_train_step(cfg, mesh).lower(holder['state'], batch).compile()

  def run() -> int:
    for _ in range(STEPS):
      holder['state'], step_metrics = step(holder['state'], batch)
    jax.block_until_ready((holder['state'], step_metrics))
    return STEPS * int(jnp.size(batch['tokens']))

  run()  # the first steps also move memory
  return run
