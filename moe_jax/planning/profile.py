"""Where the time of a compiled program goes, from a profile of it: attention, router, experts ...

A profile names the instruction of every piece of work, and the text of the program knows for each
instruction the path of named scopes that it came from; joined, they give seconds per scope. The
innermost scope that `SCOPES` knows decides. An instruction that the compiler made by itself (a
copy, a fill with zeros) takes the scope of what reads it, or else of what it reads.

On the CPU several threads work at once and the inner threads of one operation are not seen, so the
sum is neither the wall time nor that of all cores; shares of it are what can be compared.
"""

import collections
import json
import pathlib
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax

from moe_jax import atomic_files, errors
from moe_jax.planning.hlo import hlo_text

# Scope -> group. Scopes are `jax.named_scope`s and the names of Flax modules and their methods.
SCOPES: Mapping[str, str] = {
  'embedding': 'embedding',
  **dict.fromkeys(('attention', 'mla_proj', 'mla_core'), 'attention'),
  **dict.fromkeys(('attention_norm', 'ffn_norm', 'final_norm'), 'norms'),
  **dict.fromkeys(('router', 'router_stats', 'router_state'), 'router'),
  **dict.fromkeys(('plan', 'gather', 'combine', 'exchange', 'moe._experts'), 'dispatch'),
  **dict.fromkeys(('gate_up', 'swiglu', 'down'), 'experts'),
  'shared': 'shared',
  'mlp': 'dense_ffn',
  **dict.fromkeys(('head', 'head_loss', 'mtp_loss'), 'loss'),
  'optimizer': 'optimizer',
  # What belongs to no layer: slices in and out of the stacks of layers, and their empty buffers.
  'Transformer': 'stack',
}
OTHER = 'other'
GROUPS = (*dict.fromkeys(SCOPES.values()), OTHER)


def scope_of(op_name: str) -> str:
  """The innermost scope of `SCOPES` in a path like jit(f)/transpose(jvp(Transformer))/router/add.

  Returns:
    OTHER if there is none.
  """
  words = re.findall(r'[\w.]+', op_name)
  return next((word for word in reversed(words) if word in SCOPES), OTHER)


def scopes(hlo_text_of_program: str) -> dict[str, str]:
  """The scope of every instruction, by its name.

  Args:
    hlo_text_of_program: `compiled.as_text()`.
  """
  module, scope_of = hlo_text.parse(hlo_text_of_program), {}
  for computation in module.computations.values():
    own = {i.name: _named(module, i) for i in computation.instructions.values()}
    readers = collections.defaultdict(list)
    for i in computation.instructions.values():
      for name in i.operands:
        readers[name].append(i.name)
    for i in computation.instructions.values():
      near = (*readers[i.name], *i.operands)
      scope_of[i.name] = own[i.name] or next((own[n] for n in near if own.get(n)), OTHER)
  return scope_of


def _named(module: hlo_text.Module, instruction: hlo_text.Instruction) -> str:
  """Scope by the instruction's own path, or by that of the root of its fusion; '' without one."""
  path = instruction.op_name
  if not path and instruction.opcode == 'fusion':
    path = module.computations[instruction.called[0]].root.op_name
  return scope_of(path) if path else ''


def seconds(trace_dir: str | pathlib.Path, hlo_text_of_program: str) -> dict[str, float]:
  """Seconds of a program's work by scope, over everything that was profiled.

  Args:
    trace_dir: directory of `jax.profiler.trace`; its newest profile is read.
    hlo_text_of_program: `compiled.as_text()` of the program that ran.

  Returns:
    {scope: seconds}; scopes that took no time are left out. OTHER has what no scope claims, and on
    an accelerator the kernels that the profile does not name.

  Raises:
    errors.InputError: there is no profile, or the program is not in it.
  """
  names = scopes(hlo_text_of_program)
  by_scope: dict[str, float] = collections.defaultdict(float)
  known = False
  for events in _lines(trace_dir):
    for name, duration in own_times(events):
      known |= name in names
      by_scope[names.get(name, OTHER)] += duration
  errors.require(
    known,
    f'trace_dir={trace_dir} holds a profile without any instruction of this program; profile calls '
    'of the very program whose text is given, and wait for their results inside the trace',
  )
  return dict(by_scope)


def grouped(by_scope: Mapping[str, float]) -> dict[str, float]:
  """Seconds by the groups of `GROUPS`, all of them, from seconds by scope."""
  seconds = dict.fromkeys(GROUPS, 0.0)
  for scope, value in by_scope.items():
    seconds[SCOPES.get(scope, OTHER)] += value
  return seconds


