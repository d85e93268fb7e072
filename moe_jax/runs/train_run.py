"""Trains a run from its config, on one process or many; see `trained_run` for its use.

Layout of a workdir: config.json (resolved config, versions, commit), tokenizer.json, metrics.jsonl,
tensorboard/, profile/, routing/<step>.npz, checkpoints/<step>/, plots/, evaluation.json.
"""

import contextlib
import dataclasses
import os
import pathlib
import time
from collections.abc import Sequence

import jax

from moe_jax import atomic_files, errors, trees
from moe_jax.checkpoints import checkpointer as checkpointer_lib
from moe_jax.config import batch_sizes, paths, schema
from moe_jax.data import corpus as corpus_lib
from moe_jax.data import kept_files, pipeline
from moe_jax.devices import partitioning
from moe_jax.models.experts import backends
from moe_jax.planning import flops, profile
from moe_jax.processes import agreement
from moe_jax.runs import (
  checks,
  first_state,
  fit,
  loop_actions,
  reference_scores,
  run_record,
  terminal,
  trained_run,
  working_directory,
)
from moe_jax.storage import parts as parts_lib
from moe_jax.training import (
  batches,
  objective,
  optimizer_step,
  stop_signal,
  train_state,
  trainable,
)


def run_training(
  cfg: schema.Config,
  workdir: str | os.PathLike[str],
  *,
  parts: parts_lib.Parts | None = None,
  allow_config_change: bool = False,
  argv: Sequence[str] = (),
  say: trained_run.Say = print,
  profile_steps: tuple[int, int] | None = None,
  open_weights: first_state.Open = first_state.of_run,
  stage: fit.Stage | None = None,
) -> tuple[trained_run.Run, corpus_lib.Corpus]:
  """Trains `cfg` in `workdir`, resuming from the newest whole checkpoint there.

  Everything that can be wrong with the input is found before anything is compiled or written.

  Args:
    cfg: the run.
    workdir: where everything is written.
    parts: carries parts of checkpoints where each process has a workdir of its own.
    allow_config_change: continue a run of another config.
    argv: command line, for the record.
    say: prints one line.
    profile_steps: the first and the last of the steps that are profiled, into workdir/profile.
    open_weights: config -> what `init_from` names, for more kinds than runs.
    stage: where the batches come from, of a run of rewards (`post_training.policy_stage`).

  Returns:
    The trained (or interrupted) run and its corpus.

  Raises:
    errors.InputError: see the message.
  """
  began = time.perf_counter()
  errors.require(
    (stage is not None) == (cfg.objective.kind in ('policy', 'process_reward')),
    f'config.objective.kind={cfg.objective.kind!r} does not learn from the rows of its corpus; run '
    'python -m experiments.rl or experiments.process_reward, or moe_jax.train',
  )
  workdir, first = paths.local(workdir, '--workdir'), agreement.is_first()
  writes = first or parts is not None
  say = terminal.of(say if first else _say_nothing)
  window = _profile_window(cfg, workdir, profile_steps, say)
  with agreement.together():
    cfg = working_directory.as_recorded(cfg, workdir)
    changes, moved = run_record.check_workdir(workdir, cfg, allow_config_change)
    reading = working_directory.resolved(cfg, workdir)
    source, missing = _start_weights(reading, workdir, open_weights)
    mesh, corpus = checks.prepare(reading)
    checks.check_source(reading, source.meta if source is not None else None, corpus)
    summary = _summary(cfg, corpus, mesh)
  with contextlib.ExitStack() as stack:
    with agreement.together():
      stack.enter_context(atomic_files.lock(workdir, writes))
    checks.check_processes(None if parts else workdir, corpus)
    checkpointer = stack.enter_context(
      checkpointer_lib.Checkpointer(workdir / 'checkpoints', cfg.checkpoint, parts=parts)
    )
    stop = stack.enter_context(stop_signal.StopSignal())
    abstract_state = train_state.abstract_state(cfg, mesh)
    restored = checkpointer.restore(abstract_state)
    if restored is not None:
      checks.check_continues(cfg, restored.meta, corpus, allow_config_change)
    for line in (summary, *_prefixed('config', changes), *_prefixed('placement', moved)):
      say(line)
    stream = pipeline.START
    if restored is None and missing is not None:
      raise missing
    if restored is None:
      state = first_state.make(reading, source, mesh, corpus, say)
    else:
      state = restored.state
      stream = _stream_start(restored.meta, restored.step, cfg)
      say(f'resuming after step {restored.step} of {cfg.train.num_steps}')
    with agreement.together():
      if writes:
        run_record.write(workdir, cfg, argv=argv, data_fingerprint=corpus.fingerprint)
        corpus.tokenizer.save(workdir / 'tokenizer.json')
        if source is not None:
          source.carry(workdir)
    corpus = reference_scores.prepared(
      cfg,
      workdir,
      corpus,
      mesh,
      lambda: _reference(reading, source, missing, mesh, corpus, None if restored else state),
      anew=restored is None,
      write=writes,
    )
    corpus.tokenizer.end_ids = kept_files.end_ids(workdir / kept_files.DIRECTORY, corpus.tokenizer)
    checkpointer.prepare(abstract_state)
    state, stopped_by = _fit(
      cfg,
      workdir,
      parts,
      corpus,
      mesh,
      state,
      stream,
      checkpointer,
      stop,
      say,
      window,
      began,
      stage,
    )
    step = int(state.step)
  run = trained_run.Run(
    cfg, mesh, state.variables, corpus.tokenizer, step, corpus.fingerprint, stopped_by
  )
  return run, corpus


