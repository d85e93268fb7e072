import gzip
import pathlib

import pytest

from moe_jax import errors
from moe_jax.data import source_files
from moe_jax.storage import bucket, fetch, urls


def test_a_path_here_stays_one():
  assert fetch.local('file:///a b') == pathlib.Path('/a b')


def test_an_object_is_copied_once_and_anew_when_it_has_changed(objects):
  objects.pipe_file('b1/d/a.txt', b'one')
  first = fetch.local('gs://b1/d/a.txt')
  assert first.read_bytes() == b'one'
  fetch.local('gs://b1/d/a.txt')
  assert objects.downloads == ['b1/d/a.txt']
  objects.pipe_file('b1/d/a.txt', b'two')  # of the same size
  assert fetch.local('gs://b1/d/a.txt') == first
  assert first.read_bytes() == b'two'
  assert {p.name for p in first.parent.iterdir()} == {'a.txt'}


def test_a_copy_that_was_cut_short_here_is_fetched_anew(objects):
  objects.pipe_file('b1/a', b'whole')
  fetch.local('gs://b1/a').write_bytes(b'who')
  assert fetch.local('gs://b1/a').read_bytes() == b'whole'


def test_a_prefix_is_a_folder_that_holds_what_is_there_now(objects):
  for name in ('a', 'sub/b', 'sub/c', 'other/d'):
    objects.pipe_file(f'b1/d/{name}', name.encode())
  objects.pipe_file('b1/dd/x', b'')
  place = fetch.local('s3://b1/d')
  names = sorted(p.relative_to(place).as_posix() for p in place.rglob('*') if p.is_file())
  assert names == ['a', 'other/d', 'sub/b', 'sub/c']
  objects.rm_file('b1/d/sub/b')
  objects.rm_file('b1/d/other/d')
  fetch.local('s3://b1/d')
  assert sorted(p.relative_to(place).as_posix() for p in place.rglob('*')) == [
    'a',
    'sub',
    'sub/c',
  ]


def test_a_glob_is_a_glob_of_copies_and_forgets_what_has_gone(objects):
  for name in ('d/1.txt', 'd/2.txt', 'd/3.md', 'e/4.txt', 'e/[5].txt'):
    objects.pipe_file(f'b1/{name}', name.encode())
  found = source_files.named('gs://b1/*/*.txt', 'here', 'path', ())
  assert [name for name, _ in found] == ['d/1.txt', 'd/2.txt', 'e/4.txt', 'e/[5].txt']
  assert 'b1/d/3.md' not in objects.downloads
  assert source_files.named('gs://b1/e/[5].txt', 'here', 'path', ())[0][1].name == '[5].txt'
  objects.rm_file('b1/d/2.txt')
  found = source_files.named('gs://b1/d/*.txt,gs://b1/e/4.txt', 'here', 'path', ())
  assert [name for name, _ in found] == ['1.txt', '4.txt']


def test_what_is_not_there_is_one_line(objects):
  with pytest.raises(errors.InputError, match='config.data.path=gs://b1/no.*correct the address'):
    fetch.local('gs://b1/no', 'config.data.path')


def test_a_step_without_its_last_object_is_never_read(objects):
  for key in ('1/state/d/x', f'1/{fetch.LAST}', '2/state/d/x', '3.tmp/x'):
    objects.pipe_file(f'b1/run/checkpoints/{key}', b'x')
  for key in ('config.json', fetch.SESSION, f'{fetch.LEASE}/1'):
    objects.pipe_file(f'b1/run/{key}', b'x')
  place = fetch.local('gs://b1/run')
  assert sorted(p.name for p in place.iterdir()) == ['checkpoints', 'config.json']
  assert [p.name for p in (place / 'checkpoints').iterdir()] == ['1']


def test_a_folder_whose_upload_was_cut_off_is_refused(objects):
  objects.pipe_file('b1/model/config.json', b'{}')
  objects.pipe_file(f'b1/model/{fetch.UPLOADING}', b'')
  with pytest.raises(errors.InputError, match='its upload was cut off'):
    fetch.local('gs://b1/model')


def test_an_object_that_changes_while_it_is_read_is_no_copy(objects, monkeypatch):
  objects.pipe_file('b1/a', b'123')
  monkeypatch.setattr(objects, 'cat_file', lambda path, **unused: b'1')
  with pytest.raises(errors.InputError, match='1 bytes came of a, which has 3'):
    fetch.local('gs://b1/a')


def test_a_full_disk_is_told(objects, monkeypatch):
  objects.pipe_file('b1/a', b'123')

  def get(*unused):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(objects, 'get', get)
  with pytest.raises(errors.InputError, match='no room on the disk'):
    fetch.local('gs://b1/a')


@pytest.mark.slow
def test_text_is_read_from_a_server(server, tmp_path):
  address, filesystem = server
  filesystem.pipe_file('tests/d/a.jsonl', b'{"text": "one"}\n')
  filesystem.pipe_file('tests/d/sub/b.jsonl.gz', gzip.compress(b'{"text": "two"}\n'))
  filesystem.pipe_file('tests/d/c.md', b'no')
  for path, count in (('d', 2), ('d/**/*.gz', 1), ('d/a.jsonl', 1)):
    found = source_files.named(f'{address}/{path}', 'here', 'path', ('.jsonl',))
    lines = [source_files.opened(file, None).read() for _, file in found]
    assert len(lines) == count and all(line.startswith(b'{"text": ') for line in lines)
  big = bytes(range(256)) * 2**15  # 8 MiB: in parts
  (tmp_path / 'big').write_bytes(big)
  bucket.Bucket(urls.parse(address)).put({'big': tmp_path / 'big'})
  assert fetch.local(f'{address}/big').read_bytes() == big


@pytest.mark.slow
def test_a_bucket_that_is_not_there_is_one_line(server):
  address, _ = server
  with pytest.raises(errors.InputError, match='there is no bucket'):
    fetch.local(address.replace('tests', 'missing') + '/a')
