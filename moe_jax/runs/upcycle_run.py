"""The workdir of an upcycled run: its weights as a checkpoint of step 0, and how they compare."""

import dataclasses
import functools
import json
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import atomic_files, errors, trees
from moe_jax.balance import expert_similarity
from moe_jax.checkpoints import checkpointer as checkpointer_lib
from moe_jax.config import batch_sizes, moe_config, router_traits, schema
from moe_jax.data import corpus as corpus_lib
from moe_jax.data import kept_files, pipeline
from moe_jax.devices import partitioning
from moe_jax.models import transformer
from moe_jax.runs import checks, first_state, run_record, trained_run, upcycle
from moe_jax.storage import fetch, upload
from moe_jax.training import cross_entropy, objective, train_state

Array = jax.Array

RECORD = 'upcycled.json'  # in the workdir, see `create`
_SAME_LOGITS = 1e-4  # of the largest logit, in float32


def create(
  source: str | os.PathLike[str],
  step: int | None,
  cfg: schema.Config,
  workdir: str | os.PathLike[str],
  *,
  noise: float = 0.0,
  argv: Sequence[str] = (),
  say: Callable[[str], None] = print,
):
  """Writes a workdir in which `train_run.run_training(cfg, workdir)` goes on from upcycled weights.

  It holds config.json, tokenizer.json and a checkpoint of step 0 with a fresh optimizer; and
  upcycled.json, which tells it from a run of the same config that began anew: `from`, the dense
  run as it was named, `step`, its checkpoint, and `noise`.

  Args:
    source: workdir of a dense run.
    step: its checkpoint; None for the newest whole one.
    cfg: the MoE's run.
    workdir: where to write; without checkpoints. In a bucket, gs:// or s3://, it is uploaded at the
      end, as one that is whole.
    noise: see `upcycle.upcycle`; drawn, like the router, from `train.seed`.
    argv: command line, for the record.
    say: prints one line.

  Raises:
    errors.InputError: see the message; nothing has been written then but an empty workdir.
  """
  errors.require(
    0 <= noise < math.inf, f'--noise={noise} must be a number of at least 0; 0 makes exact copies'
  )
  with upload.folder(workdir, '--workdir') as place:
    _create(source, step, cfg, place, noise, argv, say)


def _create(
  source: str | os.PathLike[str],
  step: int | None,
  cfg: schema.Config,
  workdir: pathlib.Path,
  noise: float,
  argv: Sequence[str],
  say: Callable[[str], None],
):
  """`create` in a folder on this disk."""
  _check_no_checkpoints(workdir)
  # Loaded before it is compared: an older step may be taken, with another config than the newest.
  loaded = trained_run.load(source, step, '--from')
  layout = upcycle.plan(loaded.cfg.model, cfg.model)
  if not cfg.model.tie_embeddings:
    kept_files.require_untied(source, '--from')
  mesh, corpus = checks.prepare(cfg)
  errors.require(
    trained_run.digest(corpus.tokenizer) == trained_run.digest(loaded.tokenizer),
    f'config.data.tokenizer={cfg.data.tokenizer!r} is not the tokenizer of the dense run, whose '
    f'embedding is copied; pass --config.data.tokenizer={os.path.join(source, "tokenizer.json")}',
  )
  # A record without a checkpoint is of a run that never was; it is kept beside the new one.
  run_record.check_workdir(workdir, cfg, allow_change=True)
  dense = _on_mesh(loaded, mesh)
  state = _state(dense, cfg, mesh, corpus, noise)
  summary = _summary(dense, cfg, state, layout, noise, _difference(dense, cfg, mesh, corpus, state))
  first = jax.process_index() == 0
  with (
    atomic_files.lock(workdir, first),
    checkpointer_lib.Checkpointer(workdir / 'checkpoints', cfg.checkpoint) as checkpointer,
  ):
    if first:
      run_record.write(workdir, cfg, argv=argv, data_fingerprint=corpus.fingerprint)
      corpus.tokenizer.save(workdir / 'tokenizer.json')
      kept_files.carry_without_model(pathlib.Path(fetch.local(source, '--from')), workdir)
      made_of = {'from': os.fspath(source), 'step': dense.step, 'noise': noise}
      atomic_files.write_text(workdir / RECORD, json.dumps(made_of, indent=2) + '\n')
    checkpointer.save(0, state, trained_run.meta(cfg, corpus), force=True)
    checkpointer.wait()
  say(summary)


def checkpoints(workdir: pathlib.Path) -> list[pathlib.Path]:
  """Checkpoints of any step in a workdir, whole or not; [] where `create` can write."""
  return sorted((workdir / 'checkpoints').glob('[0-9]*'))


def _check_no_checkpoints(workdir: pathlib.Path):
  found = checkpoints(workdir)
  errors.require(
    not found,
    f'--workdir={workdir} already holds checkpoints ({", ".join(p.name for p in found)}); choose '
    'another --workdir',
  )


def _on_mesh(dense: trained_run.Run, mesh: jax.sharding.Mesh) -> trained_run.Run:
  """The dense run with its weights whole on every device of the new run's mesh.

  That of a loaded run has another shape, for which a TPU may order the same devices otherwise, and
  no program reads arrays of both.
  """
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  return dataclasses.replace(dense, variables=jax.device_put(dense.variables, whole), mesh=mesh)


