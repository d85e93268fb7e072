"""Compiles the real train step, or a step of decoding, for TPUs that are not there.

`libtpu` (extra `tpu`) compiles for a topology by its name. That happens in a process of its own:
the environment must be set before JAX starts, libtpu is talkative, and the host memory that a
compilation needs is then known. Results are kept below the cache directory, under a hash of all
that they depend on.
"""

import dataclasses
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

import moe_jax
from moe_jax import errors, trees
from moe_jax.config import parse, paths, schema
from moe_jax.data import cache
from moe_jax.devices import partitioning
from moe_jax.inference import cached_model
from moe_jax.planning import chips, host_memory
from moe_jax.training import objective, optimizer_step, train_state

PACKAGES = ('jax', 'jaxlib', 'libtpu', 'flax', 'optax')
ENVIRONMENT = {
  'JAX_PLATFORMS': 'cpu',  # of the host; the chips are described, not present
  'TPU_SKIP_MDS_QUERY': '1',  # no questions to a cloud's metadata server
  'ALLOW_MULTIPLE_LIBTPU_LOAD': 'true',
  'JAX_ENABLE_COMPILATION_CACHE': 'false',  # its time is a result, and ours keeps what is needed
}
_MEMORY = ('argument', 'output', 'temp', 'alias', 'generated_code', 'host_temp')


