import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from moe_jax import errors
from moe_jax.planning import profile


def test_own_times_leave_out_what_is_nested():
  events = [(0, 100, 'loop'), (10, 40, 'a'), (20, 30, 'b'), (40, 60, 'a'), (100, 150, 'c')]
  found = {}
  for name, value in profile.own_times(events):
    found[name] = found.get(name, 0) + value * 1e9
  # loop 100 - 30 - 20, the first a 30 - 10, and b, the second a and c as they are.
  assert found == pytest.approx({'loop': 50, 'a': 40, 'b': 10, 'c': 50})


@pytest.mark.parametrize(
  'path, scope',
  [
    (
      'jit(f)/jvp(Transformer)/while/body/closed_call/moe_layers/moe/moe._experts/gate_up/dot',
      'gate_up',
    ),
    (
      'jit(f)/transpose(jvp(Transformer))/while/body/moe_layers/moe/moe._experts/add',
      'moe._experts',
    ),
    ('jit(f)/transpose(jvp(head_loss))/while/body/dot_general', 'head_loss'),
    ('jit(f)/moe_layers/attention/attention/BLD,DNH->BLNH/dot_general', 'attention'),
    ('jit(f)/moe_layers/attention_norm/mul', 'attention_norm'),
    ('jit(f)/jvp(Transformer)/while/body/dynamic_slice', 'Transformer'),
    ('jit(f)/add', profile.OTHER),
    ('', profile.OTHER),
  ],
)
def test_the_innermost_known_scope_decides(path, scope):
  assert profile.scope_of(path) == scope


TEXT = """HloModule jit_f

%fused (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %m = f32[4]{0} multiply(%p, %p), metadata={op_name="jit(f)/optimizer/mul"}
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %copy.1 = f32[4]{0} copy(%x)
  %add.1 = f32[4]{0} add(%copy.1, %x), metadata={op_name="jit(f)/router/add"}
  %copy.2 = f32[4]{0} copy(%add.1)
  %fusion.1 = f32[4]{0} fusion(%x), kind=kLoop, calls=%fused
  ROOT %sub.1 = f32[4]{0} subtract(%fusion.1, %fusion.1), metadata={op_name="jit(f)/sub"}
}
"""


def test_instructions_without_a_path_take_their_neighbours_scope():
  found = profile.scopes(TEXT)
  assert found['add.1'] == 'router'
  assert found['copy.1'] == 'router'  # read by it
  assert found['copy.2'] == 'router'  # reads it, and nothing reads the copy
  assert found['fusion.1'] == 'optimizer'  # by the root of what it computes
  assert found['sub.1'] == profile.OTHER


@pytest.fixture(scope='module')
def profiled(tmp_path_factory):
  """(directory of a profile, text) of a program with a large scope and a small one."""

  @jax.jit
  def f(x):
    with jax.named_scope('attention'):
      y = jax.lax.fori_loop(0, 20, lambda i, y: jnp.tanh(y @ x), x)
    with jax.named_scope('optimizer'):
      return jnp.sort(y[:2])

  x = jnp.ones((384, 384)) * 0.01
  compiled = f.lower(x).compile()
  jax.block_until_ready(compiled(x))
  directory = tmp_path_factory.mktemp('profile')
  with jax.profiler.trace(str(directory)):
    jax.block_until_ready(compiled(x))
  return directory, compiled.as_text()


def test_shares_of_a_real_profile(profiled):
  shares = profile.shares(*profiled)
  assert tuple(shares) == profile.GROUPS
  assert sum(shares.values()) == pytest.approx(1)
  assert shares['attention'] > 0.5 and shares['optimizer'] > 0
  assert shares['router'] == shares['experts'] == 0


def test_reading_does_not_abort_where_warnings_are_errors(profiled):
  # In a process of its own: the type that warns is created once per process, and with an abort.
  directory, text = profiled
  code = (
    'import sys, warnings\n'
    'from moe_jax.planning import profile\n'
    "warnings.simplefilter('error')\n"
    'shares = profile.shares(sys.argv[1], sys.stdin.read())\n'
    "assert shares['attention'] > 0.5, shares\n"
  )
  command = [sys.executable, '-c', code, str(directory)]
  done = subprocess.run(command, input=text, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-2000:]


def test_another_program_is_refused(profiled):
  directory, _ = profiled
  with pytest.raises(errors.InputError, match='without any instruction of this program'):
    profile.shares(directory, 'HloModule g\n\nENTRY %main () -> f32[] {\n}\n')


def test_an_empty_directory_is_refused(tmp_path):
  with pytest.raises(errors.InputError, match='xplane'):
    profile.shares(tmp_path, TEXT)


def test_the_newest_profile_is_read(tmp_path, monkeypatch):
  for name, age in (('old', 1000), ('new', 2000), ('older', 500)):
    (tmp_path / f'{name}.xplane.pb').touch()
    os.utime(tmp_path / f'{name}.xplane.pb', (age, age))
  seen = []

  def read(path):
    seen.append(pathlib.Path(path).name)
    raise KeyError

  monkeypatch.setattr(jax.profiler, 'ProfileData', types.SimpleNamespace(from_file=read))
  with pytest.raises(KeyError):
    profile.shares(tmp_path, TEXT)
  assert seen == ['new.xplane.pb']


def test_a_window_is_traced_from_its_start_to_its_stop(tmp_path, monkeypatch):
  calls, said = [], []
  monkeypatch.setattr(
    jax.profiler, 'start_trace', lambda directory, profiler_options: calls.append(directory)
  )
  monkeypatch.setattr(jax.profiler, 'stop_trace', lambda: calls.append('stop'))
  monkeypatch.setattr(profile, 'shares', lambda *given: {'moe': 0.75, 'head': 0.25} | {'x': 0.0})
  window = profile.Window(tmp_path, 3, 4, said.append)
  window.stop()
  assert not calls and not said  # the start was missed
  window.start(TEXT)
  window.stop()
  assert calls == [str(tmp_path), 'stop']
  assert said == [f'profile of steps 3 to 4 in {tmp_path}: moe=75% head=25%']
