import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import types

import pytest

from moe_jax import errors
from moe_jax.rewards import isolation, programs, sandbox
from tests.rewards import hostile

LIMITS = isolation.Limits(cpu_seconds=1, wall_seconds=5.0)
TESTS = [[[x], x + 1000003] for x in (1, 2, 3)]
HONEST = 'def f(x): return x + 1000003'
ROOT = pathlib.Path(__file__).parents[2]


def answer(*lines, ended=0, cpu=0.1, over=''):
  return {'lines': lines, 'ended': ended, 'cpu': cpu, 'over': over}


@pytest.mark.parametrize(
  'given, kind, results, why',
  [
    (answer('{"value": 1}', '{"value": 2}'), 'ran', 2, ''),
    (answer('{"value": 1}', ended=0), 'error', 1, 'status 0 after 1 calls'),
    (answer('{"value": 1}', ended=-9, cpu=1.6), 'time', 1, 'more than 2 s of CPU time'),
    (answer('{"value": 1}', ended=-9, cpu=0.3), 'error', 1, 'status -9 after 1 calls'),
    (answer('{"value": 1}', ended=-9, over='time'), 'time', 1, 'longer than 6 s'),
    (answer(over='output', ended=-9), 'error', 0, 'wrote more than 1,048,576 bytes'),
    (answer('{"error": "E: a"}', '{"value": 2}'), 'error', 2, 'E: a'),
    (answer('{"error": "MemoryError: "}', '{"value": 2}'), 'memory', 2, 'MemoryError'),
    (answer('{"failed": "SyntaxError: a"}'), 'error', 1, 'SyntaxError'),
    (answer('{"missing": "f"}'), 'missing', 1, "no function 'f'"),
    (answer(*['{"value": 1}'] * 3), 'error', 0, 'wrote to the descriptor'),
    (answer('{"value": 1}', '{"passed": 1}'), 'error', 0, 'wrote to the descriptor'),
    (answer('{"value": 1, "error": ""}'), 'error', 0, 'wrote to the descriptor'),
    (answer('[' * 10**5), 'error', 0, 'wrote to the descriptor'),
    (answer('7'), 'error', 0, 'wrote to the descriptor'),
  ],
)
def test_outcomes(given, kind, results, why):
  found = sandbox.outcome(given, 2, isolation.Limits())
  assert (found.kind, len(found.results)) == (kind, results)
  assert why in found.why and bool(found.why) == bool(why)


def test_python_is_what_is_visible():
  python, paths = sandbox.visible()
  assert os.path.isfile(python) and not os.path.islink(python)
  assert any(pathlib.PurePath(python).is_relative_to(path) for path in paths)
  hidden = ('/etc/passwd', str(ROOT), '/tmp', '/proc')
  assert not [h for h in hidden for p in paths if pathlib.PurePath(h).is_relative_to(p)]


@pytest.fixture(scope='module')
def isolated():
  with sandbox.Sandbox(LIMITS) as one:
    assert '16 ways out, all closed' in one.isolation
    yield one


def judged(source, found):
  """The reward of a program that has been run."""
  runner = types.SimpleNamespace(run=lambda *unused: found, isolation='')
  return programs.Program(runner)('', (), source, {'entry': 'f', 'tests': TESTS})


@pytest.mark.slow
@pytest.mark.parametrize('name', hostile.PROGRAMS)
def test_hostile_programs_fail_and_do_no_harm(isolated, name):
  source, kind = hostile.PROGRAMS[name]
  begin = time.monotonic()
  found = isolated.run(source, 'f', [given for given, _ in TESTS])
  assert found.kind == kind and time.monotonic() - begin < LIMITS.wall_seconds + 10
  assert judged(source, found).value == 0 and judged(source, found).kind != 'right'
  found = isolated.run(HONEST, 'f', [given for given, _ in TESTS])
  assert judged(HONEST, found).kind == 'right'
  launcher = isolated._launcher._process.pid
  children = pathlib.Path(f'/proc/{launcher}/task/{launcher}/children').read_text()
  assert not children, 'a process is left behind'


@pytest.mark.slow
def test_programs_share_nothing(isolated):
  write = "def f(x):\n  open('a', 'w').write('b')\n  import json\n  json.x = 1\n  return x"
  read = "import os, json\ndef f(x): return [os.listdir('.'), hasattr(json, 'x')]"
  assert isolated.run(write, 'f', [[7]]).results == [{'value': 7}]
  assert isolated.run(read, 'f', [[7]]).results == [{'value': [[], False]}]
  order = "def f(x): return list({'a', 'b', 'c', 'd', 'e', 'f'})"
  assert isolated.run(order, 'f', [[7]]) == isolated.run(order, 'f', [[7]])