def shares(trace_dir: str | pathlib.Path, hlo_text_of_program: str) -> dict[str, float]:
  """Of the time, by the groups of `GROUPS`; they add up to 1. See `seconds`."""
  by_group = grouped(seconds(trace_dir, hlo_text_of_program))
  total = sum(by_group.values())
  return {group: value / total for group, value in by_group.items()}


class Window:
  """Profiles some consecutive steps of a run: the trace, and `shares.json` beside it.

  Args:
    directory: of both; made if absent.
    first: number of the first optimizer step that is profiled.
    last: of the last one.
    say: prints one line.

  Raises:
    errors.InputError: the steps are none.
  """

  def __init__(
    self, directory: str | pathlib.Path, first: int, last: int, say: Callable[[str], object]
  ):
    errors.require(
      1 <= first <= last,
      f'--profile_steps={first},{last} must be the numbers of a first and a last step, from 1 on; '
      'give for example 10,13',
    )
    self.first, self.last = first, last
    self._directory, self._say, self._text = pathlib.Path(directory), say, ''

  def start(self, hlo_text_of_program: str):
    """Call before the first step's program, whose text this is, is launched."""
    self._text = hlo_text_of_program
    jax.profiler.start_trace(str(self._directory), profiler_options=options())

  def stop(self):
    """Call when the last step is done: says where the time went, unless the start was missed."""
    if not self._text:
      return
    jax.profiler.stop_trace()
    result = shares(self._directory, self._text)
    atomic_files.write_text(self._directory / 'shares.json', json.dumps(result, indent=2) + '\n')
    by_size = sorted(result.items(), key=lambda item: -item[1])
    parts = ' '.join(f'{name}={share:.0%}' for name, share in by_size if share >= 0.005)
    self._say(f'profile of steps {self.first} to {self.last} in {self._directory}: {parts}')


def options() -> Any:
  """Of `jax.profiler.trace`: without Python's own calls, which cost more than they tell."""
  chosen = jax.profiler.ProfileOptions()
  chosen.python_tracer_level = 0
  return chosen


def _lines(trace_dir: str | pathlib.Path) -> list[list[tuple[float, float, str]]]:
  """Events (start, end, instruction) in nanoseconds of the newest profile, by line (thread)."""
  paths = pathlib.Path(trace_dir).rglob('*.xplane.pb')
  path = max(paths, key=lambda p: p.stat().st_mtime, default=None)
  errors.require(
    path is not None,
    f'trace_dir={trace_dir} holds no *.xplane.pb; give the directory that was passed to '
    'jax.profiler.trace',
  )
  found = []
  with warnings.catch_warnings():
    # From Python 3.12 on, the first event whose statistics are read creates a type, which warns
    # that it has no __module__; where that warning is an error, jaxlib aborts the interpreter.
    warnings.simplefilter('ignore', DeprecationWarning)
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
      on_device = plane.name.startswith('/device:')
      for line in plane.lines:
        # A device's other lines repeat the same time by module, by step, by name.
        if not on_device or line.name == 'XLA Ops' or line.name.startswith('Stream'):
          found.append(_events(line, on_device))
  return found


def _events(line: Any, on_device: bool) -> list[tuple[float, float, str]]:
  """(start, end, instruction) of each event of a line.

  '' is work of a device that the profile does not name. On the host everything else that goes on
  has no instruction and is not counted.
  """
  events = []
  for event in line.events:
    name = dict(event.stats).get('hlo_op', '')
    if event.name.startswith('end: ') or not (name or on_device):
      continue
    events.append((event.start_ns, event.start_ns + event.duration_ns, str(name)))
  return events


def own_times(events: Iterable[tuple[float, float, str]]) -> Iterator[tuple[str, float]]:
  """(name, seconds) of events (start, end, name) in nanoseconds, without those inside of them."""
  stack: list[list[Any]] = []  # [end, name, nanoseconds of its own]

  def leave(until: float) -> Iterator[tuple[str, float]]:
    while stack and stack[-1][0] <= until:
      _, name, own = stack.pop()
      yield name, own / 1e9

  for start, end, name in sorted(events, key=lambda e: (e[0], -e[1])):
    yield from leave(start)
    if stack:
      stack[-1][2] -= end - start
    stack.append([end, name, end - start])
  yield from leave(float('inf'))
