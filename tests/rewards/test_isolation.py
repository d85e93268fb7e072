import errno
import os

import pytest

from moe_jax.rewards import isolation


@pytest.fixture
def written(monkeypatch):
  """{file of a process: what has been written to it}; what `refused` names cannot be."""
  files, refused = {}, []

  def write(pid, name, text):
    if text in refused:
      raise PermissionError(errno.EPERM, name)
    files[name] = text

  monkeypatch.setattr(isolation, '_write', write)
  files['refused'] = refused
  return files


def test_a_program_of_root_is_nobody(written, monkeypatch):
  monkeypatch.setattr(os, 'geteuid', lambda: 0)
  monkeypatch.setattr(os, 'getegid', lambda: 0)
  isolation.map_users(7)
  both = '0 0 1\n1 65534 1\n'
  assert (written['uid_map'], written['gid_map']) == (both, both) and 'setgroups' not in written


@pytest.mark.parametrize('own', [(1000, 100), (0, 0)])
def test_other_users_have_one_number_and_it_is_not_that_of_root(written, monkeypatch, own):
  """Root in a container too, where it may not give two."""
  written['refused'].append('0 0 1\n1 65534 1\n')
  monkeypatch.setattr(os, 'geteuid', lambda: own[0])
  monkeypatch.setattr(os, 'getegid', lambda: own[1])
  isolation.map_users(7)
  assert written['setgroups'] == 'deny'
  assert (written['uid_map'], written['gid_map']) == (f'1 {own[0]} 1\n', f'1 {own[1]} 1\n')


def test_what_the_system_refuses_is_an_error_with_its_reason(monkeypatch):
  monkeypatch.setattr(isolation.ctypes, 'get_errno', lambda: errno.EPERM)
  with pytest.raises(PermissionError, match='unshare of users: Operation not permitted'):
    isolation._check(-1, 'unshare of users')
  isolation._check(0, 'unshare of users')


def test_limits_are_set_hard(monkeypatch):
  found = {}
  monkeypatch.setattr(
    isolation.resource, 'setrlimit', lambda kind, both: found.update({kind: both})
  )
  isolation.limit(isolation.Limits(cpu_seconds=3, memory=99), 5)
  kinds = isolation.resource
  assert found[kinds.RLIMIT_CPU] == (3, 3) and found[kinds.RLIMIT_AS] == (99, 99)
  assert found[kinds.RLIMIT_NPROC] == (5, 5) and found[kinds.RLIMIT_CORE] == (0, 0)


def test_no_limit_on_processes_is_no_limit(monkeypatch):
  found = {}
  monkeypatch.setattr(isolation.resource, 'setrlimit', found.__setitem__)
  isolation.limit(isolation.Limits(), None)
  assert isolation.resource.RLIMIT_NPROC not in found and isolation.resource.RLIMIT_AS in found


def test_bubblewrap_is_told_the_same(tmp_path):
  (tmp_path / 'lib').mkdir()
  (tmp_path / 'lib64').symlink_to('lib')
  paths = [str(tmp_path / name) for name in ('lib', 'lib64')]
  found = isolation.bubblewrap('bwrap', paths, 99, {'A': 'b'})
  text = ' '.join(found)
  for words in ('--unshare-all', '--die-with-parent', '--cap-drop ALL', '--clearenv --setenv A b'):
    assert words in text
  assert f'--ro-bind {paths[0]} {paths[0]} --symlink lib {paths[1]}' in text
  assert text.endswith('--size 99 --tmpfs /box --remount-ro / --chdir /box --')
