"""The page as a file: everything is in it, nothing is fetched, names cannot break out."""

import json
import re

import pytest

from moe_jax import errors
from moe_jax.analysis.comparison import page


def test_it_is_whole_and_names_are_data(tmp_path, monkeypatch):
  offline = pytest.importorskip('plotly.offline', reason='needs the extra compare')
  monkeypatch.setattr(offline, 'get_plotlyjs', lambda: 'THE LIBRARY')
  path = tmp_path / 'new' / 'compare.html'
  page.write(path, 'a < b', {'groups': ['</script><script>alert(1)']})
  text = path.read_text()
  assert '<script>THE LIBRARY</script>' in text and '<title>a &lt; b</title>' in text
  assert text.count('</script>') == 2  # the library's and the page's own
  data = json.loads(re.search(r'const DATA = (.*);\n', text)[1])
  assert data == {'title': 'a < b', 'groups': ['</script><script>alert(1)']}
  assert not re.search(r'(src|href)=', text) and 'drawDifference' in text and '#bar' in text


def test_without_the_library_the_extra_is_named(tmp_path, monkeypatch):
  monkeypatch.setattr(page.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(errors.InputError, match=r"pip install -e '.\[compare\]'.*--nopage"):
    page.write(tmp_path / 'compare.html', '', {})
  assert list(tmp_path.iterdir()) == []
