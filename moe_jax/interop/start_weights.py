"""A downloaded checkpoint as what a run starts from, `config.init_from`, without an import.

Weights are read as they lie there, straight onto the devices, and the small files come along, so
that the run is that of an import that was made first.
"""

import pathlib
from typing import Any

import jax

from moe_jax import trees
from moe_jax.config import pages, parse, schema
from moe_jax.data import kept_files
from moe_jax.interop import huggingface, sidecar
from moe_jax.models import model_variables
from moe_jax.runs import first_state, trained_run, warm_start
from moe_jax.storage import fetch
from moe_jax.training import train_state


def of(cfg: schema.Config) -> first_state.Weights | None:
  """What `init_from` names: a run, or a downloaded checkpoint; None where it is ''."""
  if cfg.init_from and huggingface.is_checkpoint(fetch.local(cfg.init_from, 'config.init_from')):
    return _Downloaded(cfg.init_from)
  return first_state.of_run(cfg)


class _Downloaded:
  """A `first_state.Weights`."""

  def __init__(self, place: str):
    self._directory = fetch.local(place, 'config.init_from')
    values = pages.values('base').to_dict()
    self._source, tokenizer = huggingface.opened(self._directory, values, self._directory)
    config = parse.to_dict(self._source.cfg)
    self.meta: trees.Json = {'config': config, 'tokenizer': trained_run.digest(tokenizer)}

  def read(
    self, cfg: schema.Config, mesh: jax.sharding.Mesh, say: trained_run.Say
  ) -> dict[str, Any]:
    say(f'starting from the weights of {cfg.init_from}, a downloaded checkpoint')
    for note in self._source.notes:
      say(note)
    theirs = self._source.cfg
    found = huggingface.placed(self._source, model_variables.abstract_variables(theirs.model, mesh))
    return warm_start.adapted(cfg, theirs, found, train_state.abstract_state(cfg, mesh), say)

  def carry(self, workdir: pathlib.Path):
    def write(target: pathlib.Path):
      sidecar.keep(self._directory, target)
      sidecar.write_record(self._source, target)

    kept_files.put(workdir, write)
