"""The state that a run starts from: random weights, or those of another run."""

import pathlib
from collections.abc import Callable
from typing import Any, Protocol

import jax

from moe_jax import trees
from moe_jax.config import schema
from moe_jax.data import corpus as corpus_lib
from moe_jax.data import kept_files
from moe_jax.runs import router_tables, trained_run, warm_start
from moe_jax.storage import fetch
from moe_jax.training import train_state, trainable


class Weights(Protocol):
  """What stands at `config.init_from`, opened to be started from."""

  meta: trees.Json  # 'config' and 'tokenizer' as in `trained_run.meta`, to be checked before `read`

  def read(
    self, cfg: schema.Config, mesh: jax.sharding.Mesh, say: trained_run.Say
  ) -> dict[str, Any]:
    """`params`, and what routing remembers of `router_state`, see `warm_start.read`."""
    ...

  def carry(self, workdir: pathlib.Path):
    """Copies the small files of a downloaded checkpoint into a workdir that has none."""
    ...


Open = Callable[[schema.Config], Weights | None]


class _RunWeights:
  """The newest weights of a workdir."""

  def __init__(self, place: str):
    self.meta: trees.Json = trained_run.read_meta(place, flag='config.init_from')
    self._workdir = fetch.local(place)

  def read(
    self, cfg: schema.Config, mesh: jax.sharding.Mesh, say: trained_run.Say
  ) -> dict[str, Any]:
    with trained_run.reader(self._workdir) as checkpointer:
      return warm_start.read(cfg, mesh, checkpointer, say)

  def carry(self, workdir: pathlib.Path):
    kept_files.carry(self._workdir, workdir)


def of_run(cfg: schema.Config) -> Weights | None:
  """The weights of the run at `init_from`; None where that is ''."""
  return _RunWeights(cfg.init_from) if cfg.init_from else None


def random(
  cfg: schema.Config, mesh: jax.sharding.Mesh, corpus: corpus_lib.Corpus
) -> train_state.TrainState:
  """The state at step 0 with random weights, and with what its router reads from outside."""
  return router_tables.with_tables(cfg, train_state.init_state(cfg, mesh), corpus)


def make(
  cfg: schema.Config,
  source: Weights | None,
  mesh: jax.sharding.Mesh,
  corpus: corpus_lib.Corpus,
  say: trained_run.Say,
) -> train_state.TrainState:
  """The state at step 0: random weights, or those of `source`."""
  if source is None:
    return random(cfg, mesh, corpus)
  found = source.read(cfg, mesh, say)
  state = router_tables.with_tables(cfg, train_state.state_from(cfg, mesh, found['params']), corpus)
  return state.replace(router_state=trainable.overlaid(state.router_state, found['router_state']))
