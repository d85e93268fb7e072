import pathlib

import pytest

from moe_jax import errors
from moe_jax.config import paths


def test_a_home_and_a_file_url_are_paths(monkeypatch):
  monkeypatch.setenv('HOME', '/homes/me')
  for text, want in (
    ('~/runs/a', '/homes/me/runs/a'),
    ('~', '/homes/me'),
    ('a/~b', 'a/~b'),
    ('file:///data/a%20b', '/data/a b'),
    ('file:/data', '/data'),
    ('FILE://localhost/data', '/data'),
    ('runs/a', 'runs/a'),
    ('runs/a:1', 'runs/a:1'),
    ('c:/x', 'c:/x'),
    (pathlib.Path('~/a'), '/homes/me/a'),
  ):
    assert str(paths.local(text)) == want


@pytest.mark.parametrize(
  'text, reason',
  [
    ('gs://bucket/a', 'gs:// is not read'),
    (pathlib.Path('gs://bucket/a'), 'gs:// is not read'),
    ('s3://bucket', 's3:// is not read'),
    ('hdfs://host/a', 'hdfs:// is not read'),
    ('file://host/a', 'three slashes'),
    ('~nosuchuser/a', 'home that is not known'),
    ('a\0b', 'zero byte'),
  ],
)
def test_what_is_no_path_here_is_refused_by_name(text, reason):
  with pytest.raises(errors.InputError, match=f'--workdir=.*{reason}'):
    paths.local(text, '--workdir')


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch):
  def no_home(path):
    raise RuntimeError('Could not determine home directory.')

  monkeypatch.setattr(pathlib.Path, 'expanduser', no_home)
  monkeypatch.delenv('MOE_JAX_CACHE', raising=False)
  with pytest.raises(errors.InputError, match='no home directory; set config.data.cache_dir'):
    paths.cache_root('')
