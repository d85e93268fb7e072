import pathlib

import pytest

from experiments.common import readme_tables
from moe_jax import errors


def test_only_what_is_between_the_comments_changes(tmp_path):
  readme = tmp_path / 'README.md'
  readme.write_text('before\n<a>\nold\n<b>\nafter\n')
  readme_tables.fill(tmp_path, '<a>', '<b>', 'new')
  assert readme.read_text() == 'before\n<a>\n\nnew\n\n<b>\nafter\n'
  readme.write_text('<a>\nlost its end\n')
  with pytest.raises(errors.InputError, match='no place for the tables; put the lines <a> and <b>'):
    readme_tables.fill(tmp_path, '<a>', '<b>', 'new')
  with pytest.raises(errors.InputError, match='no place for the tables'):
    readme_tables.check(tmp_path, '<a>', '<b>')
  assert readme.read_text() == '<a>\nlost its end\n'
  readme.unlink()
  readme_tables.check(tmp_path, '<a>', '<b>')
  readme_tables.fill(tmp_path, '<a>', '<b>', 'new')
  assert readme.read_text() == '<a>\n\nnew\n\n<b>\n'


def test_every_study_looks_for_the_place_of_its_tables_before_it_computes():
  rooms = {}
  for path in (pathlib.Path(__file__).parents[3] / 'experiments').rglob('*.py'):
    if path.parent.name != 'common':
      rooms.setdefault(path.parent.name, []).append(path.read_text())
  writing = {room for room, texts in rooms.items() if any('tables.fill(' in t for t in texts)}
  assert writing >= {'purify', 'reinforcement', 'specialisation', 'topology', 'watermark'}
  looking = {room for room, texts in rooms.items() if any('tables.check(' in t for t in texts)}
  assert writing <= looking
