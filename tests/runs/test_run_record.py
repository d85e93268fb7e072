import dataclasses
import json
import pathlib
import re
import subprocess
import tempfile

import pytest

import moe_jax
from moe_jax import errors
from moe_jax.config import parse, schema
from moe_jax.runs import run_record


def _value(kind, name):
  if dataclasses.is_dataclass(kind):
    return kind(**{f.name: _value(f.type, f.name) for f in dataclasses.fields(kind)})
  if name == 'batch_ramp':
    return ((0, 8), (5, 16))
  empty = {int: 1, float: 0.5, str: 'x', bool: False}
  return empty.get(kind, {} if name == 'mixture' else ())


CONFIG = _value(schema.Config, '')  # every field filled by type; the rules do not matter here
CHANGED = dataclasses.replace(
  CONFIG,
  optim=dataclasses.replace(CONFIG.optim, peak_lr=2e-3),
  train=dataclasses.replace(CONFIG.train, batch_ramp=()),
)


NOTHING = ([], [])


def write(workdir, cfg=CONFIG, argv=('train.py', '--x')):
  return run_record.write(workdir, cfg, argv=argv, data_fingerprint={'sha256': 'ab'})


def names(workdir):
  return sorted(p.name for p in workdir.iterdir())


def test_record_holds_config_versions_and_origin(tmp_path):
  record = json.loads(write(tmp_path).read_text())
  assert record['config']['optim']['peak_lr'] == 0.5
  assert record['data_fingerprint'] == {'sha256': 'ab'}
  assert record['argv'] == ['train.py', '--x']
  assert set(record['versions']) == {'python', 'moe_jax', *run_record.PACKAGES}
  assert record['versions']['jax'].startswith('0.')
  assert record['git'] is None or re.fullmatch('[0-9a-f]{40}', record['git']['commit'])
  assert names(tmp_path) == ['config.json']


def test_the_same_run_may_go_on(tmp_path):
  workdir = tmp_path / 'deep/run'
  assert run_record.check_workdir(workdir, CONFIG, allow_change=False) == NOTHING
  write(workdir)
  assert run_record.check_workdir(workdir, CONFIG, allow_change=False) == NOTHING
  write(workdir)
  assert names(workdir) == ['config.json'], 'an equal record is not written again'


def test_another_config_is_refused_by_key(tmp_path):
  write(tmp_path)
  before = (tmp_path / 'config.json').read_bytes()
  with pytest.raises(errors.InputError) as e:
    run_record.check_workdir(tmp_path, CHANGED, allow_change=False)
  message = str(e.value)
  assert 'optim.peak_lr: 0.5 -> 0.002' in message and 'train.batch_ramp' in message
  assert '--allow_config_change' in message and '--workdir' in message
  assert (tmp_path / 'config.json').read_bytes() == before


def test_a_finished_run_may_get_more_steps(tmp_path):
  write(tmp_path)
  longer = dataclasses.replace(
    CONFIG, train=dataclasses.replace(CONFIG.train, num_steps=CONFIG.train.num_steps + 5)
  )
  with pytest.raises(errors.InputError, match='train.num_steps'):  # it has not reached its end
    run_record.check_workdir(tmp_path, longer, allow_change=False)
  (tmp_path / 'checkpoints' / str(CONFIG.train.num_steps)).mkdir(parents=True)
  (change,) = run_record.check_workdir(tmp_path, longer, allow_change=False).changes
  assert 'learning rate' in change
  with pytest.raises(errors.InputError, match='train.num_steps'):  # a study has its results
    run_record.check_workdir(tmp_path, longer, allow_change=False, allow_longer=False)
  write(tmp_path, longer)
  with pytest.raises(errors.InputError, match='train.num_steps'):  # fewer
    run_record.check_workdir(tmp_path, CONFIG, allow_change=False)
  for other in (dataclasses.replace(longer, init_from='elsewhere'), CHANGED):
    with pytest.raises(errors.InputError):
      run_record.check_workdir(tmp_path, other, allow_change=False)


def test_another_mesh_is_the_same_run(tmp_path):
  write(tmp_path)
  moe = dataclasses.replace(CONFIG.model.moe, grouped_matmul='ragged_dot')
  moved = dataclasses.replace(
    CONFIG,
    mesh=dataclasses.replace(CONFIG.mesh, data=7, expert=3),
    model=dataclasses.replace(CONFIG.model, moe=moe),
    train=dataclasses.replace(CONFIG.train, loss_chunk=64),
  )
  changes, placement = run_record.check_workdir(tmp_path, moved, allow_change=False)
  assert changes == []
  assert [line.partition(':')[0] for line in placement] == [
    *('mesh.data', 'mesh.expert', 'model.moe.grouped_matmul', 'train.loss_chunk')
  ]


