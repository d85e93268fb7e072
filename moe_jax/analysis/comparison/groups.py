"""Runs as groups that differ in their configs, with a run per seed in each."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moe_jax import errors
from moe_jax.analysis.comparison import workdirs
from moe_jax.config import parse, schema
from moe_jax.runs import run_record

# What makes no other run of it: where it is computed, what is written, and the seed. Keys, or
# sections with all that is in them.
IGNORED = (
  *run_record.PLACEMENT,
  'checkpoint',
  'data.cache_dir',
  'data.prefetch',
  'train.eval_every',
  'train.log_every',
  'train.routing_every',
  'train.sample_prompt',
  'train.sample_tokens',
  'train.seed',
)
SEED = '*'  # in a start that differs by the run's own seed
ABSENT = '-'  # of a setting that a group does not have


@dataclasses.dataclass(frozen=True)
class Group:
  """Runs of one config and one kind of start, with different seeds."""

  name: str
  cfg: schema.Config  # of its first run
  runs: Mapping[int, workdirs.RunFiles]  # by seed, rising


def flat(values: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """Nested values by dotted key, without what is `IGNORED`."""
  found = {}
  for key, value in values.items():
    name = f'{prefix}{key}'
    if name in IGNORED:
      continue
    nested = isinstance(value, Mapping)
    found |= flat(value, f'{name}.') if nested else {name: value}
  return found


def group(runs: Sequence[workdirs.RunFiles]) -> list[Group]:
  """Groups of runs with equal configs and starts, seeds apart, in the order in which they are met.

  Runs whose `init_from` differs by their own seed alone, `base/0` of seed 0 and `base/1` of seed 1,
  have equal starts, unless one such start has runs of several seeds.

  Raises:
    errors.InputError: two runs are of one config and one seed.
  """
  by_start = _grouped(runs, _settings)
  shared = {
    _key(_settings(members[0])) for members in by_start if len({run.seed for run in members}) > 1
  }

  def settings_of(run: workdirs.RunFiles) -> dict[str, Any]:
    found = _settings(run)
    return found if _key(found) in shared else _by_seed(run, found)

  ordered = [
    dict(sorted((run.seed, run) for run in members)) for members in _grouped(runs, settings_of)
  ]
  names = _names([[run.path for run in members.values()] for members in ordered])
  return [
    Group(name, next(iter(members.values())).cfg, members) for name, members in zip(names, ordered)
  ]


def _key(values: Mapping[str, Any]) -> str:
  return json.dumps(values, sort_keys=True)


def _grouped(
  runs: Sequence[workdirs.RunFiles], settings_of: Callable[[workdirs.RunFiles], dict[str, Any]]
) -> list[list[workdirs.RunFiles]]:
  found: dict[str, list[workdirs.RunFiles]] = {}
  for run in runs:
    members = found.setdefault(_key(settings_of(run)), [])
    twin = next((one for one in members if one.seed == run.seed), run)
    errors.require(
      twin is run,
      f'{run.path} and {twin.path} have one config and one seed (train.seed={run.seed}), so they '
      'say nothing about each other; leave one of them out',
    )
    members.append(run)
  return list(found.values())


def _by_seed(run: workdirs.RunFiles, found: Mapping[str, Any]) -> dict[str, Any]:
  """Settings with the run's own seed, where `init_from` ends with it, as SEED."""
  start = re.sub(rf'(?<!\d){run.seed}(?=/*$)', SEED, found.get('init_from', ''))
  return {**found, 'init_from': start}


def settings(groups: Sequence[Group]) -> dict[str, list[str]]:
  """In what the configs and starts differ: {key: the value of each group as text}."""
  columns = [_settings_of_all(list(one.runs.values())) for one in groups]
  keys = dict.fromkeys(key for column in columns for key in column)
  rows = {key: [_text(column.get(key)) for column in columns] for key in keys}
  return {key: values for key, values in rows.items() if len(set(values)) > 1}


def _settings(run: workdirs.RunFiles) -> dict[str, Any]:
  """What makes it another run: its config, and out of what it was upcycled, if it was."""
  made_of = {f'upcycled.{key}': value for key, value in run.upcycled.items() if key != 'from'}
  return flat(parse.to_dict(run.cfg)) | made_of


def _settings_of_all(runs: Sequence[workdirs.RunFiles]) -> dict[str, Any]:
  """What the runs of a group share."""
  first, *others = [_settings(run) for run in runs]
  return first if all(one == first for one in others) else _by_seed(runs[0], first)


def _text(value: Any) -> str:
  if value is None:
    return ABSENT
  return f'{value:g}' if isinstance(value, float) else str(value) if value != '' else "''"


def _names(paths: Sequence[Sequence[pathlib.Path]]) -> list[str]:
  """A short name per group: what its directories have in common below what all share."""
  every = [path.absolute().parts for members in paths for path in members]
  shared = 0
  while len({parts[: shared + 1] for parts in every}) == 1 and shared < min(map(len, every)) - 1:
    shared += 1
  folder = every[0][shared - 1]
  names = [
    _name([path.absolute().parts[shared:] for path in members]) or folder for members in paths
  ]
  taken: dict[str, int] = {}
  for name in names:
    taken[name] = taken.get(name, 0) + 1
  return [name if taken[name] == 1 else f'{name} {_letters(i)}' for i, name in enumerate(names)]


def _letters(number: int) -> str:
  """A, B ... Z, AA, AB ...: of 0, 1 ..."""
  before, last = divmod(number, 26)
  return (_letters(before - 1) if before else '') + chr(ord('A') + last)


def _name(tails: Sequence[Sequence[str]]) -> str:
  """The parts that all tails have, or the beginning that their names share, without a seed."""
  if len(tails) == 1:
    return '/'.join(tails[0])
  common = [parts[0] for parts in zip(*tails) if len(set(parts)) == 1]
  if common:
    return '/'.join(common)
  joined = ['/'.join(tail) for tail in tails]
  length = next(
    (i for i, letters in enumerate(zip(*joined)) if len(set(letters)) > 1), min(map(len, joined))
  )
  return re.sub(r'([-_./ ]+s|[-_./ ]*seed)?[-_=./ ]*\d*$', '', joined[0][:length])
