"""What is said of a machine: every fault has its remedy, and a sound machine none."""

import re

import pytest

from moe_jax.runs import checkup

SOUND = checkup.Facts(
  python=(3, 12, 1),
  versions={'python': '3.12.1', 'moe_jax': '1', 'jax': '0.10', 'orbax-checkpoint': '1'},
  platform='gpu',
  devices=('H100', 'H100'),
  device_files=('nvidia0', 'nvidia1'),
  plugins={'nvidia-cudnn-cu13': '9.1', 'libtpu': None},
  free_bytes={'runs': 10**12, 'the cache': 10**12},
  memory_bytes=10**11,
  lock_problem='',
  cache_problem='',
)


def test_a_sound_machine_has_a_line_per_fact_and_no_remedy():
  lines = checkup.judge(SOUND)
  assert not [line for line in lines if line.remedy]
  said = '\n'.join(line.text() for line in lines)
  for words in (
    'python: 3.12.1',
    'jax: 0.10',
    '2 x H100 (gpu)',
    'nvidia-cudnn-cu13: 9.1',
    'disk at runs: 1,000,000,000,000 bytes free',
    'memory: 100,000,000,000 bytes',
    'locks at the workdir: work',
  ):
    assert words in said
  assert 'libtpu' not in said


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'python': (3, 10, 4)}, 'wrong python: 3.10.4; install Python 3.11 or newer'),
    ({'versions': {'orbax-checkpoint': None}}, 'wrong orbax-checkpoint: missing; pip install'),
    ({'platform': 'cpu'}, r'a GPU is here that JAX does not use: .*\[cuda\]'),
    ({'platform': 'cpu', 'device_files': ('accel0',)}, r'a TPU is here .*\[tpu\]'),
    ({'free_bytes': {'runs': 10**9}}, 'wrong disk at runs: 1,000,000,000 bytes free; free 2,000,'),
    ({'memory_bytes': 10**9}, 'wrong memory: 1,000,000,000 bytes; 2,000,000,000 are the least'),
    ({'lock_problem': 'no locks'}, 'wrong locks at the workdir: no locks; use a --workdir that'),
    ({'cache_problem': 'a file'}, 'wrong locks at the cache: a file; set MOE_JAX_CACHE to a dir'),
  ],
)
def test_each_fault_has_one_line_with_its_remedy(changes, message):
  wrong = [line.text() for line in checkup.judge(SOUND._replace(**changes)) if line.remedy]
  assert len(wrong) == 1
  assert re.search(message, wrong[0]), wrong


def test_this_machine_is_looked_at_without_a_trace(tmp_path):
  found = checkup.facts(tmp_path / 'not/yet/there')
  assert (
    found.lock_problem == found.cache_problem == ''
    and found.memory_bytes > 10**8
    and found.versions['jax']
  )
  assert len(found.free_bytes) == 2 and min(found.free_bytes.values()) > 0
  assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_said(tmp_path, monkeypatch):
  def refuse(*unused, **unused_options):
    raise PermissionError(13, 'Permission denied')

  monkeypatch.setattr(checkup.pathlib.Path, 'mkdir', refuse)
  assert 'Permission denied' in checkup.facts(tmp_path).lock_problem


def test_a_file_where_a_directory_must_be_is_said(tmp_path, monkeypatch):
  (tmp_path / 'file').write_text('')
  (tmp_path / 'link').symlink_to(tmp_path / 'nowhere')
  monkeypatch.setenv('MOE_JAX_CACHE', str(tmp_path / 'file'))
  for workdir, name in (('file', 'file'), ('file/below/it', 'file'), ('link', 'link')):
    found = checkup.facts(tmp_path / workdir)
    assert found.lock_problem == f'{tmp_path / name} is no directory'
    assert found.cache_problem == f'{tmp_path / "file"} is no directory'
