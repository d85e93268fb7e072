import os
import shutil
import time

import pytest

from configs import smoke
from moe_jax import errors
from moe_jax.config import parse
from moe_jax.runs import metric_log, train_run
from moe_jax.storage import bucket, fetch, lease, upload, urls, workdir

URL = 'gs://b1/runs/a'
LAST = fetch.LAST


def write(place, *names, text='x'):
  for name in names:
    (place / name).parent.mkdir(parents=True, exist_ok=True)
    (place / name).write_text(text)


def opened(said=None):
  return workdir.opened(URL, '--workdir', (said or []).append)


def names(objects):
  return {path.removeprefix('b1/runs/a/') for path in objects.find('b1')} - {fetch.SESSION}


@pytest.fixture(name='mirror')
def _mirror(objects, tmp_path):
  (tmp_path / 'home').mkdir()
  url = urls.parse(URL)
  made = workdir.Mirror(bucket.Bucket(url), url, 'W', tmp_path / 'home', lambda: None)
  made.bring()
  return made


def test_a_workdir_here_is_itself(tmp_path):
  with workdir.opened(tmp_path, '--workdir', print) as place:
    assert place == tmp_path


def test_a_copy_holds_what_can_be_read_and_leaves_nothing(objects, tmp_path):
  with opened() as place:
    write(place, 'config.json', 'checkpoints/4/x', f'checkpoints/4/{LAST}')
  objects.pipe_file('b1/runs/a/checkpoints/8/x', b'x')
  objects.pipe_file('b1/runs/a/.parts/t/8/1/x', b'x')
  url, before = urls.parse(URL), objects.find('b1')
  with workdir.copied(url, '--workdir', 1) as one, workdir.copied(url, '--workdir', 2) as two:
    for place in (one, two):
      found = {p.relative_to(place).as_posix() for p in place.rglob('*') if p.is_file()}
      assert found == {'config.json', 'checkpoints/4/x', f'checkpoints/4/{LAST}'}
    write(two, 'own')
    with pytest.raises(errors.InputError, match='being written by another process'):
      with workdir.copied(url, '--workdir', 2):
        pass
  assert not one.exists() and not two.exists() and objects.find('b1') == before


def test_what_is_uploaded_is_brought_back_on_an_empty_disk(objects, tmp_path):
  said = []
  with workdir.opened(URL, '--workdir', said.append) as place:
    assert place.name == 'a' and not list(place.iterdir())
    write(place, 'config.json', 'routing/4.npz', 'checkpoints/4/d/x', f'checkpoints/4/{LAST}')
    write(place, '.lock', '.x.1.tmp', 'checkpoints/8.orbax-checkpoint-tmp-1/d/x')
  want = {'config.json', 'routing/4.npz', 'checkpoints/4/d/x', f'checkpoints/4/{LAST}'}
  assert names(objects) == want
  assert len(said) == 1 and said[0].startswith(f'{URL} is worked on in ')
  shutil.rmtree(tmp_path / 'cache')
  with opened() as place:
    found = {p.relative_to(place).as_posix() for p in place.rglob('*') if p.is_file()}
    assert found == want
    (place / 'routing/4.npz').unlink()
    write(place, 'config.json', text='new')
  assert names(objects) == want - {'routing/4.npz'}
  assert objects.cat_file('b1/runs/a/config.json') == b'new'


def test_nothing_is_written_by_a_run_that_wrote_nothing(objects):
  with pytest.raises(errors.InputError, match='bad'):
    with opened():
      raise errors.InputError('bad')
  assert objects.find('b1') == {}


def test_only_what_has_changed_is_uploaded(mirror, objects, monkeypatch):
  write(mirror.place, 'a', 'b')
  mirror.push()
  sent, plain = [], objects.put
  monkeypatch.setattr(
    objects, 'put', lambda files, paths: (sent.extend(paths), plain(files, paths))
  )
  write(mirror.place, 'b', text='longer')
  mirror.push()
  mirror.push()
  assert sent == ['b1/runs/a/b']