def _fit(
  cfg: schema.Config,
  workdir: pathlib.Path,
  parts: parts_lib.Parts | None,
  corpus: corpus_lib.Corpus,
  mesh: jax.sharding.Mesh,
  state: train_state.TrainState,
  stream: pipeline.StreamStart,
  checkpointer: checkpointer_lib.Checkpointer,
  stop: stop_signal.StopSignal,
  say: trained_run.Say,
  window: profile.Window | None,
  began: float,
  stage: fit.Stage | None,
) -> tuple[train_state.TrainState, str]:
  """Trains from `state` on; see `fit.fit`."""
  start = int(state.step)
  if stage is None:
    found = batches.of_run(cfg, corpus, mesh=mesh, start=start, stream=stream)
    place = partitioning.put_batch
  else:
    found = stage.batches(state, mesh, corpus.tokenizer, workdir, say)
    place = partitioning.put_global_batch
  with loop_actions.member(cfg, corpus, workdir, start, stream=stream, parts=parts) as member:
    return fit.fit(
      [member],
      optimizer_step.make_train_step(cfg, mesh),
      state,
      found,
      mesh=mesh,
      put=lambda batch: place(objective.inputs(batch), mesh),
      checkpointer=checkpointer,
      meta=trained_run.meta(cfg, corpus, stream),
      stop=stop,
      say=say,
      began=began,
      profile=window if agreement.is_first() else None,
      stage=stage,
    )


def _start_weights(
  cfg: schema.Config,
  workdir: pathlib.Path,
  open_weights: first_state.Open,
) -> tuple[first_state.Weights | None, errors.InputError | None]:
  """What `init_from` names, or why it cannot be opened, which a run that resumes need not know."""
  try:
    return open_weights(cfg), None
  except errors.InputError as error:
    if not any((workdir / 'checkpoints').glob('[0-9]*')):
      raise
    return None, error


def _reference(
  cfg: schema.Config,
  source: first_state.Weights | None,
  missing: errors.InputError | None,
  mesh: jax.sharding.Mesh,
  corpus: corpus_lib.Corpus,
  state: train_state.TrainState | None,
) -> trees.Variables:
  """The weights that a run has started from: those of its `state` at step 0, or read again."""
  if state is None and missing is not None:
    raise missing
  found = state or first_state.make(cfg, source, mesh, corpus, _say_nothing)
  return found.variables


def _stream_start(meta: trees.Json, step: int, cfg: schema.Config) -> pipeline.StreamStart:
  """From where rows are counted in a run that goes on after `step`.

  With the batch sizes of the checkpoint as ever; with others behind the last row that it has read.
  """
  old, start = meta['config']['train'], pipeline.StreamStart(**meta.get('stream', {}))
  # As it was recorded: a config of another version may not parse.
  ramp = tuple(map(tuple, old['batch_ramp']))
  sizes = dataclasses.replace(cfg.train, batch_size=old['batch_size'], batch_ramp=ramp)
  if (sizes.batch_size, sizes.batch_ramp) == (cfg.train.batch_size, cfg.train.batch_ramp):
    return start
  return pipeline.StreamStart(step, start.first_row(batch_sizes.of(sizes), step))


def _prefixed(what: str, changes: Sequence[str]) -> list[str]:
  return [f'{what} changed: {change}' for change in changes]


def _say_nothing(unused_line: str):
  """What every process but the first says."""


def _profile_window(
  cfg: schema.Config,
  workdir: pathlib.Path,
  steps: tuple[int, int] | None,
  say: trained_run.Say,
) -> profile.Window | None:
  """What profiles the steps from the first to the last of `steps`; None for none."""
  if steps is None:
    return None
  errors.require(
    steps[1] <= cfg.train.num_steps,
    f'--profile_steps={steps} (first, last) must end by config.train.num_steps='
    f'{cfg.train.num_steps}; profile earlier steps',
  )
  return profile.Window(workdir / 'profile', *steps, say)


def _summary(cfg: schema.Config, corpus: corpus_lib.Corpus, mesh: jax.sharding.Mesh) -> str:
  """What is about to run; asks for the expert kernels, so that a missing package shows early."""
  total, activated = (
    count(cfg.model).total for count in (flops.count_parameters, flops.count_activated)
  )
  sizes = {name: size for name, size in mesh.shape.items() if size > 1}
  axes = f' mesh={",".join(f"{k}:{v}" for k, v in sizes.items())}' if sizes else ''
  experts = ''
  if cfg.model.is_moe:
    experts = f'dispatch={cfg.model.moe.dispatch} '
    if cfg.model.moe.dispatch == 'dropless':
      experts += f'grouped_matmul={backends.choose(cfg.model.moe.grouped_matmul).name} '
  trained = ''
  if cfg.trainable.kind != 'all':
    number = trainable.count(cfg)
    trained = f' trained={number:,} ({number / total:.1%})'
  return (
    f'parameters={total:,}{trained} activated={activated:,} train_tokens='
    f'{sum(split.num_tokens for split in corpus.train):,} {experts}devices={mesh.size} x '
    f'{jax.devices()[0].device_kind} processes={jax.process_count()}{axes}'
  )