def test_placement_names_exist():
  values = parse.to_dict(CONFIG)
  for name in run_record.PLACEMENT:
    found = values
    for key in name.split('.'):
      found = found[key]


def test_an_allowed_change_keeps_the_older_records(tmp_path):
  write(tmp_path)
  changes, _ = run_record.check_workdir(tmp_path, CHANGED, allow_change=True)
  assert [line.split(':')[0] for line in changes] == ['optim.peak_lr', 'train.batch_ramp']
  write(tmp_path, CHANGED)
  write(tmp_path, CHANGED, argv=['other'])
  assert names(tmp_path) == ['config.1.json', 'config.2.json', 'config.json']
  kept = [json.loads((tmp_path / name).read_text()) for name in names(tmp_path)]
  assert [r['config']['optim']['peak_lr'] for r in kept] == [0.5, 0.002, 0.002]
  assert [r['argv'] for r in kept] == [['train.py', '--x'], ['train.py', '--x'], ['other']]


@pytest.mark.parametrize('text', ['{"config": ', '[]', '{}', '{"config": 3}'])
def test_a_broken_record_is_refused_or_kept(tmp_path, text):
  (tmp_path / 'config.json').write_text(text)
  with pytest.raises(errors.InputError, match='not the record of a run.*--workdir'):
    run_record.check_workdir(tmp_path, CONFIG, allow_change=False)
  assert run_record.check_workdir(tmp_path, CONFIG, allow_change=True).changes
  write(tmp_path)
  assert (tmp_path / 'config.1.json').read_text() == text


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path):
  (tmp_path / 'file').write_text('')
  for workdir in (tmp_path / 'file', tmp_path / 'file/run', pathlib.Path('/proc/moe_jax_run')):
    with pytest.raises(errors.InputError, match=f'--workdir={workdir} must be a directory'):
      run_record.check_workdir(workdir, CONFIG, allow_change=False)
  with pytest.raises(errors.InputError, match='must be a directory'):
    run_record.check_workdir('/proc/self', CONFIG, allow_change=False)
  assert run_record.check_workdir(tmp_path / 'run', CONFIG, allow_change=False) == NOTHING
  assert names(tmp_path) == ['file'], 'the probe leaves nothing behind'


def test_checkpoints_that_cannot_be_written_are_refused_before_the_first_save(
  tmp_path, monkeypatch
):
  (tmp_path / 'checkpoints').mkdir()
  plain = tempfile.TemporaryFile

  def of_another_user(dir):
    if pathlib.Path(dir).name == 'checkpoints':
      raise PermissionError(13, 'Permission denied')
    return plain(dir=dir)

  monkeypatch.setattr(tempfile, 'TemporaryFile', of_another_user)
  with pytest.raises(errors.InputError, match='checkpoints must be a directory'):
    run_record.check_workdir(tmp_path, CONFIG, allow_change=False)


def test_the_repository_of_this_package_is_found():
  root = pathlib.Path(__file__).parents[2]
  assert (run_record.git_state() is not None) == (root / '.git').exists()


def test_git_state_of_a_repository(tmp_path, monkeypatch):
  package = tmp_path / 'moe_jax'
  package.mkdir()
  (package / '__init__.py').write_text('')
  monkeypatch.setattr(moe_jax, '__file__', str(package / '__init__.py'))
  assert run_record.git_state() is None

  def git(*args):
    identity = ['-c', 'user.name=a', '-c', 'user.email=a@b']
    subprocess.run(['git', '-C', tmp_path, *identity, *args], check=True, capture_output=True)

  git('init')
  assert run_record.git_state() is None, 'no commit yet'
  git('add', '.')
  git('commit', '-m', 'first')
  clean = run_record.git_state()
  assert len(clean['commit']) == 40 and not clean['dirty']
  (package / '__init__.py').write_text('changed')
  assert run_record.git_state()['dirty']
  inner = tmp_path / 'venv/moe_jax'
  inner.mkdir(parents=True)
  monkeypatch.setattr(moe_jax, '__file__', str(inner / '__init__.py'))
  assert run_record.git_state() is None, "another repository's commit"
