"""Data sets by the names that the commands take."""

import re

from moe_jax import errors
from moe_jax.graphs import block_model, dataset, import_graph, nearest_neighbors, planetoid

KINDS = ('sbm:NODES', 'digits', 'imports:PACKAGE[+PACKAGE...]', *planetoid.NAMES)


def read(
  spec: str, seed: int = 0, data_dir: str = '', mixing: float = 0.7, least: int = 40
) -> dataset.Dataset:
  """Returns a data set.

  Args:
    spec: one of `KINDS`.
    seed: of a block graph.
    data_dir: directory of Planetoid's files.
    mixing: share of edges that leave the class at a border, of a block graph.
    least: modules of a class, of an import graph.

  Raises:
    errors.InputError: there is no such data set.
  """
  kind, _, rest = spec.partition(':')
  if kind == 'sbm' and re.fullmatch('[0-9]+', rest):
    return block_model.sample(int(rest), seed, mixing=mixing)
  if spec == 'digits':
    return nearest_neighbors.digits()
  if kind == 'imports' and rest:
    return import_graph.read(rest.split('+'), least)
  if spec in planetoid.NAMES:
    errors.require(bool(data_dir), f'--graph={spec} needs --data_dir with the files ind.{spec}.*')
    return planetoid.read(data_dir, spec)
  raise errors.InputError(f'--graph={spec!r} must be one of {", ".join(KINDS)}')
