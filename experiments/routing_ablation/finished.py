"""The finished runs of a study's workdir, whichever call trained them.

A run belongs to a call's report if it lies where the call would train it, and was trained with the
settings that the call would train it with; the others are left out, and named. Nothing is computed
here.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence

from experiments.routing_ablation import arms, learning_rates, measure
from moe_jax.config import schema
from moe_jax.runs import run_record, seeds, working_directory

_MOST_CHANGES = 3  # that are named: pages of another scale differ in dozens


def arms_in(root: pathlib.Path, names: Sequence[str]) -> list[str]:
  """Those of these arms that have a directory in a workdir, at whatever rate."""
  return [name for name in names if any((place / name).is_dir() for place in _places(root))]


def read(
  root: pathlib.Path,
  configs: Mapping[str, schema.Config],
  workdirs: Mapping[str, pathlib.Path],
) -> tuple[measure.Results, list[str]]:
  """(the runs of a workdir that belong to a report, a line for each reason why others do not).

  Args:
    root: of the study.
    configs: what each arm would be trained with; its seed plays no part.
    workdirs: by arm, the directory in which its runs would lie.
  """
  results, left = {}, {}
  for name, cfg in configs.items():
    for place in dict.fromkeys((workdirs[name], *_places(root))):
      reasons = {seed: _why_not(place, name, seed, cfg, workdirs) for seed in _trained(place, name)}
      fitting = [seed for seed, why in reasons.items() if why is None]
      if fitting:
        results |= measure.read({name: place}, fitting)
      for seed, why in reasons.items():
        if why:
          left.setdefault(why, {}).setdefault(name, []).append(seed)
  return results, [_line(why, by_arm) for why, by_arm in left.items()]


def changes(place: pathlib.Path, name: str, seed: int, cfg: schema.Config) -> list[str]:
  """Lines `key: old -> new`: in what a run was trained otherwise than an arm's config says."""
  where = place / name / str(seed)
  try:
    old = json.loads((where / 'config.json').read_text(encoding='utf-8'))['config']
  except (OSError, ValueError, KeyError, TypeError):
    return ['its config.json cannot be read']
  (new,) = seeds.configs(cfg, [seed])
  return run_record.differences(old, working_directory.as_recorded(new, where)).changes


def _places(root: pathlib.Path) -> list[pathlib.Path]:
  """The directories of a workdir that hold one for each arm."""
  rates = learning_rates.workdir(root, 0).parent
  return [root, *sorted(path for path in rates.glob('*') if path.is_dir())]


def _trained(place: pathlib.Path, name: str) -> list[int]:
  """The seeds of an arm whose training has ended, rising."""
  found = (path.name for path in (place / name).glob('*') if path.name.isdecimal())
  return sorted(seed for seed in map(int, found) if measure.path(place, name, seed).exists())


def _why_not(
  place: pathlib.Path,
  name: str,
  seed: int,
  cfg: schema.Config,
  workdirs: Mapping[str, pathlib.Path],
) -> str | None:
  """Why a run is in no report of this call; None: it is. '' for what the table of rates has."""
  found = changes(place, name, seed, cfg)
  elsewhere = place != workdirs[name]
  if elsewhere and arms.ARMS[name].family == name and _are_of_rate(found):
    return ''
  if found:
    more = f' and {len(found) - _MOST_CHANGES} more' if len(found) > _MOST_CHANGES else ''
    return f'trained with other settings, {"; ".join(found[:_MOST_CHANGES])}{more}'
  if elsewhere:
    return f'lies in {place}, where runs with --rates_from or --learning_rates, or without, do not'
  if not measure.finished(place, name, seed):
    return 'lacks figures, which a call with this arm and seed adds'
  return None


def _are_of_rate(found: Sequence[str]) -> bool:
  return len(found) == 1 and found[0].startswith('optim.peak_lr:')


def _line(why: str, by_arm: Mapping[str, Sequence[int]]) -> str:
  runs = '; '.join(f'{name} seed {",".join(map(str, found))}' for name, found in by_arm.items())
  return f'left out of the report: {runs}: {why}'
