"""Training speed of several configs, measured in turns."""

import statistics
import time
from collections.abc import Mapping

import jax
import tqdm

from experiments.common import stepper
from moe_jax.config import schema

ROUNDS, STEPS = 7, 8  # per config: rounds in turn with the others, steps per round


def tokens_per_second(configs: Mapping[str, schema.Config]) -> dict[str, float]:
  """Median over rounds of tokens per second of the training step, data loading left out."""
  steppers = {name: _warm(cfg) for name, cfg in tqdm.tqdm(configs.items(), desc='compiling')}
  rates = {name: [] for name in configs}
  for i in tqdm.trange(ROUNDS, desc='timing', unit='round'):
    for name, one in steppers.items():
      start = time.perf_counter()
      jax.block_until_ready(one.run(i * STEPS, STEPS))
      rates[name].append(STEPS * one.tokens / (time.perf_counter() - start))
  return {name: statistics.median(values) for name, values in rates.items()}


def _warm(cfg: schema.Config) -> stepper.Stepper:
  one = stepper.Stepper(cfg)
  jax.block_until_ready(one.run(0, STEPS))  # the first steps also move memory
  return one
