"""What a round takes, in seconds of the clock and of the processor."""

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax import errors
from moe_jax.federated import client, plain_round, rounds, run
from moe_jax.federated import settings as settings_lib

NAMES = ('loop over clients and batches', 'loop over clients', 'one program', 'one program, seeds')


def measure(
  settings: settings_lib.Settings, seeds: int, repeats: int, data_dir: str = ''
) -> dict[str, Any]:
  """Seconds per round and seed of each way, the least of `repeats` turns.

  Args:
    settings: of the run; rounds after the first, which has no prototypes, are timed.
    seeds: how many are one program in the last way.
    repeats: turns.
    data_dir: of the files of the data set.

  Raises:
    errors.InputError: seeds or repeats below 1, or bad data.
  """
  errors.require(seeds >= 1, f'--seeds={seeds} must be at least 1')
  errors.require(repeats >= 1, f'--repeats={repeats} must be at least 1')
  data = run.federations(settings, range(seeds), data_dir)
  keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
  states = jax.jit(jax.vmap(functools.partial(rounds.init, settings)))(keys)
  one = jax.tree.map(lambda x: x[0], (states, keys))
  own = data._replace(clients=client.Samples(*(x[0] for x in data.clients)))
  own = own._replace(server_x=data.server_x[0], server_y=data.server_y[0])
  together = _over_seeds(settings)
  ways: list[Callable[[Any], Any]] = [
    lambda state: plain_round.one_round(settings, state, own, one[1]),
    lambda state: plain_round.one_round(settings, state, own, one[1], whole_clients=True),
    lambda state: _single(settings)(state, own, one[1]),
    lambda states: together(states, data, keys),
  ]
  starts = [jax.block_until_ready(way(s)) for way, s in zip(ways, [one[0]] * 3 + [states])]
  least = [(float('inf'), float('inf'))] * len(ways)
  for _ in range(repeats):
    for i, way in enumerate(ways):
      wall, cpu = time.perf_counter(), time.process_time()
      jax.block_until_ready(way(starts[i]))
      spent = time.perf_counter() - wall, time.process_time() - cpu
      per_seed = [s / (seeds if i == 3 else 1) for s in spent]
      least[i] = (min(least[i][0], per_seed[0]), min(least[i][1], per_seed[1]))
  return {
    'settings': dataclasses.asdict(settings),
    'seeds': seeds,
    'repeats': repeats,
    'cores': os.cpu_count(),
    'device': jax.devices()[0].device_kind,
    'seconds': {name: {'clock': s[0], 'processor': s[1]} for name, s in zip(NAMES, least)},
  }


@functools.lru_cache(maxsize=1)
def _single(settings: settings_lib.Settings):
  return jax.jit(functools.partial(rounds.one_round, settings, None))


def _over_seeds(settings: settings_lib.Settings):
  def one(state: rounds.State, clients: client.Samples, server: tuple[Any, Any], key: jax.Array):
    empty = jnp.zeros(0)
    return rounds.one_round(settings, None, state, rounds.Data(clients, empty, empty, *server), key)

  many = jax.jit(jax.vmap(one))
  return lambda states, data, keys: many(states, data.clients, (data.server_x, data.server_y), keys)


def table(found: Mapping[str, Any]) -> str:
  """A Markdown table: milliseconds, and the ratio to the first way."""
  first = found['seconds'][NAMES[0]]
  rows = [
    '| a round, per seed | ms | times as fast | ms of the processor | times as fast |',
    '| --- | --- | --- | --- | --- |',
  ]
  for name, seconds in found['seconds'].items():
    cells = [name.replace('seeds', f'{found["seeds"]} seeds')]
    for key in ('clock', 'processor'):
      cells += [f'{1000 * seconds[key]:.1f}', f'{first[key] / seconds[key]:.1f}']
    rows.append(f'| {" | ".join(cells)} |')
  return '\n'.join(rows)
