"""Valid random configs: built, trained for two steps, saved, restored, decoded.

The restored state is bit by bit the saved one, and reading a text token by token gives the logits
of reading it whole. Meshes use 8 virtual devices. Configs are tried in processes of their own, a
few in each, so that one that ends its process is one finding; `python -m experiments.torture.fuzz
WORKDIR SEED NUMBER...` tries some of them again.
"""

import collections
import dataclasses
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from configs import smoke
from experiments.torture import damage, random_configs
from moe_jax import errors
from moe_jax.balance import routing_figures
from moe_jax.checkpoints import checkpointer as checkpointer_lib
from moe_jax.config import batch_sizes, parse, router_traits, schema
from moe_jax.data import corpus as corpus_lib
from moe_jax.data import pipeline
from moe_jax.devices import partitioning
from moe_jax.inference import cached_model
from moe_jax.models import transformer
from moe_jax.runs import checks, first_state
from moe_jax.training import objective, optimizer_step, train_state

ROOT = pathlib.Path(__file__).parents[2]
ENV = {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
ENV |= {'XLA_FLAGS': os.environ.get('XLA_FLAGS', '--xla_backend_optimization_level=0')}  # compiling
BATCH = 4  # configs of a process
SIZES = {
  'model.vocab_size': 288,
  'model.max_seq_len': 16,
  'model.embed_dim': 16,
  'model.mlp_dim': 24,
  'model.num_layers': 2,
  'model.attention.head_dim': 8,
  'model.moe.num_experts': 8,
  'model.moe.num_experts_per_tok': 2,
  'model.moe.moe_mlp_dim': 8,
  'data.synthetic_documents': 40,
  'data.heldout_fraction': 0.2,
  'optim.warmup_steps': 0,
  'train.num_steps': 2,
  'train.batch_size': 16,
  'train.sample_prompt': '',
}


def values(cache: pathlib.Path) -> dict:
  """The config that all others are made of."""
  page = smoke.get_config()
  page.update_from_flattened_dict(SIZES | {'data.cache_dir': str(cache)})
  return page.to_dict()


def draw(base: dict, rng: random.Random, number: int) -> tuple[schema.Config, jax.sharding.Mesh]:
  """A valid config and a mesh that it fits."""
  cfg = random_configs.valid(base, rng, number)
  for simpler in ({}, {'tensor': 1, 'sequence': 1}, {'fsdp': 1}, {'expert': 1}):
    cfg = dataclasses.replace(cfg, mesh=dataclasses.replace(cfg.mesh, data=-1, **simpler))
    try:
      mesh = partitioning.make_mesh(cfg.mesh)
      checks.check_mesh(cfg, mesh)
      return cfg, mesh
    except errors.InputError:  # sizes that do not divide each other: the message is the rule
      continue
  plain = dict.fromkeys(('tensor', 'sequence', 'fsdp', 'expert'), 1) | {'data': 1}
  cfg = dataclasses.replace(cfg, mesh=dataclasses.replace(cfg.mesh, **plain))
  return cfg, partitioning.make_mesh(cfg.mesh, jax.devices()[:1])


def try_one(
  cfg: schema.Config, mesh: jax.sharding.Mesh, workdir: pathlib.Path, tell: Callable[[str], None]
) -> str:
  """Trains, saves, restores and decodes; says at which stage it is. Returns what was compared.

  Raises:
    AssertionError: a figure is not finite, or two that should be are not equal.
  """
  tell('building')
  workdir.mkdir(parents=True, exist_ok=True)
  corpus = corpus_lib.load_corpus(cfg.data, cfg.model.vocab_size, cfg.train.seed, progress=False)
  cfg = _with_replay(cfg, workdir)
  state = first_state.random(cfg, mesh, corpus)
  tell('training')
  step = optimizer_step.make_train_step(cfg, mesh)
  batches = pipeline.train_batches(
    corpus,
    seed=cfg.train.seed,
    max_seq_len=cfg.model.max_seq_len,
    batch_sizes=batch_sizes.of(cfg.train),
    start_step=0,
    num_steps=2,
    num_shards=partitioning.row_ways(mesh),
    shards=tuple(range(partitioning.row_ways(mesh))),
  )
  with partitioning.activate(mesh):
    for batch in batches:
      state, metrics = step(state, partitioning.put_batch(objective.inputs(batch), mesh))
      figures = optimizer_step.host_metrics(metrics)
      assert np.isfinite([v for v in figures.values() if v is not None]).all(), figures
  tell('saving')
  with checkpointer_lib.Checkpointer(workdir / 'checkpoints', cfg.checkpoint) as checkpointer:
    checkpointer.save(2, state, {}, force=True)
    checkpointer.wait()
    restored = checkpointer.restore(train_state.abstract_state(cfg, mesh))
  assert damage.digest(restored.state) == damage.digest(state), 'restored state is another'
  traits = router_traits.of(cfg.model.moe)
  moe = cfg.model.moe
  # DS-MoE's threshold_topk is a budget of all tokens that are read together: of one token while
  # decoding, of all of them in a whole text.
  budget = 'inference' in traits.options and moe.options.inference == 'threshold_topk'
  if not traits.causal or moe.capacity.at_eval or budget:
    return 'trained'
  _decode(cfg, jax.device_get(restored.state.variables), tell)
  return 'trained and decoded'


def _with_replay(cfg: schema.Config, workdir: pathlib.Path) -> schema.Config:
  """A recording for router 'replay', of the config's sizes."""
  model, moe = cfg.model, cfg.model.moe
  if 'replay_path' not in router_traits.of(moe).options:
    return cfg
  rows, layers = moe.options.replay_rows, model.num_moe_layers + model.num_mtp_layers
  shape = (layers, rows, model.max_seq_len, moe.num_experts)
  order = np.argsort(np.random.default_rng(0).random(shape), axis=-1).astype(np.int32)
  path = workdir / 'replay.npz'
  routing_figures.write(path, {'expert_idx': order[..., : moe.num_experts_per_tok]})
  options = dataclasses.replace(moe.options, replay_path=str(path))
  moe = dataclasses.replace(moe, options=options)
  return dataclasses.replace(cfg, model=dataclasses.replace(model, moe=moe))


def _decode(cfg: schema.Config, variables, tell: Callable[[str], None]):
  """A prompt of 5 tokens and 4 more, one at a time, against the full forward; on one device."""
  # In bfloat16 a score beside another, or beside a threshold, may choose another expert.
  model, slots = dataclasses.replace(cfg.model, dtype='float32'), cfg.model.max_seq_len
  rows = 1  # some routers deal by a token's place in the batch
  tokens = np.random.default_rng(1).integers(256, size=(rows, 9)).astype(np.int32)
  at = np.broadcast_to(np.arange(9, dtype=np.int32), tokens.shape)
  whole = jax.jit(lambda v, *a: transformer.apply(model, v, *a).logits)
  tell('reading a text whole')
  want = np.asarray(whole(variables, tokens, at, np.ones_like(at)))
  weights = cached_model.unstack(model, variables)
  length = np.full(rows, 5, np.int32)

  @jax.jit
  def prefill(weights, tokens):
    hidden, caches, _ = cached_model.prefill(model, weights, tokens, length, slots)
    return cached_model.logits_of(model, weights, hidden), caches

  @jax.jit
  def step(weights, tokens, at, caches):
    hidden, caches, _ = cached_model.step(model, weights, tokens, at, caches)
    return cached_model.logits_of(model, weights, hidden), caches

  tell('prefilling')
  logits, caches = prefill(weights, tokens[:, :5])
  got = [np.asarray(logits)]
  tell('decoding')
  for t in range(5, 9):
    logits, caches = step(weights, tokens[:, t : t + 1], at[:, t : t + 1], caches)
    got.append(np.asarray(logits))
  wide = model.moe.grouped_matmul != 'int8'
  scale = np.abs(want).max()
  np.testing.assert_allclose(
    np.concatenate(got, axis=1), want, atol=(1e-4 if wide else 0.1) * scale, rtol=0
  )


def child(workdir: pathlib.Path, seed: int, numbers: Sequence[int]):
  """Tries configs by their numbers; a line for each in records.jsonl."""
  jax.config.update('jax_num_cpu_devices', 8)  # for meshes
  base = values(workdir / 'cache')
  for number in numbers:
    begun: dict[str, float] = {}  # stage -> seconds of CPU until then
    cfg, mesh = draw(base, random.Random(f'{seed}-{number}'), number)
    record = {'number': number, 'router': cfg.model.moe.router, 'error': ''}
    record['changes'] = parse.diff(base, parse.to_dict(cfg))

    def tell(stage: str, record=record, begun=begun):
      begun[stage] = time.process_time()
      (workdir / 'stage').write_text(json.dumps(record | {'stage': stage}))

    try:
      record['result'] = try_one(cfg, mesh, workdir / 'run', tell)
    except Exception as error:  # every kind of failure is a finding, and the next config goes on
      traceback.print_exc()
      record |= {'result': 'failed', 'error': f'{type(error).__name__}: {str(error)[:400]}'}
    marks = [*begun.values(), time.process_time()]
    record['cpu_seconds'] = {s: round(b - a, 1) for s, a, b in zip(begun, marks, marks[1:])}
    _add(workdir, record)
    shutil.rmtree(workdir / 'run', ignore_errors=True)


def _add(workdir: pathlib.Path, record: Mapping):
  with (workdir / 'records.jsonl').open('a') as lines:
    lines.write(json.dumps(record) + '\n')


def records(workdir: pathlib.Path) -> dict[int, dict]:
  """Config's number -> what became of it; of two lines of a number the later one."""
  path = workdir / 'records.jsonl'
  lines = path.read_text().splitlines() if path.exists() else []
  return {record['number']: record for record in map(json.loads, lines)}


def _batch(workdir: pathlib.Path, seed: int, numbers: Sequence[int]):
  """Tries configs in a process of their own; one that ends it is recorded with its stage."""
  line = [sys.executable, '-m', 'experiments.torture.fuzz', str(workdir), str(seed)]
  (workdir / 'stage').unlink(missing_ok=True)
  with (workdir / 'log').open('a') as log:
    done = subprocess.run(
      [*line, *map(str, numbers)], cwd=ROOT, env=os.environ | ENV, stdout=log, stderr=log
    )
  if done.returncode and (workdir / 'stage').exists():
    record = json.loads((workdir / 'stage').read_text())
    error = f'the process ended with status {done.returncode} while {record["stage"]}'
    _add(workdir, record | {'result': 'crashed', 'error': error})
  elif done.returncode:
    raise RuntimeError((workdir / 'log').read_text()[-2000:])


def run(workdir: pathlib.Path, stop: float, seed: int, most: int) -> dict:
  """Tries configs until the time is over; those with a line in records.jsonl are not tried again.

  Args:
    workdir: scratch.
    stop: of `time.monotonic`.
    seed: decides the configs.
    most: configs.

  Returns:
    how many went how far, and the configs that failed.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  while time.monotonic() < stop:
    known = records(workdir)
    left = [number for number in range(most) if number not in known]
    if not left:
      break
    _batch(workdir, seed, left[:BATCH])
  found = list(records(workdir).values())
  counts = collections.Counter(f'{r["router"]}: {r["result"]}' for r in found)
  for name, count in sorted(counts.items()):
    print(f'{count:4d} {name}')
  broken = [
    f'config {r["number"]}: {r["error"]} with {"; ".join(r["changes"])}'
    for r in found
    if r['result'] in ('failed', 'crashed')
  ]
  return {'configs': dict(counts), 'broken': broken}


if __name__ == '__main__':
  child(pathlib.Path(sys.argv[1]), int(sys.argv[2]), [int(n) for n in sys.argv[3:]])
