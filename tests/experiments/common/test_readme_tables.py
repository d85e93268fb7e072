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
