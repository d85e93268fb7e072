"""Valid random configs: built, trained for two steps, saved, restored, decoded.

The restored state is bit by bit the saved one, and reading a text token by token gives the logits
of reading it whole. Meshes use all devices that there are.
"""

import collections
import dataclasses
import pathlib
import random
import shutil
import time
import traceback

import jax
import numpy as np

from configs import smoke
from experiments.torture import damage, random_configs
from moe_jax import errors
from moe_jax.balance import routing_figures
from moe_jax.checkpoints import checkpointer as checkpointer_lib
from moe_jax.config import parse, router_traits, schema
from moe_jax.data import corpus as corpus_lib
from moe_jax.data import pipeline
from moe_jax.devices import partitioning
from moe_jax.inference import cached_model
from moe_jax.models import transformer
from moe_jax.runs import first_state
from moe_jax.training import objective, optim, optimizer_step, train_state

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
      partitioning.check(cfg, mesh)
      return cfg, mesh
    except errors.InputError:  # sizes that do not divide each other: the message is the rule
      continue
  plain = dict.fromkeys(('tensor', 'sequence', 'fsdp', 'expert'), 1) | {'data': 1}
  cfg = dataclasses.replace(cfg, mesh=dataclasses.replace(cfg.mesh, **plain))
  return cfg, partitioning.make_mesh(cfg.mesh, jax.devices()[:1])


def try_one(cfg: schema.Config, mesh: jax.sharding.Mesh, workdir: pathlib.Path) -> str:
  """Trains, saves, restores and decodes. Returns what was compared.

  Raises:
    AssertionError: a figure is not finite, or two that should be are not equal.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  corpus = corpus_lib.load_corpus(cfg.data, cfg.model.vocab_size, cfg.train.seed, progress=False)
  cfg = _with_replay(cfg, workdir)
  state = first_state.random(cfg, mesh, corpus)
  step = optimizer_step.make_train_step(cfg, mesh)
  batches = pipeline.train_batches(
    corpus,
    seed=cfg.train.seed,
    max_seq_len=cfg.model.max_seq_len,
    batch_size_at=lambda n: optim.batch_size_at(cfg.train, n),
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
  with checkpointer_lib.Checkpointer(workdir / 'checkpoints', cfg.checkpoint) as checkpointer:
    checkpointer.save(2, state, {}, force=True)
    checkpointer.wait()
    restored = checkpointer.restore(train_state.abstract_state(cfg, mesh))
  assert damage.digest(restored.state) == damage.digest(state), 'restored state is another'
  traits = router_traits.of(cfg.model.moe)
  if not traits.causal or (cfg.model.moe.capacity.at_eval):
    return 'trained'
  _decode(cfg, jax.device_get(restored.state.variables))
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


def _decode(cfg: schema.Config, variables):
  """A prompt of 5 tokens and 4 more, one at a time, against the full forward; on one device."""
  model, slots = cfg.model, cfg.model.max_seq_len
  rows = 1  # some routers deal by a token's place in the batch
  tokens = np.random.default_rng(1).integers(256, size=(rows, 9)).astype(np.int32)
  at = np.broadcast_to(np.arange(9, dtype=np.int32), tokens.shape)
  whole = jax.jit(lambda v, *a: transformer.apply(model, v, *a).logits)
  want = np.asarray(whole(variables, tokens, at, np.ones_like(at)))
  weights = cached_model.unstack(model, variables)
  length = np.full(rows, 5, np.int32)

  @jax.jit
  def prefill(weights, tokens):
    hidden, caches = cached_model.prefill(model, weights, tokens, length, slots)
    return cached_model.logits_of(model, weights, hidden), caches

  @jax.jit
  def step(weights, tokens, at, caches):
    hidden, caches = cached_model.step(model, weights, tokens, at, caches)
    return cached_model.logits_of(model, weights, hidden), caches

  logits, caches = prefill(weights, tokens[:, :5])
  got = [np.asarray(logits)]
  for t in range(5, 9):
    logits, caches = step(weights, tokens[:, t : t + 1], at[:, t : t + 1], caches)
    got.append(np.asarray(logits))
  wide = model.dtype == 'float32' and model.moe.grouped_matmul != 'int8'
  scale = np.abs(want).max()
  np.testing.assert_allclose(
    np.concatenate(got, axis=1), want, atol=(1e-4 if wide else 0.1) * scale, rtol=0
  )


def run(workdir: pathlib.Path, stop: float, seed: int, most: int) -> dict:
  """Tries `most` configs until the time is over.

  Args:
    workdir: scratch; emptied.
    stop: of `time.monotonic`.
    seed: decides the configs.
    most: configs.

  Returns:
    how many went how far, and the configs that failed.
  """
  shutil.rmtree(workdir, ignore_errors=True)
  base, rng = values(workdir / 'cache'), random.Random(seed)
  counts: collections.Counter = collections.Counter()
  broken = []
  for number in range(most):
    if time.monotonic() > stop:
      break
    cfg, mesh = draw(base, rng, number)
    try:
      result = try_one(cfg, mesh, workdir / 'run')
    except Exception as error:  # every kind of failure is a finding, and the next config goes on
      traceback.print_exc()
      result = 'failed'
      changes = '; '.join(parse.diff(base, parse.to_dict(cfg)))
      broken.append(f'{type(error).__name__}: {str(error)[:300]} with {changes}')
    counts[f'{cfg.model.moe.router}: {result}'] += 1
    shutil.rmtree(workdir / 'run', ignore_errors=True)
    if number % 8 == 7:
      jax.clear_caches()  # every config is another set of programs
  for name, count in sorted(counts.items()):
    print(f'{count:4d} {name}')
  return {'configs': dict(counts), 'broken': broken}
