"""Which of how many processes is this one.

`resolve` finds (coordinator, number of processes, own number) in the flags, in the variables
`MOE_JAX_*`, in what `srun` sets, or in what a TPU slice says of itself. It imports no JAX;
`start.initialize` starts it at the place that was found.
"""

import dataclasses
import functools
import importlib.util
import os
import pathlib
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

from moe_jax import errors

KINDS = ('auto', 'explicit', 'slurm', 'tpu', 'off')
TPU_PORT = 8482  # what JAX itself takes on TPU slices
_METADATA = 'http://{host}/computeMetadata/v1/instance/attributes/{key}'
_METADATA_SECONDS = 5.0

Environment = Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Flags:
  """What the user said; None or '' where nothing."""

  kind: str = 'auto'  # one of KINDS
  coordinator: str = ''  # host:port
  num_processes: int | None = None
  process_id: int | None = None
  start_timeout: float = 300.0  # seconds in which all processes must have come
  heartbeat_timeout: int = 100  # seconds after which a silent process counts as dead


@dataclasses.dataclass(frozen=True)
class Place:
  """This process among all."""

  origin: str  # 'explicit', 'slurm' or 'tpu'
  coordinator: str  # host:port of process 0
  num_processes: int
  process_id: int
  # GPUs that are this process's own, by number; None: all that it sees.
  local_device_ids: tuple[int, ...] | None = None


def resolve(flags: Flags, environ: Environment = os.environ) -> Place | None:
  """Finds this process's place; None where it runs alone.

  `auto` is `explicit` when a coordinator is given, `slurm` inside of an `srun` of several tasks,
  `tpu` on a slice of several hosts, else `off`.

  Raises:
    errors.InputError: something is missing, or contradicts.
  """
  errors.require(
    flags.kind in KINDS,
    f'--distributed={flags.kind} must be one of {", ".join(KINDS)}; auto is right nearly always',
  )
  errors.require(
    flags.start_timeout > 0 and flags.heartbeat_timeout > 0,
    f'--start_timeout={flags.start_timeout:g} and --heartbeat_timeout={flags.heartbeat_timeout} '
    'are seconds and must be positive',
  )
  given = _given(flags, environ)
  if flags.kind == 'off':
    said = flags.coordinator or flags.num_processes is not None or flags.process_id is not None
    errors.require(
      not said,
      '--distributed=off contradicts --coordinator, --num_processes and --process_id; leave out '
      'the one or the others',
    )
    return None
  if flags.kind == 'explicit' or (flags.kind == 'auto' and given):
    return _explicit(given)
  place = None
  if flags.kind in ('auto', 'slurm'):
    place = _slurm(environ, required=flags.kind == 'slurm')
  if place is None and flags.kind in ('auto', 'tpu'):
    place = _tpu(environ, required=flags.kind == 'tpu')
  if place is None or place.num_processes == 1:
    return None
  place = dataclasses.replace(place, coordinator=given.get('coordinator', place.coordinator))
  return _checked(place)


def _given(flags: Flags, environ: Environment) -> dict[str, Any]:
  """The parts of an explicit place that were given; flags go before variables."""
  given = {
    'coordinator': flags.coordinator or environ.get('MOE_JAX_COORDINATOR'),
    'num_processes': flags.num_processes,
    'process_id': flags.process_id,
  }
  for name in ('num_processes', 'process_id'):
    if given[name] is None and f'MOE_JAX_{name.upper()}' in environ:
      given[name] = _integer(environ, f'MOE_JAX_{name.upper()}')
  return {name: value for name, value in given.items() if value not in (None, '')}


def _explicit(given: Mapping[str, Any]) -> Place | None:
  missing = [n for n in ('coordinator', 'num_processes', 'process_id') if n not in given]
  if missing:
    raise errors.InputError(
      f'--{missing[0]} is missing: several processes need --coordinator=HOST:PORT of process 0, '
      '--num_processes and --process_id (or MOE_JAX_COORDINATOR, MOE_JAX_NUM_PROCESSES, '
      'MOE_JAX_PROCESS_ID); leave all out for a single process'
    )
  place = _checked(Place('explicit', **given))
  return place if place.num_processes > 1 else None


def _checked(place: Place) -> Place:
  host, _, port = place.coordinator.rpartition(':')
  errors.require(
    bool(host) and port.isdigit() and 0 < int(port) < 65536,
    f'--coordinator={place.coordinator} must be HOST:PORT of process 0, for example 10.0.0.1:8482',
  )
  errors.require(
    place.num_processes >= 1,
    f'--num_processes={place.num_processes} must be 1 at least; give the number of processes',
  )
  errors.require(
    0 <= place.process_id < place.num_processes,
    f'--process_id={place.process_id} must lie between 0 and {place.num_processes - 1} '
    f'(--num_processes={place.num_processes}); number the processes from 0',
  )
  return place