def test_a_step_counts_from_its_last_object_on(mirror, objects, monkeypatch):
  order, put, rm = [], objects.put, objects.rm_file

  def recorded_put(files, paths):
    order.extend(sorted(paths))
    put(files, paths)

  def recorded_rm(path):
    order.append(f'-{path}')
    rm(path)

  monkeypatch.setattr(objects, 'put', recorded_put)
  monkeypatch.setattr(objects, 'rm_file', recorded_rm)
  write(mirror.place, f'checkpoints/4/{LAST}', 'checkpoints/4/A', 'checkpoints/4/z', 'config.json')
  mirror.push()
  step = 'b1/runs/a/checkpoints/4'
  assert order == ['b1/runs/a/config.json', f'{step}/A', f'{step}/z', f'{step}/{LAST}']
  order.clear()
  write(mirror.place, 'checkpoints/4/A', text='another run of this step')
  mirror.push()
  assert order == [f'-{step}/{LAST}', f'{step}/A', f'{step}/{LAST}']
  order.clear()
  shutil.rmtree(mirror.place / 'checkpoints/4')
  mirror.push()
  assert order == [f'-{step}/{LAST}', f'-{step}/A', f'-{step}/z']


def test_a_step_that_did_not_arrive_whole_does_not_count(mirror, objects, monkeypatch):
  plain = objects.put

  def short(files, paths):
    plain(files, paths)
    objects.pipe_file('b1/runs/a/checkpoints/4/x', b'')

  monkeypatch.setattr(objects, 'put', short)
  write(mirror.place, f'checkpoints/4/{LAST}', 'checkpoints/4/x')
  with pytest.raises(errors.InputError, match='4/x did not arrive whole'):
    mirror.push()
  assert names(objects) == {'checkpoints/4/x'}


def test_a_step_that_is_deleted_while_it_is_compared_ends_no_upload(mirror, objects, monkeypatch):
  write(mirror.place, 'checkpoints/4/x', f'checkpoints/4/{LAST}', 'metrics.jsonl')
  compare = upload.check

  def deleted(*arguments):
    shutil.rmtree(mirror.place / 'checkpoints/4')
    compare(*arguments)

  monkeypatch.setattr(upload, 'check', deleted)
  mirror.push()
  assert f'checkpoints/4/{LAST}' not in names(objects)
  monkeypatch.undo()
  mirror.push()
  assert names(objects) == {'metrics.jsonl'}


def test_a_step_that_is_renamed_while_the_folder_is_read_is_found_later(tmp_path, monkeypatch):
  """A save ends with the rename of its folder, which may lie between two looks into it."""
  write(tmp_path, 'checkpoints/4.orbax-checkpoint-tmp/state/x', 'metrics.jsonl')
  plain = os.scandir

  def renamed(path):
    if str(path).endswith('4.orbax-checkpoint-tmp'):
      (tmp_path / 'checkpoints/4.orbax-checkpoint-tmp').rename(tmp_path / 'checkpoints/4')
    return plain(path)

  monkeypatch.setattr(os, 'scandir', renamed)
  assert list(workdir.scan(tmp_path)) == ['metrics.jsonl']
  assert list(workdir.scan(tmp_path)) == ['checkpoints/4/state/x', 'metrics.jsonl']


def test_a_folder_that_cannot_be_read_is_no_empty_one(tmp_path, monkeypatch):
  write(tmp_path, 'checkpoints/4/x')

  def refused(path):
    raise PermissionError(path)

  monkeypatch.setattr(os, 'scandir', refused)
  with pytest.raises(PermissionError):
    workdir.scan(tmp_path)


