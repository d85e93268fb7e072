"""The weights of a model alone, without what its training has added: LoRA's pairs, a value head.

Pairs are merged into their matrices, slice by slice.
"""

import dataclasses
import itertools

import numpy as np

from moe_jax.checkpoints import stream_reader
from moe_jax.config import parse, schema
from moe_jax.training import lora, value_head

PAIRS = f'params/{lora.KEY}/'
ADDED = (PAIRS, f'params/{value_head.KEY}/')  # what a run adds to the weights of a model


def read(
  reader: stream_reader.Reader, name: str, index: tuple[int | slice, ...] = ()
) -> np.ndarray:
  """`reader.read`; of a matrix that has a pair, W + scale A B."""
  pair = PAIRS + name.removeprefix('params/')
  if f'{pair}/a' not in reader.leaves:
    return reader.read(name, index)
  # Layer and expert; a pair is read whole.
  lead = tuple(itertools.takewhile(lambda entry: isinstance(entry, int), index))
  weight, a, b = (reader.read(leaf, lead) for leaf in (name, f'{pair}/a', f'{pair}/b'))
  found = lora.add(name.rpartition('/')[2], weight, a, b, reader.read(f'{PAIRS}{lora.SCALE}'))
  return np.array(found)[index[len(lead) :]]


def config(cfg: schema.Config) -> schema.Config:
  """The config to record of a new run that holds a trained run's weights, and nothing added.

  All weights are trained in it, and PPO, whose value head is missing, is recorded as fine-tuning on
  the same conversations.

  Args:
    cfg: of the trained run.
  """
  objective = cfg.objective
  if value_head.is_used(cfg):
    objective = dataclasses.replace(objective, kind='sft')
  trained = schema.TrainableConfig(**parse.ADDED['trainable'])
  return dataclasses.replace(cfg, objective=objective, trainable=trained)