def _slurm(environ: Environment, required: bool) -> Place | None:
  """The place of a task of `srun`; None where there is no more than one task."""
  tasks = 'SLURM_STEP_NUM_TASKS' if 'SLURM_STEP_NUM_TASKS' in environ else 'SLURM_NTASKS'
  if 'SLURM_PROCID' not in environ or tasks not in environ:
    errors.require(
      not required,
      '--distributed=slurm finds no SLURM_PROCID and SLURM_NTASKS; start the command with srun',
    )
    return None
  num_processes = _integer(environ, tasks)
  if num_processes == 1:
    return None
  nodes = environ.get('SLURM_STEP_NODELIST')
  host = _first_host(nodes) if nodes else environ.get('SLURM_LAUNCH_NODE_IPADDR', '')
  errors.require(
    bool(host),
    f'{tasks}={num_processes}, but this process is no task of srun (SLURM_STEP_NODELIST is not '
    'set); start the command with srun, or pass --distributed=off for a single process',
  )
  # Two jobs on one node must not meet on one port; the range lies above what systems hand out.
  port = 61440 + _integer(environ, 'SLURM_JOB_ID') % 4096 if 'SLURM_JOB_ID' in environ else TPU_PORT
  return Place(
    'slurm',
    f'{host}:{port}',
    num_processes,
    _integer(environ, 'SLURM_PROCID'),
    _slurm_devices(environ, num_processes),
  )


def _slurm_devices(environ: Environment, num_processes: int) -> tuple[int, ...] | None:
  """One GPU per task where a node has several tasks that all see all of its GPUs."""
  nodes = environ.get('SLURM_STEP_NUM_NODES') or environ.get('SLURM_NNODES')
  if nodes is None or num_processes <= int(nodes) or 'SLURM_LOCALID' not in environ:
    return None
  visible = environ.get('CUDA_VISIBLE_DEVICES', '')
  if visible.count(',') == 0:
    return None  # none, or srun has bound this task to its own (--gpus-per-task)
  return (_integer(environ, 'SLURM_LOCALID'),)


def _first_host(nodes: str) -> str:
  """'node[007-015,020],b1' -> 'node007'; 'a1,b1' -> 'a1'."""
  prefix, bracket, rest = nodes.partition('[')
  if ',' in prefix or not bracket:
    return prefix.partition(',')[0]
  numbers, _, tail = rest.partition(']')
  return prefix + numbers.replace('-', ',').partition(',')[0] + tail.partition(',')[0]


def _tpu(environ: Environment, required: bool) -> Place | None:
  """The place of a host of a TPU slice, or of several slices; None for a single host.

  GKE says it in variables, a TPU VM through its metadata server.
  """
  read = environ.get
  workers, number = _workers(environ), environ.get('TPU_WORKER_ID')
  if workers is None and (required or _may_be_tpu_vm(environ)):
    host = environ.get('GCE_METADATA_IP', 'metadata.google.internal')
    ask = functools.partial(_metadata, host)
    endpoints, number = ask('worker-network-endpoints'), ask('agent-worker-number')
    workers = None if endpoints is None else [_address(entry) for entry in endpoints.split(',')]
    read = _with_tpu_env(environ, ask('tpu-env') or '')
  if workers is None or number is None:
    errors.require(
      not required,
      '--distributed=tpu finds neither TPU_WORKER_HOSTNAMES and TPU_WORKER_ID nor a metadata '
      'server; run on the hosts of a TPU slice, or name the processes with --coordinator',
    )
    return None
  slices, own = int(read('MEGASCALE_NUM_SLICES') or 1), int(read('MEGASCALE_SLICE_ID') or 0)
  first = (read('MEGASCALE_COORDINATOR_ADDRESS') or workers[0]).partition(':')[0]
  return Place(
    'tpu', f'{first}:{TPU_PORT}', len(workers) * slices, own * len(workers) + int(number)
  )


def _workers(environ: Environment) -> list[str] | None:
  """Hosts of the slice as GKE lists them; a TPU VM may list them without saying who it is."""
  names = environ.get('TPU_PROCESS_ADDRESSES') or environ.get('TPU_WORKER_HOSTNAMES')
  return names.split(',') if names and 'TPU_WORKER_ID' in environ else None


def _may_be_tpu_vm(environ: Environment) -> bool:
  chips = pathlib.Path('/dev/accel0').exists() or pathlib.Path('/dev/vfio/0').exists()
  has_libtpu = importlib.util.find_spec('libtpu') is not None
  return chips and has_libtpu and 'TPU_SKIP_MDS_QUERY' not in environ


def _address(entry: str) -> str:
  """A worker endpoint is a host, or name:id:ip."""
  return entry.rpartition(':')[2]


def _with_tpu_env(environ: Environment, text: str) -> Callable[[str], str | None]:
  """Looks a name up in the variables, then in lines like `MEGASCALE_NUM_SLICES: '2'`."""
  pairs = (line.partition(':') for line in text.splitlines())
  lines = {key.strip(): value.strip().strip("'") for key, _, value in pairs}
  return lambda name: environ.get(name) or lines.get(name)


def _metadata(host: str, key: str) -> str | None:
  """An attribute of this virtual machine; None where there is no such attribute, or no server."""
  url = _METADATA.format(host=host, key=key)
  request = urllib.request.Request(url, headers={'Metadata-Flavor': 'Google'})
  try:
    with urllib.request.urlopen(request, timeout=_METADATA_SECONDS) as reply:
      return reply.read().decode().strip()
  except (urllib.error.URLError, OSError):
    return None


def _integer(environ: Environment, name: str) -> int:
  try:
    return int(environ[name])
  except ValueError as e:
    raise errors.InputError(f'{name}={environ[name]} must be a whole number; set it to one') from e
