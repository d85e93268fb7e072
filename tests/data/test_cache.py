import fcntl
import os
import pathlib

import pytest

from moe_jax import errors
from moe_jax.config import paths
from moe_jax.data import cache


def is_whole(directory: pathlib.Path) -> bool:
  return (directory / 'done').is_file()


def fill(directory: pathlib.Path):
  (directory / 'done').write_text('new')


def test_root_prefers_config_then_environment_then_home(monkeypatch):
  monkeypatch.setenv('MOE_JAX_CACHE', '/from/environment')
  assert paths.cache_root('/from/config') == pathlib.Path('/from/config')
  assert paths.cache_root('') == pathlib.Path('/from/environment')
  monkeypatch.delenv('MOE_JAX_CACHE')
  assert paths.cache_root('') == pathlib.Path('~/.cache/moe_jax').expanduser()


def test_builds_once(tmp_path):
  calls = []

  def build(directory):
    calls.append(directory)
    fill(directory)

  for _ in range(2):
    assert is_whole(cache.get_or_build(tmp_path / 'a' / 'b', build, is_whole))
  assert len(calls) == 1
  assert calls[0].parent == tmp_path / 'a' and calls[0].name != 'b'
  assert [p.name for p in (tmp_path / 'a').iterdir()] == ['b']


def test_failed_build_leaves_nothing(tmp_path):
  def build(directory):
    fill(directory)
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    cache.get_or_build(tmp_path / 'x', build, is_whole)
  assert not list(tmp_path.iterdir())


def test_another_process_may_finish_first(tmp_path):
  def build(directory):
    fill(directory)
    (tmp_path / 'x').mkdir()
    (tmp_path / 'x' / 'done').write_text('theirs')

  target = cache.get_or_build(tmp_path / 'x', build, is_whole)
  assert (target / 'done').read_text() == 'theirs'
  assert [p.name for p in tmp_path.iterdir()] == ['x']


def test_half_written_directories_are_not_used(tmp_path):
  (tmp_path / 'x').mkdir()
  (tmp_path / 'x' / 'part').write_text('old')
  (tmp_path / '.x.killed').mkdir()
  (tmp_path / '.x.killed' / 'done').write_text('old')
  target = cache.get_or_build(tmp_path / 'x', fill, is_whole)
  assert [p.name for p in target.iterdir()] == ['done']
  assert (target / 'done').read_text() == 'new'


def test_unwritable_cache(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(errors.InputError, match=r'config\.data\.cache_dir.*file.*MOE_JAX_CACHE'):
    cache.get_or_build(tmp_path / 'file' / 'x', fill, is_whole)


def test_what_a_killed_builder_left_is_deleted_and_what_is_being_built_is_not(tmp_path):
  (tmp_path / '.x.killed').mkdir()
  (tmp_path / '.x.killed' / 'part').touch()
  (tmp_path / '.xy.other').mkdir()

  def build(directory):
    cache.get_or_build(tmp_path / 'x', fill, is_whole)  # a second builder, who must not clear ours
    assert directory.is_dir()

  cache.get_or_build(tmp_path / 'x', build, is_whole)
  assert sorted(p.name for p in tmp_path.iterdir()) == ['.xy.other', 'x']


@pytest.mark.parametrize('moment', ['open', 'flock'])
def test_a_directory_that_another_builder_clears_before_it_is_locked_is_made_anew(
  tmp_path, monkeypatch, moment
):
  """Between being made and being locked it looks like what a killed builder has left."""
  module = {'open': os, 'flock': fcntl}[moment]
  ordinary, cleared = getattr(module, moment), []

  def interrupted(first, *args):
    if not cleared:
      cleared.extend(path.name for path in tmp_path.iterdir())
      monkeypatch.setattr(module, moment, ordinary)
      cache._clear(tmp_path / 'x')
    return ordinary(first, *args)

  monkeypatch.setattr(module, moment, interrupted)
  assert is_whole(cache.get_or_build(tmp_path / 'x', fill, is_whole))
  assert len(cleared) == 1 and [p.name for p in tmp_path.iterdir()] == ['x']
