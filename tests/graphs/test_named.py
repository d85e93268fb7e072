import pytest

from moe_jax import errors
from moe_jax.graphs import named


def test_block_graphs_by_name():
  data = named.read('sbm:60', seed=3, mixing=0.0)
  assert data.graph.num_nodes == 60 and data.name == 'sbm:60'
  assert named.read('sbm:60', seed=4).features.tolist() != data.features.tolist()


def test_other_names():
  with pytest.raises(errors.InputError, match="no package 'no_such' is installed"):
    named.read('imports:no_such')
  with pytest.raises(errors.InputError, match='--graph=cora needs --data_dir'):
    named.read('cora')
  with pytest.raises(errors.InputError, match='ind.cora.allx is missing'):
    named.read('cora', data_dir='nowhere')
  for spec in ('sbm', 'sbm:x', 'digit', 'imports:', ''):
    with pytest.raises(errors.InputError, match='must be one of sbm:NODES, digits'):
      named.read(spec)
