"""A federated run in its directory: many seeds in one program, saved after every few rounds."""

import dataclasses
import functools
import io
import json
import pathlib
import zipfile
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from moe_jax import atomic_files, errors
from moe_jax.federated import accuracy, client, datasets, partition, rounds
from moe_jax.federated import settings as settings_lib

SAVED, RECORD = 'state.npz', 'settings.json'


class Curve(NamedTuple):
  """What a run measured."""

  rounds: np.ndarray  # [points], rounds done
  right: np.ndarray  # [points, seeds, classes], test images named rightly
  totals: np.ndarray  # [classes], test images


def run(
  settings: settings_lib.Settings,
  seeds: Sequence[int],
  workdir: pathlib.Path,
  *,
  data_dir: str = '',
  every: int = 10,
  devices: int = 1,
  quiet: bool = False,
) -> Curve:
  """Trains to the last round, from where an earlier call was cut off; returns the whole curve.

  Args:
    settings: resolved.
    seeds: each decides data, start and all draws of a run of its own.
    workdir: is made; holds the settings and what is needed to go on.
    data_dir: of the files of the data set.
    every: rounds between two points of the curve; the state is saved there.
    devices: over which the clients of a round are split.
    quiet: show no progress.

  Raises:
    errors.InputError: bad data, or the directory belongs to other settings.
  """
  errors.require(every >= 1, f'--every={every} must be at least 1')
  mesh = client_mesh(devices, settings.clients_per_round)
  images = datasets.load(settings.dataset, data_dir, seeds[0])  # also says what is missing
  totals = np.bincount(images.test_y, minlength=settings.data.classes)
  with atomic_files.lock(workdir):
    _check_record(settings, seeds, workdir)
    file = _read(workdir / SAVED)
    if file and file['points'][-1] == settings.rounds:
      return Curve(file['points'], file['right'], totals)
    data = federations(settings, seeds, data_dir)
    keys = jax.vmap(jax.random.key)(jnp.array(seeds))
    states = jax.jit(jax.vmap(functools.partial(rounds.init, settings)))(keys)
    points, right = [], []
    if file:
      states = _restored(workdir / SAVED, file, states)
      points, right = file['points'].tolist(), list(file['right'])
    done = int(states.round[0])
    errors.require(
      done <= settings.rounds,
      f'--workdir={workdir} has done {done} rounds, more than --rounds={settings.rounds}',
    )
    with tqdm.tqdm(
      total=settings.rounds, initial=done, desc=settings.method, unit='round', disable=quiet
    ) as bar:
      while done < settings.rounds:
        number = min(every - done % every, settings.rounds - done)
        states, found = rounds.advance(settings, mesh, number)(states, data, keys)
        done += number
        points, right = [*points, done], [*right, np.asarray(found)]
        _save(workdir / SAVED, states, points, right)
        means = accuracy.grouped(right[-1], totals)
        bar.set_postfix({name: f'{mean.mean():.1%}' for name, mean in means.items()})
        bar.update(number)
  return Curve(np.array(points), np.stack(right), totals)


def client_mesh(devices: int, clients: int) -> jax.sharding.Mesh | None:
  """A mesh with the one axis `clients`; None for one device.

  Raises:
    errors.InputError: there are not so many devices, or they do not divide the clients of a round.
  """
  there = jax.device_count()
  errors.require(
    1 <= devices <= there, f'--devices={devices} must be from 1 to {there}, the devices here'
  )
  errors.require(
    clients % devices == 0, f'--devices={devices} must divide {clients}, the clients of a round'
  )
  if devices == 1:
    return None
  automatic = (jax.sharding.AxisType.Auto,)
  return jax.make_mesh((devices,), ('clients',), automatic, devices=jax.devices()[:devices])


def federations(
  settings: settings_lib.Settings, seeds: Sequence[int], data_dir: str = ''
) -> rounds.Data:
  """The data of all seeds, with an axis [seeds] before them but for a published test set.

  Raises:
    errors.InputError: see `datasets.load` and `partition.federate`.
  """
  images = None
  each = []
  for seed in seeds:
    if images is None or settings.data.test_is_drawn:
      images = datasets.load(settings.dataset, data_dir, seed)
    each.append(partition.federate(images, settings, seed))
  stacked = rounds.Data(
    client.Samples(*(jnp.array(np.stack(parts)) for parts in zip(*(one.clients for one in each)))),
    *(jnp.array(np.stack(parts)) for parts in zip(*(one[1:] for one in each))),
  )
  if not settings.data.test_is_drawn:
    stacked = stacked._replace(test_x=stacked.test_x[0], test_y=stacked.test_y[0])
  return stacked


def _check_record(settings: settings_lib.Settings, seeds: Sequence[int], workdir: pathlib.Path):
  """Writes the settings into a new directory, and compares them with those of an older one.

  More rounds are no other run: nothing depends on how many are to come.
  """
  path = workdir / RECORD
  record = dataclasses.asdict(settings) | {'seeds': list(seeds)}
  del record['rounds']
  if path.exists():
    old = json.loads(path.read_text(encoding='utf-8'))
    other = [f'{name}={old.get(name)}' for name in record if old.get(name) != record[name]]
    errors.require(
      not other, f'--workdir={workdir} holds a run with {", ".join(other)}; give another --workdir'
    )
  else:
    atomic_files.write_text(path, json.dumps(record, indent=2) + '\n')


def _save(path: pathlib.Path, states: rounds.State, points: list[int], right: list[np.ndarray]):
  arrays = {f'leaf_{i}': np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(states))}
  arrays |= {'points': np.array(points), 'right': np.stack(right)}
  with io.BytesIO() as buffer:
    np.savez(buffer, allow_pickle=False, **arrays)
    atomic_files.write_bytes(path, buffer.getvalue())


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
  """The arrays of `_save`; none, if there is no file.

  Raises:
    errors.InputError: the file is damaged.
  """
  if not path.exists():
    return {}
  try:
    with np.load(path) as file:
      found = {name: file[name] for name in file.files}
    errors.require({'points', 'right'} <= set(found), 'it has no curve')
  except (OSError, ValueError, EOFError, zipfile.BadZipFile) as e:
    raise errors.InputError(f'{path} cannot be read ({e}); delete it to begin again') from e
  return found


def _restored(
  path: pathlib.Path, file: Mapping[str, np.ndarray], start: rounds.State
) -> rounds.State:
  """The states of the file.

  Raises:
    errors.InputError: they are of another structure than `start`.
  """
  leaves, tree = jax.tree.flatten(start)
  found = [file.get(f'leaf_{i}', np.zeros(0)) for i in range(len(leaves))]
  errors.require(
    [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in leaves],
    f'{path} holds arrays of other shapes than this run; delete it to begin again',
  )
  return jax.tree.unflatten(tree, map(jnp.asarray, found))
