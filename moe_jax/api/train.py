"""Trains a config from Python as the command `train` does."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections

from moe_jax import errors, trees
from moe_jax.api import run as run_lib
from moe_jax.config import pages, parse, schema
from moe_jax.devices import host_allocator
from moe_jax.interop import start_weights
from moe_jax.post_training import expert_config, inherited_model, stages
from moe_jax.runs import (
  final_report,
  goodput,
  run_place,
  terminal,
  train_run,
  working_directory,
)

Config = str | ml_collections.ConfigDict | Mapping[str, Any] | schema.Config


def train(
  config: Config,
  workdir: str | os.PathLike[str],
  *,
  allow_config_change: bool = False,
  report: bool = True,
  say: Callable[[str], None] = print,
  **overrides: Any,
) -> run_lib.Run:
  """Trains in a directory, or goes on where the run in it has stopped.

      run = moe_jax.train('quickstart', 'runs/first', **{'train.num_steps': 100})
      run = moe_jax.train('configs/routing.py:gshard', 'runs/gshard')

  Args:
    config: a page by name or path, with `:variant`; or what its `get_config()` returns, possibly
      changed; or a checked config.
    workdir: where everything is written; gs:// and s3:// too, see docs/topics/storage.md.
    allow_config_change: continue a run of another config.
    report: at the end evaluate, sample and draw, as the command does.
    say: prints one line.
    **overrides: values by dotted key.

  Returns:
    The trained run; after Ctrl-C the run so far, which is saved, with `interrupted_by`.

  Raises:
    errors.InputError: a value that breaks a rule, before anything is written; or divergence.
  """
  host_allocator.keep_freed_memory()
  cfg = resolve(config, overrides)
  say = terminal.of(say)
  with run_place.opened(workdir, 'workdir', say) as place:
    trained, corpus = train_run.run_training(
      cfg,
      place.path,
      parts=place.parts,
      allow_config_change=allow_config_change,
      say=say,
      open_weights=start_weights.of,
      stage=stages.of(working_directory.reading(cfg, place.path)),
    )
    if trained.interrupted_by:
      say(
        f'stopped by {trained.interrupted_by} after step {trained.step}, which is saved; the same '
        'call again goes on'
      )
    elif report:
      final_report.finish(trained, corpus, place.path, say)
    else:
      say(goodput.text(goodput.read(place.path)))
  return run_lib.Run(trained, place.path)


def resolve(config: Config, overrides: Mapping[str, Any]) -> schema.Config:
  """A checked config out of whatever names one, see `train`.

  Raises:
    errors.InputError: there is no such page, an unknown key, or a value that breaks a rule.
  """
  checked = isinstance(config, schema.Config)
  if isinstance(config, str):
    config = pages.values(config)
  elif isinstance(config, schema.Config):
    config = parse.to_dict(config)
  page = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else dict(config)
  values = given = _overridden(page, overrides)
  chosen = {key: values[key] for key in ('init_from', 'objective') if key in values}
  values = _overridden(inherited_model.applied(page | chosen), overrides)
  if not checked:  # the config of a tuned run has the template of its start
    inherited_model.check_template(given, values)
  return parse.from_dict(expert_config.applied(values))


def _overridden(values: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
  for key, value in overrides.items():
    values = _replaced(values, key.split('.'), value, 'config')
  return values


def _replaced(values: trees.Json, keys: list[str], value: Any, prefix: str) -> dict[str, Any]:
  """Nested dicts with one leaf replaced."""
  name, *rest = keys
  errors.require(
    isinstance(values, Mapping) and name in values,
    f'{prefix}.{name} is not a known key'
    + (errors.did_you_mean(name, values) if isinstance(values, Mapping) else ''),
  )
  new = _replaced(values[name], rest, value, f'{prefix}.{name}') if rest else value
  return {**values, name: new}
