import collections
import os
import pickle

import numpy as np
import pytest
from scipy import sparse

from moe_jax import errors
from moe_jax.graphs import planetoid

# Nodes 0-3 are in allx, of which 0-1 in x; 4 and 6 are test nodes, 5 is described nowhere.
ALLX = np.array([[1.0, 0], [0, 2], [3, 4], [0, 0]])
TX = np.array([[5.0, 0], [0, 7]])  # of 6, then of 4
ALLY, TY = np.eye(2)[[0, 1, 1, 0]], np.eye(2)[[1, 0]]
GRAPH = {0: [1, 1, 2], 1: [0], 2: [0, 4], 3: [], 4: [2, 6], 5: [], 6: [4]}


def contents() -> dict:
  graph = collections.defaultdict(list)
  graph.update(GRAPH)
  return {
    'x': sparse.csr_matrix(ALLX[:2]), 'allx': sparse.csr_matrix(ALLX), 'tx': sparse.csr_matrix(TX),
    'y': ALLY[:2], 'ally': ALLY, 'ty': TY, 'graph': graph,
  }  # fmt: skip


def write(directory, protocol=2, **changes):
  for name, value in (contents() | changes).items():
    (directory / f'ind.cora.{name}').write_bytes(pickle.dumps(value, protocol))
  (directory / 'ind.cora.test.index').write_text('6\n4\n')


@pytest.mark.parametrize('protocol', [0, 2, 4])
def test_a_small_data_set(tmp_path, protocol):
  write(tmp_path, protocol)
  data = planetoid.read(tmp_path, 'cora')
  assert data.labels.tolist() == [0, 1, 1, 0, 0, -1, 1]
  want = [[1, 0], [0, 1], [0.6, 0.8], [0, 0], [0, 1], [0, 0], [1, 0]]
  np.testing.assert_allclose(data.features, want, rtol=1e-6)
  edges = list(zip(data.graph.senders.tolist(), data.graph.receivers.tolist()))
  assert sorted((s, r) for s, r in edges if s < r) == [(0, 1), (0, 2), (2, 4), (4, 6)]


def test_old_names_are_known():
  reader = planetoid._Reader(__import__('io').BytesIO(b''))
  for module, name in (
    ('numpy.core.multiarray', '_reconstruct'),
    ('scipy.sparse.csr', 'csr_matrix'),
    ('__builtin__', 'list'),
  ):
    assert reader.find_class(module, name) is not None


class Evil:
  def __reduce__(self):
    return os.mkdir, ('made_by_the_pickle',)


@pytest.mark.parametrize(
  'value, name',
  [
    (Evil(), 'mkdir'),
    ({0: [Evil()]}, 'mkdir'),
    (collections.OrderedDict(a=print), 'OrderedDict|print'),
    (np.array([Evil()], object), 'mkdir'),
  ],
)
def test_code_is_refused(tmp_path, monkeypatch, value, name):
  monkeypatch.chdir(tmp_path)
  write(tmp_path, graph=value)
  with pytest.raises(errors.InputError, match=f'ind.cora.graph is not read: it names .*({name})'):
    planetoid.read(tmp_path, 'cora')
  assert not (tmp_path / 'made_by_the_pickle').exists()


def test_damage_is_refused(tmp_path):
  write(tmp_path)
  whole = (tmp_path / 'ind.cora.allx').read_bytes()
  bad = sparse.csr_matrix(ALLX)
  bad.indices = bad.indices + 1
  for data, words in (
    (whole[:40], 'is no pickle of Planetoid'),
    (pickle.dumps(ALLX), 'must hold a sparse matrix and has ndarray'),
    (pickle.dumps(bad), 'holds a damaged matrix'),
    (pickle.dumps(sparse.csr_matrix(ALLX[:2])), 'do not fit together: allx .2, 2.'),
  ):
    (tmp_path / 'ind.cora.allx').write_bytes(data)
    with pytest.raises(errors.InputError, match=words):
      planetoid.read(tmp_path, 'cora')


def test_other_files_that_do_not_fit(tmp_path):
  for changes, index, words in (
    ({'ty': np.ones((2, 2))}, '6\n4', 'must hold one class per node'),
    ({'graph': [1]}, '6\n4', 'must hold a dictionary'),
    ({}, '6\nx', 'must hold a node number per line'),
    ({}, '6\n7', 'do not fit together'),
    ({}, '6\n6', 'do not fit together'),
    ({}, '', 'is empty'),
    ({'graph': {0: [9], **{i: [] for i in range(1, 7)}}}, '6\n4', 'node 9 of an edge'),
  ):
    write(tmp_path, **changes)
    (tmp_path / 'ind.cora.test.index').write_text(index)
    with pytest.raises(errors.InputError, match=words):
      planetoid.read(tmp_path, 'cora')
  with pytest.raises(errors.InputError, match='ind.pubmed.allx is missing'):
    planetoid.read(tmp_path, 'pubmed')
  with pytest.raises(errors.InputError, match='must be one of cora'):
    planetoid.read(tmp_path, 'core')
