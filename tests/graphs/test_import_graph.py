import sys

import numpy as np
import pytest

from moe_jax import errors
from moe_jax.graphs import import_graph

FILES = {
  '__init__.py': 'from pack import a',
  'a/__init__.py': 'from . import one\nraise RuntimeError("nothing is run")',
  'a/one.py': 'from .two import red\nred(blue)',
  'a/two.py': 'import pack.b.three\nclass red: pass\ndef green(blue): return red',
  'a/test_one.py': 'from pack.b import four',
  'b/__init__.py': '',
  'b/three.py': 'from ..a import two as other\nother.red\nblue.green',
  'b/four.py': 'from . import three\nimport json\ngreen',
  'b/broken.py': 'def (',
}


@pytest.fixture
def pack(tmp_path, monkeypatch):
  for name, text in FILES.items():
    path = tmp_path / 'pack' / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  monkeypatch.setattr(sys, 'path', [str(tmp_path), *sys.path])


def test_a_package_by_hand(pack):
  data = import_graph.read(['pack'], least=2)
  assert data.class_names == ('pack.a', 'pack.b')
  # a, a.one, a.two, b, b.four, b.three; `pack` itself is in no subpackage
  assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
  edges = {
    (s, r) for s, r in zip(data.graph.senders.tolist(), data.graph.receivers.tolist()) if s < r
  }
  # a - a.one; a.one - a.two; a.two - b.three; b.three - a; b.four - b and b.three
  assert edges == {(0, 1), (1, 2), (2, 5), (0, 5), (3, 4), (4, 5)}


def test_names_are_features(pack, monkeypatch):
  monkeypatch.setattr(import_graph, '_MOST_SHARE', 1.0)
  data = import_graph.read(['pack'], least=2)
  # red, blue and green are used by three modules each, anything else by fewer.
  assert data.features.shape == (6, 3)
  columns = {'blue': 0, 'green': 1, 'red': 2}
  two = np.log1p([1, 1, 2])  # blue, green, red of a.two
  np.testing.assert_allclose(data.features[2], two / np.linalg.norm(two), rtol=1e-6)
  np.testing.assert_allclose(data.features[4], np.eye(3)[columns['green']])


def test_two_packages_are_two_classes(pack, tmp_path):
  (tmp_path / 'other').mkdir()
  (tmp_path / 'other' / '__init__.py').write_text('import pack.b')
  (tmp_path / 'other' / 'x.py').write_text('')
  data = import_graph.read(['pack', 'other'], least=2)
  assert data.class_names == ('other', 'pack') and data.labels.tolist() == [0] * 2 + [1] * 7


def test_what_is_not_there_is_refused(pack):
  with pytest.raises(errors.InputError, match="no package 'no_such' is installed"):
    import_graph.read(['no_such'])
  with pytest.raises(errors.InputError, match='has 0 classes of at least 40 modules'):
    import_graph.read(['pack'])
