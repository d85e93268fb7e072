import os

import pytest

from moe_jax import atomic_files


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
