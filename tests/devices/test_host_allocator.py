"""Whether a process stops asking the kernel for the same memory at every step, and says how."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from moe_jax import errors
from moe_jax.devices import host_allocator

ROOT = pathlib.Path(__file__).parents[2]
GLIBC = pytest.mark.skipif(not host_allocator._glibc(), reason='of glibc')
HUGE = pytest.mark.skipif(
  host_allocator._glibc() < (2, 35) or not host_allocator._has_huge_pages(),
  reason='a glibc or a kernel without huge pages',
)
# A step that needs 40 MiB of temporaries, like one of XLA's: 10,240 pages of 4 KiB each time.
STEPS = """
import ctypes, json, resource, sys
sys.path.insert(0, '.')
from moe_jax.devices import host_allocator
# BEFORE
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
faults = []
for _ in range(4):
  at = libc.malloc(ctypes.c_size_t(40 << 20))
  begin = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  ctypes.memset(at, 1, 40 << 20)
  faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begin)
  libc.free(at)
print(json.dumps([faults[-1], host_allocator.in_use(), sys.argv[1:]]))
"""


def steps(before: str, **environ: str) -> list:
  """[page faults of the last step, what is in use, the command line's arguments]."""
  clean = {k: v for k, v in os.environ.items() if k not in ('GLIBC_TUNABLES', 'MOE_JAX_MALLOC')}
  done = subprocess.run(
    [sys.executable, '-c', STEPS.replace('# BEFORE', before), 'one', '--two'],
    cwd=ROOT,
    env=clean | environ,
    capture_output=True,
    text=True,
    check=True,
  )
  return json.loads(done.stdout)


@GLIBC
def test_without_it_every_step_meets_all_its_pages_anew():
  assert steps('') == [pytest.approx(10_240, rel=0.01), 'default', ['one', '--two']]


@GLIBC
def test_memory_that_is_kept_is_met_once():
  faults, used, _ = steps('assert host_allocator.keep_freed_memory()', MOE_JAX_MALLOC='keep')
  assert (faults, used) == (0, 'keep')


@HUGE
def test_a_command_starts_itself_again_with_its_arguments_and_pages_of_2_mib():
  faults, used, arguments = steps('host_allocator.start_again_with_huge_pages()')
  assert (used, arguments) == ('huge', ['one', '--two'])
  assert faults < 1_024  # 20 pages if the kernel finds them all, a tenth of the others at most


@HUGE
def test_tunables_that_were_set_stay():
  before = 'host_allocator.start_again_with_huge_pages(); import os; '
  before += "assert os.environ['GLIBC_TUNABLES'].startswith('glibc.malloc.perturb=0:glibc')"
  assert steps(before, GLIBC_TUNABLES='glibc.malloc.perturb=0')[1] == 'huge'


@GLIBC
@pytest.mark.parametrize('choice', ['default', 'keep'])
def test_another_choice_starts_nothing_again(choice):
  before = 'host_allocator.start_again_with_huge_pages()'
  assert steps(before, MOE_JAX_MALLOC=choice)[1] == 'default'


@GLIBC
@pytest.mark.parametrize('choice', ['', 'default', 'huge'])
def test_another_choice_keeps_nothing(choice):
  before = 'assert not host_allocator.keep_freed_memory()'
  assert steps(before, MOE_JAX_MALLOC=choice)[1] == 'default'


def test_an_unknown_choice_is_refused(monkeypatch):
  monkeypatch.setenv('MOE_JAX_MALLOC', 'hugepages')
  with pytest.raises(errors.InputError, match='MOE_JAX_MALLOC=hugepages must be one of huge, keep'):
    host_allocator.keep_freed_memory()


@HUGE
def test_commands_run_with_huge_pages():
  line = (
    'import sys; from experiments.common import cli; from moe_jax.devices import host_allocator'
  )
  line += '; cli.run(lambda argv: print(host_allocator.in_use()))'
  clean = {k: v for k, v in os.environ.items() if k not in ('GLIBC_TUNABLES', 'MOE_JAX_MALLOC')}
  done = subprocess.run(
    [sys.executable, '-c', line], cwd=ROOT, env=clean, capture_output=True, text=True, check=True
  )
  assert done.stdout == 'huge\n'


@HUGE
def test_a_process_that_calls_a_command_is_not_started_again():
  """A notebook or a test would be gone, with all it holds."""
  line = 'from experiments.common import cli; from moe_jax.devices import host_allocator; '
  line += "text = 'def main(argv): print(host_allocator.in_use())'; "
  line += "names = {'host_allocator': host_allocator, '__name__': 'experiments.other'}; "
  line += "exec(text, names); cli.run(names['main'])"
  clean = {k: v for k, v in os.environ.items() if k not in ('GLIBC_TUNABLES', 'MOE_JAX_MALLOC')}
  done = subprocess.run(
    [sys.executable, '-c', line], cwd=ROOT, env=clean, capture_output=True, text=True, check=True
  )
  assert done.stdout == 'default\n'
