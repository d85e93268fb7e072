"""What a comparison writes, with the page and without."""

import pytest

from moe_jax.analysis.comparison import comparison, files, page, pictures
from tests.analysis.comparison import written


@pytest.fixture
def quick(monkeypatch):
  """Without pictures, which have a test of their own; the page's data is kept instead of drawn."""
  kept = {}
  monkeypatch.setattr(pictures, 'draw', lambda found, out: [(out / 'a.png', 'a')])
  monkeypatch.setattr(page, 'check_library', lambda: None)
  monkeypatch.setattr(page, 'write', lambda path, title, data: kept.update({path.name: data}))
  return kept


def test_page_pictures_and_tables(tmp_path, quick):
  found = comparison.compare(written.two_groups(tmp_path, 2))
  made = files.write(found, tmp_path / 'out')
  assert made.page == tmp_path / 'out' / 'compare.html' and len(made.tables) == 4
  assert quick['compare.html']['palette'] == pictures.PALETTE
  assert files.title(found) == 'Comparison of plain, bias'


def test_without_the_page(tmp_path, quick):
  found = comparison.compare([written.run(tmp_path / 'a')])
  assert files.write(found, tmp_path / 'out', with_page=False).page is None and not quick
