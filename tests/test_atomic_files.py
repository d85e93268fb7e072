import errno
import os
import pathlib

import pytest

from moe_jax import atomic_files, errors


def test_writes_and_replaces(tmp_path):
  path = tmp_path / 'a.txt'
  atomic_files.write_text(path, 'é\n')
  atomic_files.write_bytes(path, b'second')
  assert path.read_bytes() == b'second' and os.listdir(tmp_path) == ['a.txt']


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / 'a.txt'
  atomic_files.write_text(path, 'old')

  def killed(*unused):
    raise KeyboardInterrupt

  monkeypatch.setattr(os, 'replace', killed)
  with pytest.raises(KeyboardInterrupt):
    atomic_files.write_text(path, 'new')
  assert path.read_text() == 'old'


def test_a_full_disk_is_one_clear_error_and_leaves_nothing_behind(tmp_path, monkeypatch):
  path = tmp_path / 'a.txt'
  atomic_files.write_text(path, 'old')
  write = pathlib.Path.write_bytes

  def full(self, data):
    write(self, data[:1])
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(pathlib.Path, 'write_bytes', full)
  with pytest.raises(errors.InputError, match=r'no room .*a\.txt: 3 bytes are needed and [\d,]+ '):
    atomic_files.write_text(path, 'new')
  assert path.read_text() == 'old' and os.listdir(tmp_path) == ['a.txt']
