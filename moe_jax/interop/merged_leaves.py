"""Reads the weights of a run trained with LoRA slice by slice, pairs merged into their matrices."""

import itertools

import numpy as np

from moe_jax.checkpoints import stream_reader
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
