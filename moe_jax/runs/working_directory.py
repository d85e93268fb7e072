"""Relative paths of a run that goes on, or is read, in another directory than it was started in.

`config.json` holds the directory of the first start. What a relative path of the config meant there
it means ever after; where nothing is left there (the run was moved with its text), it is looked for
below the present directory, and the fingerprint of the text decides whether that is the same.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from moe_jax import errors
from moe_jax.config import paths, schema
from moe_jax.data import source_files
from moe_jax.storage import urls

KEY = 'directory'  # in config.json
# Paths that not every reader of a run needs: where they lead to nothing, who needs them says so.
_SINGLE = (
  'init_from',
  'objective.policy.reward_model',
  'objective.process_reward.labels',
  'model.moe.options.replay_path',
)
_Path = str | os.PathLike[str]


def first(workdir: _Path, cfg: schema.Config) -> str:
  """What the record of a start has as its directory: that of the first start with these paths."""
  began, old = _record(workdir)
  return str(began if began and old == _fields(dataclasses.asdict(cfg)) else pathlib.Path.cwd())


def recorded(workdir: _Path) -> str:
  """The directory that the relative paths of a run's config are seen from."""
  return str(_record(workdir)[0] or pathlib.Path.cwd())


def as_recorded(cfg: schema.Config, workdir: _Path) -> schema.Config:
  """The config with the record's spelling of each path that means the same place."""
  began, old = _record(workdir)
  if began is None:
    return cfg
  new = _fields(dataclasses.asdict(cfg))
  here = pathlib.Path.cwd()
  same = {
    field: old[field]
    for field, text in new.items()
    if field in old and _written_out(old[field], began) == _written_out(text, here)
  }
  return _replaced(cfg, new | same)


def resolved(cfg: schema.Config, workdir: _Path) -> schema.Config:
  """The config to read by: relative paths lead to where they led when the run was started.

  Raises:
    errors.InputError: there is no text or tokenizer there, nor at the same path from here; names
      both.
  """
  began, old = _record(workdir)
  if began is None or began == pathlib.Path.cwd():
    return cfg
  new = _fields(dataclasses.asdict(cfg))
  kept = {field: text for field, text in new.items() if old.get(field) == text}
  found = {field: _place(field, text, began) for field, text in kept.items()}
  return _replaced(cfg, new | found)


def reading(cfg: schema.Config, workdir: _Path) -> schema.Config:
  """`resolved` of a config as a command or a call has it, in the spelling of this start."""
  return resolved(as_recorded(cfg, workdir), workdir)


def _place(field: str, text: str, began: pathlib.Path) -> str:
  """Where the names in a path are now, each as seen from `began` or from here."""
  if field in _SINGLE:
    return _one_place(field, text, began)
  remote = any(urls.is_remote(name.strip()) for name in text.split(','))
  whole = not remote and source_files.exists(str(began / paths.local(text, f'config.{field}')))
  names = [text] if whole else [name.strip() for name in text.split(',')]
  return ','.join(_one_place(field, name, began) for name in names if name)


def _one_place(field: str, name: str, began: pathlib.Path) -> str:
  if urls.is_remote(name):
    return name
  path, here = paths.local(name, f'config.{field}'), pathlib.Path.cwd()
  if path.is_absolute():
    return name
  found = [str(root / path) for root in (began, here) if source_files.exists(str(root / path))]
  if field in _SINGLE:
    found.append(str(began / path))
  errors.require(
    bool(found),
    f'config.{field}={name!r} is neither {began / path}, as seen from where the run was started, '
    f'nor {here / path}, as seen from here; put it back, or give the command in {began}',
  )
  return found[0]


def _written_out(text: str, root: pathlib.Path) -> list[str]:
  names = [name.strip() for name in text.split(',')]
  return [n if urls.is_remote(n) else os.path.normpath(root / paths.local(n)) for n in names]


def _fields(config: Mapping[str, Any]) -> dict[str, str]:
  """The paths in a config as nested dicts, by dotted key; names of data sets are none."""
  data = config['data']
  members = {f'data.mixture.{label}.path': member for label, member in data['mixture'].items()}
  found = {
    field: member['path']
    for field, member in {'data.path': data, **members}.items()
    if member['source'] not in schema.PATHLESS_SOURCES
  }
  found |= {'data.tokenizer': data['tokenizer'], **{field: _at(config, field) for field in _SINGLE}}
  return {key: text for key, text in found.items() if text and text not in ('bpe', 'bytes')}


def _at(config: Mapping[str, Any], field: str) -> str:
  """The value of a dotted key; '' in a record that is too old to have it."""
  *sections, name = field.split('.')
  for section in sections:
    config = config.get(section, {})
  return config.get(name, '')


def _replaced(cfg: schema.Config, new: Mapping[str, str]) -> schema.Config:
  """The config with other paths, by dotted key."""
  data = cfg.data
  mixture = {
    label: dataclasses.replace(member, path=new.get(f'data.mixture.{label}.path', member.path))
    for label, member in data.mixture.items()
  }
  data = dataclasses.replace(
    data,
    path=new.get('data.path', data.path),
    tokenizer=new.get('data.tokenizer', data.tokenizer),
    mixture=mixture,
  )
  cfg = dataclasses.replace(cfg, data=data)
  for field in _SINGLE:
    if field in new:
      cfg = _with(cfg, field.split('.'), new[field])
  return cfg


def _with(section: Any, keys: Sequence[str], value: str) -> Any:
  """A section of a config with another value at a path of keys."""
  name, *rest = keys
  new = _with(getattr(section, name), rest, value) if rest else value
  return dataclasses.replace(section, **{name: new})


def _record(workdir: _Path) -> tuple[pathlib.Path | None, dict[str, str]]:
  """(directory of the first start, the paths of its config); (None, {}) without a whole record.

  A record that cannot be read is refused by `run_record.check_workdir`.
  """
  try:
    record = json.loads((pathlib.Path(workdir) / 'config.json').read_text(encoding='utf-8'))
    return pathlib.Path(record[KEY]), _fields(record['config'])
  except (OSError, ValueError, KeyError, TypeError, AttributeError):
    return None, {}