def _state(
  dense: trained_run.Run,
  cfg: schema.Config,
  mesh: jax.sharding.Mesh,
  corpus: corpus_lib.Corpus,
  noise: float,
) -> train_state.TrainState:
  """A fresh state of the MoE's run with the upcycled parameters."""
  state = first_state.random(cfg, mesh, corpus)
  make = functools.partial(upcycle.upcycle, dense.cfg.model, model=cfg.model, noise=noise)
  out = jax.tree.map(lambda x: x.sharding, state.params)
  rng = jax.random.key(cfg.train.seed)
  made = jax.jit(lambda params, rng: make(params, rng=rng), out_shardings=out)
  return state.replace(params=made(dense.variables['params'], rng))


class Difference(NamedTuple):
  """Dense model and MoE on the first rows of training text, both in float32."""

  logits: float  # largest absolute difference
  scale: float  # largest absolute logit
  dense_loss: float  # nats per target
  loss: float


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compare(
  dense: schema.ModelConfig,
  model: schema.ModelConfig,
  dense_variables: trees.Variables,
  variables: trees.Variables,
  batch: trees.Batch,
) -> tuple[Array, Array, Array, Array]:
  """The numbers of a `Difference`."""
  inputs = [batch[key] for key in ('tokens', 'positions', 'segment_ids')]
  want = transformer.apply(dense, dense_variables, *inputs).logits
  got = transformer.apply(model, variables, *inputs).logits
  real = (batch['segment_ids'] > 0)[..., None]

  def largest(x):
    return jnp.where(real, jnp.abs(x), 0.0).max()

  targets = jnp.maximum((batch['targets'] >= 0).sum(), 1)

  def loss(logits):
    return cross_entropy.next_token(logits, batch['targets'])[0] / targets

  return largest(got - want), largest(want), loss(want), loss(got)


def _difference(
  dense: trained_run.Run,
  cfg: schema.Config,
  mesh: jax.sharding.Mesh,
  corpus: corpus_lib.Corpus,
  state: train_state.TrainState,
) -> Difference:
  """Compares the two models on the first rows of the run's text, outside of training.

  In float32, with every expert on every token, so that no kernel has a say; hence on as few rows as
  the devices and the routing allow.
  """
  batches = pipeline.TrainBatches(
    corpus,
    seed=cfg.train.seed,
    max_seq_len=cfg.model.max_seq_len,
    batch_sizes=batch_sizes.of(cfg.train),
    num_steps=1,
  )
  rows = _fewest_rows(cfg.model, partitioning.row_ways(mesh))
  batch = {key: value[:rows] for key, value in batches[0].items() if key in objective.BATCH_KEYS}
  moe = dataclasses.replace(cfg.model.moe, dispatch='dense')
  model = dataclasses.replace(cfg.model, dtype='float32', moe=moe)
  dense_model = dataclasses.replace(dense.cfg.model, dtype='float32')
  with partitioning.activate(mesh), jax.default_matmul_precision('highest'):
    put = partitioning.put_global_batch(batch, mesh)
    found = _compare(dense_model, model, dense.variables, state.variables, put)
  return Difference(*(float(x) for x in found))


def _fewest_rows(model: schema.ModelConfig, ways: int) -> int:
  """The least number of rows that fills all devices and every group of tokens that compete."""
  moe = model.moe
  bound = router_traits.of(moe).bound
  chunk = bound.chunk(moe, model.max_seq_len) if bound else 1
  group = moe.capacity.group_rows if moe.capacity.at_eval else 0
  return math.lcm(ways, chunk // math.gcd(chunk, model.max_seq_len), group or 1)


def _summary(
  dense: trained_run.Run,
  cfg: schema.Config,
  state: train_state.TrainState,
  layout: upcycle.Layout,
  noise: float,
  found: Difference,
) -> str:
  """What was made of what, and whether it starts as the dense model."""
  experts = state.params['moe_layers']['moe']
  alike = jax.jit(expert_similarity.expert_similarity)(experts['gate_up'], experts['down'])
  same = found.logits <= _SAME_LOGITS * found.scale
  reason = '' if same else _reason(cfg.model.moe, noise)
  return (
    f'upcycled step {dense.step} into {cfg.model.moe.num_experts} experts: {layout}, noise '
    f'{noise:g}, expert similarity {float(alike.mean()):.3f}; evaluated, the start '
    f'{"equals" if same else "differs from"} the dense model{reason}: largest logit difference '
    f'{found.logits:.2g}, loss {found.loss:.4f} against {found.dense_loss:.4f}'
  )


def _reason(moe: moe_config.MoEConfig, noise: float) -> str:
  traits = router_traits.of(moe)
  reasons = ['noise'] if noise else []
  if not moe.norm_topk_prob and not traits.gates_sum_to_scale:
    reasons.append('gates that are not divided by their sum (norm_topk_prob=False)')
  if traits.bound:
    reasons.append('tokens that no expert chose')
  if moe.capacity.policy != 'none' and moe.capacity.at_eval:
    reasons.append('dropped tokens')
  return f' ({", ".join(reasons)})' if reasons else ''