@pytest.mark.parametrize('error', [errors.InputError('cut'), OSError('disk'), KeyError('x')])
def test_the_thread_outlives_whatever_an_upload_raises(mirror, objects, monkeypatch, error):
  plain, failed = mirror.push, []

  def fails_once():
    if not failed:
      failed.append(error)
      raise error
    plain()

  monkeypatch.setattr(workdir, 'EVERY', 0.001)
  monkeypatch.setattr(mirror, 'push', fails_once)
  write(mirror.place, 'metrics.jsonl')
  mirror.start(lambda line: None)
  deadline = time.monotonic() + 20
  while names(objects) != {'metrics.jsonl'} and time.monotonic() < deadline:
    time.sleep(0.001)
  assert failed and names(objects) == {'metrics.jsonl'}
  mirror.finish()


def test_a_cut_network_loses_nothing_of_a_folder_that_is_still_the_newest(objects, monkeypatch):
  plain = objects.put

  def cut(*unused):
    raise ConnectionResetError('cut')

  with opened() as place:
    write(place, 'config.json', 'checkpoints/4/x', f'checkpoints/4/{LAST}')
  monkeypatch.setattr(objects, 'put', cut)
  with pytest.raises(errors.InputError, match='cut.*what is not in the bucket lies in .*goes on'):
    with opened() as place:
      write(place, 'checkpoints/8/x', f'checkpoints/8/{LAST}')
  monkeypatch.setattr(objects, 'put', plain)
  objects.downloads.clear()
  with opened() as place:
    assert (place / 'checkpoints/8/x').exists()
  assert f'checkpoints/8/{LAST}' in names(objects) and objects.downloads == []


@pytest.mark.parametrize('gone', [False, True])
def test_a_folder_that_others_went_on_from_is_brought_anew(objects, tmp_path, monkeypatch, gone):
  with opened() as place:
    write(place, 'config.json', 'checkpoints/4/x', f'checkpoints/4/{LAST}')
  write(place, 'unsent')
  if gone:  # somebody deleted the run, to start again
    for path in list(objects.find('b1')):
      objects.rm_file(path)
  else:
    monkeypatch.setenv('MOE_JAX_CACHE', str(tmp_path / 'elsewhere'))
    with opened() as other:
      write(other, 'config.json', text='of another machine')
    monkeypatch.setenv('MOE_JAX_CACHE', str(tmp_path / 'cache'))
  with opened() as place:
    assert not (place / 'unsent').exists()
    assert (place / 'config.json').exists() != gone


def test_an_unfinished_step_in_the_bucket_is_neither_brought_nor_kept(objects):
  objects.pipe_file('b1/runs/a/checkpoints/4/x', b'x')
  with opened() as place:
    assert not (place / 'checkpoints').exists()
    write(place, 'config.json')
  assert names(objects) == {'config.json'}


@pytest.mark.parametrize(
  'strange',
  [
    '.gitignore',
    'notes/.x',
    'checkpoints/best/d/x',
    f'checkpoints/best/{LAST}',
    'b/checkpoints/4/x',
  ],
)
def test_what_no_run_uploads_is_never_deleted(objects, strange):
  objects.pipe_file(f'b1/runs/a/{strange}', b'x')
  for _ in range(2):  # from an empty disk, and from the folder that was kept
    with opened() as place:
      write(place, 'config.json')
  assert names(objects) == {strange, 'config.json'}


@pytest.mark.parametrize('guard', ['.lease/1', '.session'])
def test_a_run_in_a_folder_below_is_let_alone(objects, guard):
  below = {f'tuned/{guard}', 'tuned/checkpoints/8/d/x', 'tuned/config.json'}
  for name in below:
    objects.pipe_file(f'b1/runs/a/{name}', b'theirs')
  for _ in range(2):
    with opened() as place:
      assert not (place / 'tuned').exists()
      write(place, 'config.json')
    assert names(objects) == below | {'config.json'}
  with workdir.copied(urls.parse(URL), '--workdir', 1) as place:
    assert {p.name for p in place.iterdir()} == {'config.json'}


