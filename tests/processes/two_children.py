"""Run by test_as_one.py as two processes of two devices: what `processes` and rows promise.

python two_children.py ADDRESS PROCESS_ID DIRECTORY; prints one JSON object.
"""

import json
import pathlib
import sys

import jax
import numpy as np

from moe_jax import errors
from moe_jax.devices import partitioning
from moe_jax.processes import agreement, launch, start


def caught(fn) -> str:
  try:
    fn()
  except errors.InputError as e:
    return str(e)
  return ''


def mesh(order: list[int], **axes: int) -> jax.sharding.Mesh:
  """The devices in this order over these axes; in any order, as on the torus of a TPU slice."""
  shape = [axes.get(name, 1) for name in partitioning.MESH_AXES]
  devices = np.array(jax.devices())[order].reshape(shape)
  auto = (jax.sharding.AxisType.Auto,) * len(shape)
  return jax.sharding.Mesh(devices, partitioning.MESH_AXES, axis_types=auto)


def rows_arrive(mesh: jax.sharding.Mesh) -> tuple[int, ...]:
  """Puts this process's parts of a batch on the mesh, checks the whole; returns the parts."""
  whole = np.arange(8 * 4, dtype=np.int32).reshape(8, 4)
  shards, ways = partitioning.row_shards(mesh), partitioning.row_ways(mesh)
  mine = np.concatenate([np.split(whole, ways)[shard] for shard in shards])
  placed = partitioning.put_batch({'tokens': mine}, mesh)['tokens']
  assert placed.shape == whole.shape
  np.testing.assert_array_equal(agreement.fetch(placed), whole)
  return shards


def fail_alone():
  with agreement.together():
    if jax.process_index() == 1:
      raise errors.InputError('the disk of this one is full')


def fail_all():
  with agreement.together():
    raise errors.InputError('the same everywhere')


def main(address: str, number: int, directory: str):
  flags = launch.Flags(coordinator=address, num_processes=2, process_id=number)
  line = start.initialize(launch.resolve(flags), flags, {})
  other = pathlib.Path(directory) / f'own{number}'
  other.mkdir()
  found = {
    'neighbours': rows_arrive(mesh([0, 1, 2, 3], data=4)),
    'interleaved': rows_arrive(mesh([0, 2, 1, 3], fsdp=2, expert=2)),
    'tensor_across': rows_arrive(mesh([0, 2, 1, 3], data=2, tensor=2)),
    'sequence_across': rows_arrive(mesh([0, 1, 2, 3], sequence=4)),
    'alone': caught(fail_alone),
    'all': caught(fail_all),
    'same': caught(lambda: agreement.require_same({'a': [1, 'é'], 'b': {'x': None}})),
    'differs': caught(lambda: agreement.require_same({'a': 1, 'the text': number})),
    'shared': caught(lambda: agreement.require_shared(pathlib.Path(directory))),
    'own': caught(lambda: agreement.require_shared(other)),
  }
  print(json.dumps(found))
  line.finish()


if __name__ == '__main__':
  main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
