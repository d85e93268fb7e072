import importlib
import threading

import pytest

from moe_jax import errors
from moe_jax.storage import bucket, urls


class HttpError(Exception):
  """As gcsfs raises it."""

  def __init__(self, code, message):
    super().__init__(message)
    self.code = code


class NoCredentialsError(Exception):
  """As botocore raises it."""


@pytest.mark.parametrize(
  'error, words',
  [
    (FileNotFoundError('b1'), "there is no bucket 'b1'.*correct the address"),
    (HttpError(401, 'Anonymous caller lacks storage.objects.list'), 'no valid cred.*gcloud auth'),
    (NoCredentialsError('Unable to locate credentials'), 'no valid credentials'),
    (PermissionError('Access Denied'), 'permission denied.*log in as another'),
    (HttpError(403, 'Forbidden'), 'permission denied'),
    (ConnectionResetError('reset by peer'), 'broke off.*reset by peer.*check the network'),
    (TimeoutError(), 'cannot be reached.*TimeoutError'),
  ],
)
def test_a_failure_of_the_libraries_is_one_line(objects, monkeypatch, error, words):
  def fail(*unused, **also_unused):
    raise error

  monkeypatch.setattr(objects, 'get', fail)
  client = bucket.Bucket(urls.parse('gs://b1/a'), '--workdir')
  with pytest.raises(errors.InputError, match=f'^--workdir=gs://b1/a: .*{words}') as caught:
    client.get({'a': 'file'})
  assert '\n' not in str(caught.value)


def test_a_package_that_is_not_installed_is_named(monkeypatch):
  def absent(name):
    raise ImportError(f'No module named {name!r}')

  monkeypatch.setattr(importlib, 'import_module', absent)
  with pytest.raises(errors.InputError, match=r's3fs.*pip install moe_jax\[storage\]'):
    bucket.Bucket(urls.parse('s3://b1/a'))


def test_only_one_can_create_an_object(objects):
  client = bucket.Bucket(urls.parse('gs://b1/a'))
  assert client.create('a', b'first')
  assert not client.create('a', b'second')
  assert client.read('a') == b'first' and client.read('b') is None


def test_a_refused_precondition_means_that_there_is_one(objects, monkeypatch):
  client = bucket.Bucket(urls.parse('gs://b1/a'))
  for error in (HttpError(412, 'no'), OSError('PreconditionFailed'), FileExistsError('a')):

    def fail(*unused, error=error, **also_unused):
      raise error

    monkeypatch.setattr(objects, 'pipe_file', fail)
    assert not client.create('a', b'')


def test_a_key_that_would_leave_the_cache_is_refused(objects):
  objects.pipe_file('b1/d/ok', b'')
  client = bucket.Bucket(urls.parse('gs://b1/d'))
  with pytest.raises(errors.InputError, match='"."'):
    client._object(('b1/d/../../x', {'type': 'file', 'size': 1, 'etag': 'x'}))


@pytest.mark.slow
def test_objects_of_a_server(server, tmp_path):
  address, _ = server
  client = bucket.Bucket(urls.parse(address))
  files = {f'd/{i}': tmp_path / str(i) for i in range(40)}
  for file in files.values():
    file.write_text(file.name)
  client.put(files)
  before = client.find('d')
  assert before.keys() == files.keys() and before['d/17'].size == 2
  client.write('d/17', b'71')
  assert client.find('d')['d/17'].version != before['d/17'].version
  assert client.create('new', b'first')
  assert not client.create('new', b'second')
  assert client.read('new') == b'first'
  client.delete(['d/17', 'd/17'])
  assert client.read('d/17') is None and len(client.find('d')) == 39
  threads = []
  won = []
  for i in range(4):
    threads.append(
      threading.Thread(target=lambda i=i: won.append(client.create('race', b'%d' % i)))
    )
    threads[-1].start()
  for thread in threads:
    thread.join()
  assert sorted(won) == [False, False, False, True]