def test_a_run_begun_in_a_folder_that_was_brought_is_not_overwritten(objects):
  """An upcycled start lies below, and later somebody trains it there."""
  objects.pipe_file('b1/runs/a/tuned/config.json', b'old')
  with opened() as place:
    assert (place / 'tuned/config.json').exists()
    write(place, 'config.json')
  with workdir.opened(f'{URL}/tuned', '--workdir', print) as place:
    write(place, 'config.json', text='of the run below')
  with opened() as place:
    write(place, 'config.json', text='new')
  assert objects.cat_file('b1/runs/a/tuned/config.json') == b'of the run below'


def test_runs_one_below_the_other_go_on_at_once(objects):
  with workdir.opened(f'{URL}/tuned', '--workdir', print) as inner:
    with opened() as outer:
      write(outer, 'config.json')
    write(inner, 'checkpoints/8/x', f'checkpoints/8/{LAST}')
  assert f'tuned/checkpoints/8/{LAST}' in names(objects)


def test_a_folder_named_checkpoints_is_the_run_s_own_whatever_lies_there(objects):
  with opened() as place:
    write(place, 'checkpoints/4/x', f'checkpoints/4/{LAST}')
  objects.pipe_file('b1/runs/a/checkpoints/.session', b'of a mistaken --workdir')
  shutil.rmtree(workdir._home(urls.parse(URL)))
  with opened() as place:
    assert (place / 'checkpoints/4/x').exists()


def test_what_others_put_beside_a_run_between_two_starts_stays(objects):
  with opened() as place:
    write(place, 'config.json', 'checkpoints/4/x', f'checkpoints/4/{LAST}')
  objects.pipe_file('b1/runs/a/notes.txt', b'x')
  with opened() as place:  # the folder here is kept, so the notes are not in it
    shutil.rmtree(place / 'checkpoints')
  assert names(objects) == {'config.json', 'notes.txt'}


def test_a_run_that_lost_its_lease_uploads_nothing_more(objects):
  with pytest.raises(lease.LostError):
    with opened() as place:
      objects.pipe_file('b1/runs/a/.lease/2', b'')
      write(place, 'config.json')
  assert names(objects) == {'.lease/2'}


class _CutError(Exception):
  pass


@pytest.mark.slow
def test_a_run_goes_on_from_a_server_bit_by_bit(server, tmp_path, monkeypatch):
  address, _ = server
  values = {'train.num_steps': 4, 'train.log_every': 1, 'checkpoint.save_every': 2}
  cfg = make_config(tmp_path / 'text', values)
  train_run.run_training(cfg, tmp_path / 'here', say=lambda line: None)

  def cut(line):
    if line.startswith('step=3 '):
      raise _CutError

  with pytest.raises(_CutError):
    with workdir.opened(f'{address}/run', '--workdir', print) as place:
      train_run.run_training(cfg, place, say=cut)
  monkeypatch.setenv('MOE_JAX_CACHE', str(tmp_path / 'empty'))
  said = []
  with workdir.opened(f'{address}/run', '--workdir', print) as place:
    train_run.run_training(cfg, place, say=said.append)
  assert 'resuming after step 2 of 4' in said
  copy = fetch.local(f'{address}/run')
  losses = [
    [point['loss'] for point in metric_log.read_metrics(one)] for one in (copy, tmp_path / 'here')
  ]
  assert losses[0] == losses[1] and len(losses[0]) == 4
  records = [
    trained.read_record(4)['leaves']
    for trained in (train_run.trained_run.reader(one) for one in (copy, tmp_path / 'here'))
  ]
  assert records[0] == records[1]


def make_config(cache, values):
  page = smoke.get_config()
  page.update_from_flattened_dict(
    {
      'data.cache_dir': str(cache),
      'data.synthetic_documents': 60,
      'optim.warmup_steps': 0,
      'train.batch_size': 8,
      'train.eval_every': 0,
      **values,
    }
  )
  return parse.from_dict(page.to_dict())
