"""A relative path means what it meant in the directory where the run was started."""

import dataclasses
import json
import pathlib
import types

import pytest

import moe_jax
from experiments.common import train_command
from moe_jax import errors
from moe_jax.config import schema
from moe_jax.data import corpus
from moe_jax.post_training import stages
from moe_jax.runs import run_record, train_run, trained_run, working_directory
from tests import in_process, tiny


@pytest.fixture(name='home')
def _home(tmp_path, monkeypatch):
  """`tmp_path` with a run in it that was started in a/, where its text is; work goes on in b/."""
  for name in ('a', 'b', 'run'):
    (tmp_path / name).mkdir()
  for name in ('x.txt', 'y,z.txt', 't.json'):
    (tmp_path / 'a' / name).write_text('text')
  monkeypatch.chdir(tmp_path / 'a')
  return tmp_path


def make(path, source='text', **changes):
  data = dataclasses.replace(tiny.make().data, source=source, path=path, **changes)
  return dataclasses.replace(tiny.make(), data=data)


def start(home, cfg):
  run_record.write(home / 'run', cfg, argv=(), data_fingerprint='f')


def test_the_first_start_is_recorded_and_stays_so(home, monkeypatch):
  start(home, make('x.txt'))
  monkeypatch.chdir(home / 'b')
  start(home, dataclasses.replace(make('x.txt'), init_from=''))
  assert json.loads((home / 'run/config.json').read_text())['directory'] == str(home / 'a')
  assert run_record.check_workdir(home / 'run', make('x.txt'), allow_change=False) == ([], [])
  start(home, make('other.txt'))  # of another path, as seen from here
  assert json.loads((home / 'run/config.json').read_text())['directory'] == str(home / 'b')


def test_from_elsewhere_the_same_files_are_read(home, monkeypatch):
  cfg = make(f'x.txt, *.txt,{home}/a/x.txt', tokenizer='t.json')
  start(home, cfg)
  assert working_directory.resolved(cfg, home / 'run') == cfg
  monkeypatch.chdir(home / 'b')
  found = working_directory.resolved(cfg, home / 'run').data
  assert found.path == f'{home}/a/x.txt,{home}/a/*.txt,{home}/a/x.txt'
  assert found.tokenizer == str(home / 'a/t.json')
  other = working_directory.resolved(make('y.txt', tokenizer='t.json'), home / 'run').data
  assert (other.path, other.tokenizer) == ('y.txt', str(home / 'a/t.json')), 'not in the record'


@pytest.mark.parametrize('source, path', [('arithmetic', '?max_value=9'), ('hf', 'some/name')])
def test_what_is_no_path_stays_from_elsewhere(home, monkeypatch, source, path):
  cfg = make(path, source)
  start(home, cfg)
  monkeypatch.chdir(home / 'b')
  assert working_directory.resolved(cfg, home / 'run').data.path == path


def test_a_name_with_a_comma_is_one_file(home, monkeypatch):
  start(home, make('y,z.txt'))
  monkeypatch.chdir(home / 'b')
  assert working_directory.resolved(make('y,z.txt'), home / 'run').data.path == f'{home}/a/y,z.txt'


def test_mixtures_and_what_is_no_path(home, monkeypatch):
  member = schema.MixtureComponent
  mixture = {'a': member('text', 'x.txt', 1.0), 'b': member('hf', 'x.txt', 1.0)}
  cfg = make('', 'mixture', mixture=mixture)
  start(home, cfg)
  monkeypatch.chdir(home / 'b')
  found = working_directory.resolved(cfg, home / 'run').data
  assert found.mixture['a'].path == str(home / 'a/x.txt') and found.mixture['b'].path == 'x.txt'
  assert (found.path, found.tokenizer) == ('', cfg.data.tokenizer)


def test_what_was_moved_is_found_here_and_what_is_nowhere_is_refused_with_both_places(
  home, monkeypatch
):
  cfg = make('x.txt')
  start(home, cfg)
  monkeypatch.chdir(home / 'b')
  (home / 'a/x.txt').rename(home / 'b/x.txt')
  assert working_directory.resolved(cfg, home / 'run').data.path == str(home / 'b/x.txt')
  (home / 'b/x.txt').unlink()
  with pytest.raises(
    errors.InputError, match=r"data\.path='x\.txt' is neither .*/a/x\.txt.*/b/x\."
  ):
    working_directory.resolved(cfg, home / 'run')