@pytest.mark.slow
def test_without_namespaces_programs_are_refused_unless_that_is_asked_for():
  """In a user namespace that may hold no further ones."""
  program = (
    'import sys\nfrom moe_jax import errors\nfrom moe_jax.rewards import sandbox\n'
    'try:\n  sandbox.Sandbox()\nexcept errors.InputError as e:\n  print(e)\n'
    'with sandbox.Sandbox(unsafe=True) as one:\n'
    "  print(one.isolation, one.run('def f(x): return x', 'f', [[7]]).results)"
  )
  forbid = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
  done = subprocess.run(
    ['unshare', '-r', 'sh', '-c', forbid, 'sh', sys.executable, '-c', program],
    cwd=ROOT, text=True, capture_output=True, timeout=60,
  )  # fmt: skip
  refused, unsafe = done.stdout.splitlines()
  assert refused.startswith('programs cannot be isolated on this machine: OSError: [Errno 28] unsh')
  assert '--unsafe_rewards' in refused
  assert unsafe.startswith('NO ISOLATION') and unsafe.endswith("[{'value': 7}]")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('bwrap') or os.getuid() == 0, reason='bubblewrap, not as root')
def test_bubblewrap_isolates_too():
  names = ('fork bomb', 'a loop', 'reads a file', 'connects to this machine')
  with sandbox.Sandbox(LIMITS, by='bubblewrap') as one:
    assert one.isolation.startswith('bubblewrap: ')
    for name in (*names, 'says that all has passed', 'crashes'):
      source, kind = hostile.PROGRAMS[name]
      assert one.run(source, 'f', [[1]]).kind == kind, name
    assert one.run(HONEST, 'f', [[1]]).results == [{'value': 1000004}]


def test_bubblewrap_is_the_second_way(monkeypatch):
  tried = []

  def refused(self):
    tried.append(self._by)
    if self._by == 'namespaces':
      raise errors.InputError('programs cannot be isolated')
    return 'a box'

  monkeypatch.setattr(sandbox.Sandbox, '_tried_out', refused)
  monkeypatch.setattr(sandbox.shutil, 'which', lambda name: '/usr/bin/bwrap')
  assert sandbox.Sandbox().isolation == 'a box' and tried == ['namespaces', 'bubblewrap']
  monkeypatch.setattr(sandbox.shutil, 'which', lambda name: None)
  with pytest.raises(errors.InputError, match='cannot be isolated'):
    sandbox.Sandbox()
  assert sandbox.Sandbox(unsafe=True).isolation == sandbox.UNSAFE and len(tried) == 3


@pytest.mark.slow
def test_without_isolation_limits_hold_all_the_same():
  with sandbox.Sandbox(LIMITS, unsafe=True) as one:
    for name in ('a loop', 'sleep', 'a large list', 'endless results', 'prints the answer'):
      source, kind = hostile.PROGRAMS[name]
      assert one.run(source, 'f', [[1]]).kind == kind, name
    assert one.run("import os\ndef f(x): return os.listdir('.')", 'f', [[1]]).results == [
      {'value': []}
    ]


@pytest.mark.slow
def test_a_launcher_that_is_gone_is_an_error():
  with sandbox.Sandbox(LIMITS) as one:
    os.kill(one._launcher._process.pid, signal.SIGKILL)
    with pytest.raises(sandbox.SandboxError, match='launcher of programs does not work'):
      one.run(HONEST, 'f', [[1]])


def test_an_answer_that_names_an_open_way_is_refused(monkeypatch):
  monkeypatch.setattr(sandbox, '_source', lambda module: '')
  ways = dict.fromkeys(sandbox.ways_out.ATTEMPTS, False)
  for found, words in (
    ([{'value': ways | {'start a process': True}}], 'could start a process'),
    ([{'value': {}}], 'the one that tries it ended with'),
    ([], 'the one that tries it ended with'),
  ):
    outcome = sandbox.Outcome('ran', found, '')
    monkeypatch.setattr(sandbox.Sandbox, 'run', lambda self, *a, found=outcome: found)
    with pytest.raises(errors.InputError, match=words):
      sandbox.Sandbox()
  outcome = sandbox.Outcome('ran', [{'value': ways}], '')
  monkeypatch.setattr(sandbox.Sandbox, 'run', lambda self, *a: outcome)
  assert 'ways out, all closed' in sandbox.Sandbox().isolation
