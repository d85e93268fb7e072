import contextlib
import errno
import fcntl
import os
import pathlib
import socket
import subprocess

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


def test_where_a_disk_is_full_that_is_said_though_the_directory_is_not_there_yet(tmp_path):
  with (
    pytest.raises(errors.InputError, match=r'no room .*c\.png: 1,234 bytes are needed'),
    atomic_files.told_if_full(tmp_path / 'a/b/c.png', 1234),
    open('/dev/full', 'w') as full,
  ):
    full.write('x')
  with (
    pytest.raises(errors.InputError, match='give the same command again; 3 are saved$'),
    atomic_files.told_if_full(tmp_path / 'a', 1, lambda: '3 are saved'),
  ):
    raise OSError(errno.ENOSPC, 'full')
  with pytest.raises(KeyError), atomic_files.told_if_full(tmp_path / 'a', 1):
    raise KeyError('a')


def test_a_run_goes_on_without_what_is_dispensable(tmp_path, caplog):
  for number in (errno.ENOSPC, errno.EACCES):
    with atomic_files.dispensable('plots'):
      raise OSError(number, os.strerror(number))
    assert os.strerror(number) in caplog.text
  with atomic_files.dispensable('plots'), atomic_files.told_if_full(tmp_path / 'a', 1):
    raise OSError(errno.ENOSPC, 'full')
  assert caplog.text.count('plots cannot be written, and the run goes on') == 3
  for error in (errors.InputError('of the user'), ValueError('of ours')):
    with pytest.raises(ValueError, match='of'), atomic_files.dispensable('plots'):
      raise error


def lock_twice(workdir):
  with atomic_files.lock(workdir), atomic_files.lock(workdir):
    pass


def test_one_writer_per_directory(tmp_path):
  with pytest.raises(errors.InputError, match='is being written by another process'):
    lock_twice(tmp_path)
  with atomic_files.lock(tmp_path):
    pass


def test_a_lock_that_cannot_be_opened(tmp_path):
  (tmp_path / '.lock').mkdir()  # as one of another user
  with (
    pytest.raises(errors.InputError, match=r'\.lock cannot be written: .*delete it if none'),
    atomic_files.lock(tmp_path),
  ):
    pass


def test_a_second_writer_that_began_at_the_same_time_takes_nothing_away(tmp_path, monkeypatch):
  """Both saw no directory; the second is refused, and it is the first's by now."""
  workdir, mkdir = tmp_path / 'run', pathlib.Path.mkdir
  with contextlib.ExitStack() as first:

    def after_the_first(path, *args, **kwargs):
      monkeypatch.undo()
      first.enter_context(atomic_files.lock(workdir))
      mkdir(path, *args, **kwargs)

    monkeypatch.setattr(pathlib.Path, 'mkdir', after_the_first)
    with pytest.raises(errors.InputError, match='is being written'), atomic_files.lock(workdir):
      pass
    assert (workdir / '.lock').is_file()


def test_what_killed_writers_left_is_deleted_and_nothing_else(tmp_path):
  (tmp_path / 'routing').mkdir()
  keep = ['.hidden', 'a.tmp', '.b.tmp', 'routing/.c.12x.tmp']
  for name in [*keep, '.config.json.77.tmp', 'routing/.13.npz.4711.tmp']:
    (tmp_path / name).write_text('')
  with atomic_files.lock(tmp_path):
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob('*') if path.is_file()}
  assert files == {*keep, '.lock'}


def test_a_directory_in_which_nothing_was_written_is_taken_away_by_an_error(tmp_path):
  def fail(workdir, written=()):
    with pytest.raises(errors.InputError, match='refused'), atomic_files.lock(workdir):
      for name in written:
        (workdir / name).mkdir(parents=True)
      raise errors.InputError('refused')

  (tmp_path / 'there').mkdir()
  fail(tmp_path / 'deep/run', ['checkpoints'])
  fail(tmp_path / 'there')
  assert [path.name for path in tmp_path.iterdir()] == ['there']
  fail(tmp_path / 'run', ['checkpoints/5'])
  assert (tmp_path / 'run/checkpoints/5').is_dir()
  fail(tmp_path / 'other', ['routing'])
  assert (tmp_path / 'other/routing').is_dir()


def test_without_locks_too_an_error_takes_the_empty_directory_away(tmp_path, monkeypatch):
  def no_locks(*unused):
    raise OSError(errno.ENOLCK, 'No locks available')

  monkeypatch.setattr(fcntl, 'flock', no_locks)
  with pytest.raises(errors.InputError, match='refused'), atomic_files.lock(tmp_path / 'run'):
    raise errors.InputError('refused')
  assert not list(tmp_path.iterdir())


def test_without_locks_in_the_file_system_a_file_names_the_owner(tmp_path, monkeypatch, caplog):
  def no_locks(*unused):
    raise OSError(errno.ENOLCK, 'No locks available')

  monkeypatch.setattr(fcntl, 'flock', no_locks)
  owner = tmp_path / '.owner'
  with atomic_files.lock(tmp_path):
    assert owner.read_text() == f'{socket.gethostname()} {os.getpid()}'
  assert not owner.exists() and 'No locks available' in caplog.text
  ended = subprocess.Popen(['true'])
  ended.wait()
  for stale in (ended.pid, os.getpid()):  # in containers every process may be number 1
    owner.write_text(f'{socket.gethostname()} {stale}')
    with atomic_files.lock(tmp_path):
      pass
  for alive in (f'{socket.gethostname()} {os.getppid()}', f'elsewhere {ended.pid}', ''):
    owner.write_text(alive)
    with (
      pytest.raises(errors.InputError, match=r'\.owner says that process .* delete that file'),
      atomic_files.lock(tmp_path),
    ):
      pass
    assert owner.read_text() == alive