def test_another_spelling_of_the_same_place_is_no_change(home, monkeypatch):
  cfg = make('x.txt')
  start(home, cfg)
  monkeypatch.chdir(home / 'b')
  for text in (str(home / 'a/x.txt'), '../a/x.txt', '../a/../a/x.txt'):
    assert working_directory.as_recorded(make(text), home / 'run') == cfg
  for other in (make('../a/t.json'), make('')):
    assert working_directory.as_recorded(other, home / 'run') == other


def test_training_and_reading_look_there(home, monkeypatch):
  seen = []

  def stop(data, *unused, **kwargs):
    seen.append(data.path)
    raise errors.InputError('seen')

  monkeypatch.setattr(corpus, 'load_corpus', stop)
  cfg = make('x.txt')
  start(home, cfg)
  monkeypatch.chdir(home / 'b')
  run = types.SimpleNamespace(cfg=cfg)
  for call in (
    lambda: train_run.run_training(make('../a/x.txt'), home / 'run'),
    lambda: trained_run.heldout_corpus(run, home / 'run', print),
  ):
    with pytest.raises(errors.InputError, match='seen'):
      call()
  assert seen == [str(home / 'a/x.txt')] * 2


@pytest.mark.parametrize(
  'text', [None, '[]', '{"directory": 3}', '{"directory": "/", "config": 1}']
)
def test_without_a_record_paths_are_as_seen_from_here(home, text):
  if text is not None:
    (home / 'run/config.json').write_text(text)
  cfg = make('nowhere.txt')
  assert working_directory.resolved(cfg, home / 'run') == cfg
  assert working_directory.as_recorded(cfg, home / 'run') == cfg


SINGLE = {
  'init_from': 'start',
  'objective__policy__reward_model': 'judge',
  'objective__process_reward__labels': 'labels,1.jsonl',
  'model__moe__options__replay_path': 'recorded.npz',
}


def test_paths_beside_the_data_lead_where_they_led_and_need_not_be_there(home, monkeypatch):
  cfg = tiny.make(**SINGLE)
  start(home, cfg)
  for name in ('start', 'judge'):
    (home / 'a' / name).mkdir()
  (home / 'b' / 'labels,1.jsonl').touch()  # moved; the recording is nowhere
  monkeypatch.chdir(home / 'b')
  for asked in (cfg, tiny.make(**SINGLE | {'init_from': '../a/start'})):
    found = working_directory.reading(asked, home / 'run')
    assert found.init_from == str(home / 'a/start')
    assert found.objective.policy.reward_model == str(home / 'a/judge')
    assert found.objective.process_reward.labels == str(home / 'b/labels,1.jsonl')
    assert found.model.moe.options.replay_path == str(home / 'a/recorded.npz')
  assert working_directory.as_recorded(tiny.make(**SINGLE), home / 'run') == cfg


def test_a_record_from_before_those_sections(home, monkeypatch):
  cfg = make('x.txt')
  start(home, cfg)
  record = json.loads((home / 'run/config.json').read_text())
  del record['config']['objective'], record['config']['model']
  (home / 'run/config.json').write_text(json.dumps(record))
  monkeypatch.chdir(home / 'b')
  assert working_directory.resolved(cfg, home / 'run').data.path == str(home / 'a/x.txt')


def test_the_stage_of_a_run_reads_there(home, monkeypatch):
  asked = []
  monkeypatch.setattr(stages, 'of', lambda cfg: asked.append(cfg.objective.policy.reward_model))
  monkeypatch.setattr(train_run, 'run_training', lambda *unused, **settings: 1 / 0)
  cfg = tiny.make(objective__policy__reward_model='judge')
  start(home, cfg)
  monkeypatch.chdir(home / 'b')
  for call in (
    lambda: moe_jax.train(cfg, home / 'run'),
    lambda: in_process.run(command_of(cfg), f'--workdir={home}/run'),
  ):
    with pytest.raises(ZeroDivisionError):
      call()
  assert asked == [str(home / 'a/judge')] * 2


def command_of(cfg):
  return types.SimpleNamespace(
    __name__='train',
    define_flags=train_command.define_flags,
    main=lambda argv: train_command.train(cfg, 'experiments.train'),
  )


def test_an_address_in_a_bucket_is_no_relative_path():
  began = pathlib.Path('/began')
  assert working_directory._place('data.path', 'gs://b1/a,s3://b1/*', began) == (
    'gs://b1/a,s3://b1/*'
  )
  assert working_directory._written_out('gs://b1/a,x', began) == ['gs://b1/a', '/began/x']
