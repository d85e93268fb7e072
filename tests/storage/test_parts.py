import pytest

from moe_jax import errors
from moe_jax.storage import bucket, fetch, parts, urls

URL = urls.parse('gs://b1/runs/a')
STEP = 8


def of(process, processes=3, start='t1'):
  return parts.Parts(bucket.Bucket(URL), URL, 'W', start, process, processes)


def written(folder, **files):
  folder.mkdir(parents=True, exist_ok=True)
  for name, text in files.items():
    path = folder / name.replace('__', '/')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  return folder


def read(folder):
  return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob('*') if p.is_file()}


@pytest.fixture(name='stopped')
def _stopped(monkeypatch):
  """Whether the run was told to end; nobody waits."""
  told = []
  monkeypatch.setattr(parts, 'stop_run', lambda: told.append(True))
  monkeypatch.setattr(parts, 'PATIENCE', 0.0)
  return told


def test_the_first_process_gets_the_parts_of_the_others(objects, tmp_path):
  of(1).give(STEP, written(tmp_path / '1', one__d__x='a', meta__1='b'))
  of(2).give(STEP, written(tmp_path / '2', two__d__x='c'))
  of(2).give(STEP * 10, written(tmp_path / '3', later='d'))
  here = written(tmp_path / '0', zero='z', meta__0='y')
  of(0).collect(STEP, here)
  want = {'zero': 'z', 'meta/0': 'y', 'one/d/x': 'a', 'meta/1': 'b', 'two/d/x': 'c'}
  assert read(here) == want
  assert set(objects.find('b1')) == {
    'b1/runs/a/.parts/t1/80/2/later',
    'b1/runs/a/.parts/t1/80/2.json',
  }


def test_what_another_start_has_left_is_not_taken(objects, tmp_path, stopped):
  part = written(tmp_path / '1', x='old')
  of(1, start='t0').give(STEP, part)
  of(2, start='t0').give(STEP, part)
  of(1).give(STEP, written(tmp_path / 'new', y='new'))
  with pytest.raises(errors.InputError, match='the part of process 2 of step 8 is gone'):
    of(0).collect(STEP, tmp_path / '0')
  assert stopped == [True]
  parts.clear(bucket.Bucket(URL), URL)
  assert objects.find('b1') == {}


def test_a_part_that_is_not_whole_is_not_taken(objects, tmp_path, stopped):
  of(1, 2).give(STEP, written(tmp_path / '1', x='long'))
  objects.pipe_file('b1/runs/a/.parts/t1/8/1/x', b'lo')
  with pytest.raises(errors.InputError, match='2 bytes of 4 came of x, a file of process 1'):
    of(0, 2).collect(STEP, tmp_path / '0')
  assert stopped == [True]


def test_a_part_that_did_not_arrive_whole_is_not_given(objects, tmp_path, stopped, monkeypatch):
  monkeypatch.setattr(objects, 'put', lambda files, paths: objects.pipe_file(paths[0], b''))
  one = of(1)
  one.check()
  with pytest.raises(errors.InputError, match='x did not arrive whole'):
    one.give(STEP, written(tmp_path / '1', x='long'))
  with pytest.raises(errors.InputError, match='x did not arrive whole'):
    one.check()
  assert stopped == [True] and 'b1/runs/a/.parts/t1/8/1.json' not in objects.find('b1')


def test_a_save_waits_for_the_network(objects, tmp_path, monkeypatch):
  plain, waits = objects.put, []

  def cut(*unused):
    raise ConnectionResetError('cut')

  def sleep(seconds):
    waits.append(seconds)
    if len(waits) == 2:
      monkeypatch.setattr(objects, 'put', plain)

  monkeypatch.setattr(objects, 'put', cut)
  monkeypatch.setattr(parts.time, 'sleep', sleep)
  of(1, 2).give(STEP, written(tmp_path / '1', x='a'))
  assert waits == [parts.EVERY] * 2
  of(0, 2).collect(STEP, tmp_path / '0')
  assert read(tmp_path / '0') == {'x': 'a'}


def test_readers_do_not_look_at_parts(objects, tmp_path):
  objects.pipe_file('b1/runs/a/config.json', b'{}')
  of(1).give(STEP, written(tmp_path / '1', x='a'))
  assert read(fetch.local('gs://b1/runs/a')) == {'config.json': '{}'}
