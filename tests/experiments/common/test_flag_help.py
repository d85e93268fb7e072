"""What --help shows, and how soon: no command may import JAX before its flags are checked."""

import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest

from experiments.common import command_list, flag_help

ROOT = pathlib.Path(__file__).parents[3]
NAMES = [command.name for command in command_list.commands()]
MAX_CPU_SECONDS = (
  1.0  # 0.2 measured; of the processor, since a busy machine makes the clock useless
)


def run(*arguments: str, cwd: pathlib.Path = ROOT) -> tuple[int, str, str, float]:
  """(status, output, errors, seconds of the processor) of a Python process."""
  env = os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
  child = subprocess.Popen(
    [sys.executable, *arguments],
    cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
  )  # fmt: skip
  out, err = child.stdout.read(), child.stderr.read()
  _, status, usage = os.wait4(child.pid, 0)
  child.returncode = os.waitstatus_to_exitcode(status)
  child.stdout.close()
  child.stderr.close()
  return child.returncode, out, err, usage.ru_utime + usage.ru_stime


def test_the_list_holds_every_command():
  assert {'train', 'generate', 'bench', 'bench.gpu', 'parity', 'scaling_laws'} <= set(NAMES)
  assert len(NAMES) >= 20


@pytest.mark.parametrize('command', command_list.commands(), ids=lambda command: command.name)
def test_every_command_has_a_purpose_an_example_and_flags_with_help(command):
  assert command.purpose and f'python -m experiments.{command.name} ' in command.doc + ' '
  own = command.flags()
  assert own and all(flag.help for flag in own)
  assert not any(flag.name in ('help', 'shard', 'verbosity') for flag in own)
  assert [flag.name for flag in own] == [flag.name for flag in command.flags()], 'forgotten again'


def test_flags_in_words():
  flags = {f.name: f for c in command_list.commands() if c.name == 'generate' for f in c.flags()}
  assert flags['max_new_tokens'].usage == '--max_new_tokens=INTEGER'
  assert flags['max_new_tokens'].default == '64'
  assert flags['json'].usage == '--[no]json' and flags['json'].default == 'false'
  assert flags['stop'].repeated and not flags['seed'].repeated


@pytest.mark.parametrize('name', NAMES)
def test_help_is_quick_and_shows_the_commands_own_flags(name):
  status, out, err, seconds = run('-X', 'importtime', '-m', f'experiments.{name}', '--help')
  assert status == 0
  doc = next(command.doc for command in command_list.commands() if command.name == name)
  assert out.startswith(doc) and '\nFlags:\n  --' in out and 'absl' not in out
  slow = re.findall(r'\| +(jax|torch|tensorflow|matplotlib|numpy)$', err, re.MULTILINE)
  assert not slow and seconds < MAX_CPU_SECONDS, (slow, seconds)


def test_a_mistyped_flag_is_answered_as_quickly():
  status, out, err, seconds = run('-m', 'experiments.train', '--workdri=x', '--config=smoke')
  assert (status, out) == (2, '') and err.count('\n') == 1
  assert "--workdri is no flag of this command; did you mean '--workdir'?" in err
  assert seconds < MAX_CPU_SECONDS


def test_the_package_lists_commands_and_studies(tmp_path):
  status, out, _, _ = run('-m', 'experiments', cwd=tmp_path)
  assert status == 0 and all(f'  experiments.{name} ' in out for name in NAMES)
  status, _, err, _ = run('-m', 'experiments', 'train')
  assert status == 2 and 'python -m experiments.NAME' in err


def test_showing_help_leaves_the_callers_signals_as_they_were(capsys):
  before = signal.getsignal(signal.SIGPIPE)
  assert before != signal.SIG_DFL  # Python's own choice: a broken pipe is an error, no end
  flag_help.show('page')
  assert capsys.readouterr().out == 'page\n' and signal.getsignal(signal.SIGPIPE) == before
