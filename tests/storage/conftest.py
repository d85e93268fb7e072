"""Object storage for tests: one in memory, and real servers of the protocols on 127.0.0.1."""

import hashlib

import fsspec
import pytest
from fsspec.implementations import dirfs, memory

from moe_jax.storage import bucket
from tests.storage import servers


class Objects(dirfs.DirFileSystem):
  """fsspec's file system in memory with the entries of an object store: names, sizes, etags."""

  cachable = False

  def __init__(self):
    super().__init__(path='/objects', fs=memory.MemoryFileSystem(skip_instance_cache=True))
    self.fs.store, self.fs.pseudo_dirs = {}, ['']
    self.downloads = []

  def find(self, path, detail=True, **kwargs):
    found = super().find(path, detail=True, **kwargs)
    return {name: self._entry(name, info) for name, info in found.items()}

  def glob(self, path, detail=True, **kwargs):
    found = super().glob(path, detail=True, **kwargs)
    return {name: self._entry(name, info) for name, info in found.items()}

  def get(self, paths, files, **kwargs):
    self.downloads += paths
    for path, file in zip(paths, files):
      with open(file, 'wb') as f:
        f.write(self.cat_file(path))

  def put(self, files, paths, **kwargs):
    for path, file in zip(paths, files):
      with open(file, 'rb') as f:
        self.pipe_file(path, f.read())

  def pipe_file(self, path, value, mode='overwrite', **kwargs):
    if mode == 'create' and self.isfile(path):
      raise FileExistsError(path)
    self.fs.pipe_file(self._join(path), value)

  def _entry(self, name, info):
    is_file = info['type'] == 'file'
    return {**info, 'etag': hashlib.md5(self.cat_file(name)).hexdigest() if is_file else ''}


@pytest.fixture
def objects(monkeypatch, tmp_path) -> Objects:
  """What gs:// and s3:// mean in a test, in memory; its copies are below the test's folder."""
  made = Objects()
  monkeypatch.setattr(bucket, '_filesystem', lambda scheme: made)
  monkeypatch.setenv('MOE_JAX_CACHE', str(tmp_path / 'cache'))
  return made


@pytest.fixture(params=['gs', 's3'])
def server(request, monkeypatch, tmp_path):
  """(address, its fsspec file system) of an empty bucket on a server that speaks the protocol."""
  modules = {'gs': ('gcsfs', 'gcp_storage_emulator.server'), 's3': ('s3fs', 'moto.server')}
  for name in modules[request.param]:
    pytest.importorskip(name, reason='needs the extras storage and storage_test')
  start = {'gs': servers.google, 's3': servers.amazon}[request.param]
  monkeypatch.setenv('MOE_JAX_CACHE', str(tmp_path / 'cache'))
  kind = fsspec.get_filesystem_class(request.param)
  with start() as environment:
    for name, value in environment.items():
      monkeypatch.setenv(name, value)
    kind.clear_instance_cache()
    filesystem = fsspec.filesystem(request.param)
    filesystem.mkdir('tests')
    yield f'{request.param}://tests', filesystem
    kind.clear_instance_cache()