@dataclasses.dataclass(frozen=True)
class Job:
  """What to compile."""

  values: trees.Json  # of the config, resolved
  topology: str
  decode: bool = False
  rows: int = 0  # sequences that are decoded together, over all devices
  context: int = 0  # slots of their caches


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What the compiler said; JSON but for `text`."""

  mesh: dict[str, int]
  device_ids: list[int]  # in the order of the mesh
  extents: dict[str, dict[str, int]]  # mesh axis -> dimension of the torus -> chips along it
  arguments: dict[str, int]  # bytes per device by name, without the padding of layouts
  parameter_sizes: list[int]  # numbers of each weight on a device, by stack of layers
  memory: dict[str, int]  # bytes per device by kind; empty if the program does not fit
  error: str  # why the compiler gave up for lack of memory; '' if it did not
  lower_seconds: float
  compile_seconds: float
  cpu_seconds: float  # of all threads, for both
  host_memory_bytes: int  # peak of the process
  text: str  # the compiled program; '' if there is none


def compile_for(cfg: schema.Config, mesh: jax.sharding.Mesh, job: Job) -> Compiled:
  """Compiles in this process, for the devices of `mesh`."""
  start, cpu = time.perf_counter(), time.process_time()
  arguments, lowered = (lower_decode if job.decode else lower_train)(cfg, mesh, job)
  lowered_at = time.perf_counter()
  memory, error, text = {}, '', ''
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as e:
    if 'RESOURCE_EXHAUSTED' not in str(e):
      raise
    error = str(e)
  else:
    stats, text = compiled.memory_analysis(), compiled.as_text()
    memory = {name: int(getattr(stats, f'{name}_size_in_bytes')) for name in _MEMORY}
    # Less than the sum of the parts: temporaries may lie where arguments have been read.
    memory['peak'] = int(stats.peak_memory_in_bytes)
  return Compiled(
    mesh=dict(mesh.shape),
    device_ids=[int(device.id) for device in mesh.devices.flat],
    extents=extents(mesh),
    arguments=arguments,
    parameter_sizes=_parameter_sizes(cfg, mesh),
    memory=memory,
    error=error,
    lower_seconds=lowered_at - start,
    compile_seconds=time.perf_counter() - lowered_at,
    cpu_seconds=time.process_time() - cpu,
    host_memory_bytes=host_memory.peak(),
    text=text,
  )


def lower_train(
  cfg: schema.Config, mesh: jax.sharding.Mesh, unused_job: Job
) -> tuple[dict[str, int], Any]:
  """(bytes of its arguments per device by name, the lowered train step)."""
  del unused_job
  state, step = train_state.abstract_state(cfg, mesh), optimizer_step.make_train_step(cfg, mesh)
  shape = (cfg.train.batch_size, cfg.model.max_seq_len)
  sharding = jax.NamedSharding(mesh, partitioning.BATCH_SPEC)
  rows = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
  batch = dict.fromkeys(objective.BATCH_KEYS, rows)
  arguments = train_arguments(state) | {'batch': bytes_per_device(batch)}
  with partitioning.activate(mesh):
    return arguments, step.lower(state, batch)


def _parameter_sizes(cfg: schema.Config, mesh: jax.sharding.Mesh) -> list[int]:
  params = jax.tree.leaves(train_state.abstract_state(cfg, mesh).params)
  return [int(np.prod(leaf.sharding.shard_shape(leaf.shape))) for leaf in params]


def train_arguments(state: train_state.TrainState) -> dict[str, int]:
  """Bytes per device of the parts of an abstract or real train state."""
  return {
    'parameters': bytes_per_device((state.params, state.reference)),
    'optimizer_state': bytes_per_device(state.opt_state),
    'router_state': bytes_per_device((state.router_state, state.step, state.seed)),
  }


def lower_decode(
  cfg: schema.Config, mesh: jax.sharding.Mesh, job: Job
) -> tuple[dict[str, int], Any]:
  """(bytes of its arguments per device by name, one lowered step of decoding a token per row)."""
  model = cfg.model
  whole = jax.NamedSharding(mesh, jax.P())
  split = jax.NamedSharding(mesh, jax.P(partitioning.ROW_AXES))
  state = train_state.abstract_state(cfg, mesh)
  variables = {'params': state.params, 'router_state': state.router_state}
  ids = jax.ShapeDtypeStruct((job.rows, 1), jnp.int32, sharding=split)

  def step(weights: cached_model.Weights, tokens, positions, caches):
    out = cached_model.step(model, weights, tokens, positions, caches)
    return jnp.argmax(cached_model.logits_of(model, weights, out.hidden), axis=-1), out.caches

  with partitioning.activate(mesh):
    weights = jax.eval_shape(lambda v: cached_model.unstack(model, v), variables)
    weights = _place_weights(weights, state.params, mesh)
    length = jax.ShapeDtypeStruct((job.rows,), jnp.int32, sharding=split)

    def fill(w, t, n):
      return cached_model.prefill(model, w, t, n, job.context).caches

    caches = jax.eval_shape(fill, weights, ids, length)
    caches = jax.tree.map(lambda a: _placed(a, split), caches)
    # Norms, biases of routing and the like are whole everywhere; so is what unstack made anew.
    weights = jax.tree.map(lambda a: a if a.sharding else _placed(a, whole), weights)
    lowered = jax.jit(step, donate_argnums=3, out_shardings=(split, split)).lower(
      weights, ids, ids, caches
    )
  arguments = {
    'parameters': bytes_per_device(weights),
    'caches': bytes_per_device(caches),
    'tokens': 2 * bytes_per_device(ids),
  }
  return arguments, lowered


def _place_weights(
  weights: cached_model.Weights, params: trees.Params, mesh: jax.sharding.Mesh
) -> cached_model.Weights:
  """Gives the weights of single layers the layouts of their stacks, less the axis of layers."""
  known = {}
  for path, leaf in jax.tree.leaves_with_path(params):
    names = tuple(entry.key for entry in path)
    inner = names[0].endswith('_layers')
    axes = tuple(leaf.sharding.spec) + (None,) * (leaf.ndim - len(leaf.sharding.spec))
    known[names[inner:]] = jax.NamedSharding(mesh, jax.P(*axes[inner:]))

  def place(path: Any, leaf: Any) -> Any:
    names = [getattr(entry, 'key', getattr(entry, 'name', None)) for entry in path]
    names = [name for name in names if isinstance(name, str)]
    for start in range(len(names)):
      if tuple(names[start:]) in known:
        return _placed(leaf, known[tuple(names[start:])])
    return leaf

  return jax.tree_util.tree_map_with_path(place, weights)


def _placed(leaf: Any, sharding: jax.NamedSharding) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def bytes_per_device(tree: trees.Tree) -> int:
  """Bytes that one device holds of (abstract) arrays, which are split evenly."""
  return sum(
    int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def extents(mesh: jax.sharding.Mesh) -> dict[str, dict[str, int]]:
  """For each mesh axis, along which dimensions of the torus it runs and over how many chips.

  Empty for devices without coordinates, and for an axis between slices.
  """
  if not hasattr(mesh.devices.flat[0], 'coords'):
    return {}
  dims_of = {}
  for place, (name, size) in enumerate(mesh.shape.items()):
    devices = np.moveaxis(mesh.devices, place, 0).reshape(size, -1)[:, 0]
    if size == 1 or name in partitioning.DCN_AXES:
      continue
    coords = np.array([tuple(d.coords) for d in devices.flat])
    along = {str(i): len(set(coords[:, i].tolist())) for i in range(coords.shape[1])}
    dims_of[name] = {dim: count for dim, count in along.items() if count > 1}
  return dims_of


def describe_devices(topology: chips.Topology) -> list[Any]:
  """The devices of a TPU topology that is not there."""
  from jax.experimental import topologies

  options = {'num_slices': topology.num_slices} if topology.num_slices > 1 else {}
  found = topologies.get_topology_desc(
    platform='tpu', topology_name=topology.libtpu_name, **options
  )
  return list(found.devices)


def run(job: Job, cache_dir: str = '', *, progress: bool = False) -> Compiled:
  """Compiles in a process of its own, unless the result is in the cache.

  Raises:
    errors.InputError: libtpu is missing, or the compilation failed for another reason than memory.
  """
  errors.require(
    importlib.util.find_spec('libtpu') is not None,
    f'--topology={job.topology} needs libtpu to compile for it; install the extra: pip install '
    "'moe_jax[tpu]', or add --estimate to count from shapes alone",
  )
  target = paths.cache_root(cache_dir) / 'plans' / key(job)

  def whole(path):
    return (path / 'facts.json').is_file() and (path / 'program.txt.gz').is_file()

  cache.get_or_build(target, lambda path: _compile_apart(job, path, progress), whole)
  return load(target)


def key(job: Job) -> str:
  """Names a result by all that decides it: the job, the packages, and the sources."""
  digest = hashlib.sha256(json.dumps(dataclasses.asdict(job), sort_keys=True).encode())
  for package in PACKAGES:
    digest.update(f'{package} {importlib.metadata.version(package)}\n'.encode())
  root = pathlib.Path(moe_jax.__file__).parent
  for path in sorted(root.rglob('*.py')):
    # What reads the result does not decide it.
    reads = path.relative_to(root).parts[0] in ('analysis', 'planning')
    if not reads or path.name == pathlib.Path(__file__).name:
      digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
  return digest.hexdigest()[:32]


def load(directory: pathlib.Path) -> Compiled:
  """A result from the cache."""
  facts = json.loads((directory / 'facts.json').read_text(encoding='utf-8'))
  with gzip.open(directory / 'program.txt.gz', 'rt', encoding='utf-8') as file:
    return Compiled(text=file.read(), **facts)


def save(compiled: Compiled, directory: pathlib.Path):
  """Writes a result where `load` finds it."""
  facts = dataclasses.asdict(compiled)
  with gzip.open(directory / 'program.txt.gz', 'wt', encoding='utf-8') as file:
    file.write(facts.pop('text'))
  (directory / 'facts.json').write_text(json.dumps(facts, indent=2), encoding='utf-8')


def _compile_apart(job: Job, directory: pathlib.Path, progress: bool):
  (directory / 'job.json').write_text(json.dumps(dataclasses.asdict(job)), encoding='utf-8')
  root = pathlib.Path(moe_jax.__file__).parents[1]
  path = os.pathsep.join(filter(None, (str(root), os.environ.get('PYTHONPATH'))))
  code = f'import {__name__} as own; own.main()'
  command = [sys.executable, '-c', code, str(directory)]
  log = directory / 'log.txt'
  with log.open('wb') as output:
    process = subprocess.Popen(
      command, env=os.environ | ENVIRONMENT | {'PYTHONPATH': path}, stdout=output, stderr=output
    )
    try:
      _wait(process, f'compiling for {job.topology}', progress)
    finally:
      if process.poll() is None:
        process.kill()
        process.wait()
  if process.returncode:
    lines = log.read_text(encoding='utf-8', errors='replace').strip().splitlines()
    reason = next((x for x in reversed(lines) if 'Error' in x or 'UNIMPLEMENTED' in x), '')
    raise errors.InputError(
      f'--topology={job.topology}: the step does not compile for it: '
      f'{reason or (lines or ["no message"])[-1]}'
    )


def _wait(process: subprocess.Popen, name: str, progress: bool):
  """Shows the seconds that pass, for there is no telling how many are left."""
  form = '{desc} {elapsed} (a few minutes are usual)'
  with tqdm.tqdm(desc=name, bar_format=form, disable=None if progress else True) as bar:
    while True:
      try:
        process.wait(timeout=1)
        return
      except subprocess.TimeoutExpired:
        bar.refresh()


def main():
  """What the process of its own does: reads the job, writes the result."""
  directory = pathlib.Path(sys.argv[-1])
  job = Job(**json.loads((directory / 'job.json').read_text(encoding='utf-8')))
  cfg = parse.from_dict(job.values)
  devices = describe_devices(chips.parse(job.topology))
  mesh = partitioning.make_mesh(cfg.mesh, devices)
  save(compile_for(cfg, mesh, job), directory)
