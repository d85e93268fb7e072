import functools
import os
import re
import subprocess
import sys

import pytest
from absl import flags

from experiments.common import cli, command_list, flag_help


def status_unread(main) -> int:
  """Runs a command whose output is a pipe without a reader; its exit status."""
  read, write = os.pipe()
  os.close(read)
  with open(write, 'w') as pipe, pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, 'stdout', pipe)
    patch.setattr(sys, 'argv', ['command'])
    with pytest.raises(SystemExit) as caught:
      cli.run(main)
  return caught.value.code  # and closing the pipe raised nothing: nothing was left to write


@pytest.mark.parametrize('text', ['short', 'long' * 10_000])
def test_a_command_whose_output_nobody_reads_ends_in_silence(capfd, text):
  assert status_unread(lambda argv: print(text)) == 141  # as the shell shows the end by SIGPIPE
  assert capfd.readouterr().err == ''


def test_the_error_of_a_command_that_nobody_reads_keeps_its_status(capfd):
  def main(argv):
    print('begun')
    raise cli.errors.InputError('config.x=3 must be 2')

  assert status_unread(main) == 2
  assert capfd.readouterr().err == 'error: config.x=3 must be 2\n'


def test_a_full_disk_behind_standard_output_is_one_line(monkeypatch, capfd):
  monkeypatch.setattr(sys, 'argv', ['command'])
  with open('/dev/full', 'w') as full, pytest.raises(SystemExit) as caught:
    monkeypatch.setattr(sys, 'stdout', full)
    cli.run(lambda argv: print('text'))
  assert caught.value.code == 2
  assert capfd.readouterr().err.startswith('error: standard output cannot be written: No space')


def test_help_is_cut_off_in_silence():
  command = [sys.executable, '-m', 'experiments.train', '--help']
  read, write = os.pipe()
  os.close(read)
  done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE)
  os.close(write)
  assert done.stderr == b''


def test_every_flag_of_a_path_is_read_as_one():
  """A new command cannot forget: directories and files of all commands, by name."""
  paths = {'workdir', 'out', 'from', 'from_hf', 'to_hf', 'save', 'prompts_file', 'include_path'}
  seen = set()
  for command in command_list.commands():
    for flag in command.flags():
      named = re.match(r'(scratch )?(directory|file)\b', flag.help) or flag.name in paths
      if named and flag.type in ('TEXT', 'PATH'):
        seen.add(flag.name)
        assert flag.type == 'PATH', (command.name, flag.name, flag.help)
  assert seen >= paths


def test_a_path_flag_expands_a_home_and_refuses_a_bucket(monkeypatch):
  monkeypatch.setenv('HOME', '/homes/me')
  values = flags.FlagValues()
  monkeypatch.setattr(flags, 'FLAGS', values)
  monkeypatch.setattr(flags, 'DEFINE', functools.partial(flags.DEFINE, flag_values=values))
  cli.workdir_flag('directory')
  cli.path_flag('out', '', 'file')
  assert cli.parse_flags(['train', '--workdir=~/a'])
  assert (values.workdir, values.out) == ('/homes/me/a', '')
  for wrong in ('gs://bucket/a', '~nosuchuser/a'):
    with pytest.raises(cli.errors.InputError, match='--workdir=.*(gs://|nosuchuser)'):
      cli.parse_flags(['train', f'--workdir={wrong}'])


def test_a_flag_of_another_action_is_refused(monkeypatch, capsys):
  def define_flags():
    flags.DEFINE_float('delta', 2.0, 'encode: what tokens lose')
    flags.DEFINE_integer('draws', 0, 'decides draws, of all actions')

  def status(*argv: str) -> int:
    before = set(flags.FLAGS)
    monkeypatch.setattr(sys, 'argv', ['command', *argv])
    try:
      with pytest.raises(SystemExit) as caught:
        cli.run_action(lambda argv, action: print(action), define_flags, ('key', 'encode'))
    finally:
      flags.FLAGS.remove_flag_values(set(flags.FLAGS) - before)
    return caught.value.code or 0

  assert status('key', '--delta=3') == 2
  said = "error: --delta=3.0 has no effect on 'key', it is for encode; leave it out\n"
  assert capsys.readouterr() == ('', said)
  assert status('encode', '--delta=3') == 0 and status('key', '--draws=3') == 0
  assert capsys.readouterr() == ('encode\nkey\n', '')


def test_the_actions_that_read_a_flag_by_its_help():
  for words, found in {
    'data, study: share of examples': ['data', 'study'],
    'decode: a text; attack paste: the text around': ['decode', 'attack'],
    'reset: global, or layer: the same share': ['reset'],
    'a page, by name: data': [],
    'the tuned run (reset)': [],
  }.items():
    assert flag_help.actions(words, ('data', 'reset', 'study', 'decode', 'attack')) == found


def test_a_flagfile_that_cannot_be_read(monkeypatch, tmp_path):
  values = flags.FlagValues()
  monkeypatch.setattr(flags, 'FLAGS', values)
  flags.DEFINE_flag(cli.PageFlag(repeated=False), values)
  flags.DEFINE_string('flagfile', '', 'as absl has it', values)
  (tmp_path / 'latin').write_bytes(b'--seed=\xe9')
  for name, problem in (('nope', "Unable to open flagfile.*'nope'"), ('latin', 'UTF-8 text')):
    with pytest.raises(cli.errors.InputError, match=problem):
      cli.parse_flags(['train', f'--flagfile={tmp_path / name if name == "latin" else name}'])
