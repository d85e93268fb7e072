"""Several seeds of one run as an axis: one compiled step trains all of them.

Parameters, optimizer and router state are stacked, and the step is `jax.vmap` of the ordinary one.
Each seed starts from its own weights and sees its own batches, those of a run of its own, whose
losses it repeats but for the last bits of float32 sums. What belongs to a seed ends up in a workdir
of its own, like that of any run; while training goes on, all states are one checkpoint.

Legend: S seeds.
"""

import contextlib
import dataclasses
import functools
import pathlib
import shutil
import time
from collections.abc import Generator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import atomic_files, errors, trees
from moe_jax.checkpoints import checkpointer as checkpointer_lib
from moe_jax.config import paths, schema
from moe_jax.data import corpus as corpus_lib
from moe_jax.devices import compile_options, partitioning
from moe_jax.runs import (
  checks,
  first_state,
  fit,
  loop_actions,
  run_record,
  terminal,
  trained_run,
  working_directory,
)
from moe_jax.training import batches, objective, optimizer_step, stop_signal, train_state

_DONE = 'together.done'  # what `together` is called while it is deleted


def configs(cfg: schema.Config, seeds: Sequence[int]) -> list[schema.Config]:
  """The run of every seed."""
  errors.require(
    len(set(seeds)) == len(seeds) > 0, f'seeds {list(seeds)} must be different numbers'
  )
  return [
    dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, seed=seed)) for seed in seeds
  ]


def take(tree: trees.Tree, i: int) -> Any:
  """What belongs to the i-th seed: leaves [S, ...] -> [...]."""
  return jax.tree.map(lambda a: a[i], tree)


def init_state(
  cfgs: Sequence[schema.Config],
  mesh: jax.sharding.Mesh,
  corpora: Sequence[corpus_lib.Corpus],
) -> train_state.TrainState:
  """The states at step 0, leaves [S, ...]; each is bit by bit that of a run of its own."""
  states = [first_state.random(cfg, mesh, corpus) for cfg, corpus in zip(cfgs, corpora)]
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def abstract_state(
  cfg: schema.Config, mesh: jax.sharding.Mesh, num_seeds: int
) -> train_state.TrainState:
  """Shape, dtype and sharding of the stacked states; allocates nothing."""
  whole = jax.NamedSharding(mesh, jax.P())

  def stacked(x):
    return jax.ShapeDtypeStruct((num_seeds, *x.shape), x.dtype, sharding=whole)

  return jax.tree.map(stacked, train_state.abstract_state(cfg, mesh))


def make_train_step(cfg: schema.Config, mesh: jax.sharding.Mesh) -> Any:
  """The jitted step of all seeds: (state, batch), leaves [S, ...], -> (state, StepMetrics).

  The state is donated. Whatever seed `cfg` names plays no part: it is in the state.
  """
  return jax.jit(
    jax.vmap(optimizer_step.step_function(cfg)),
    donate_argnums=0,
    compiler_options=compile_options.for_step(mesh),
  )


def _batches(
  cfgs: Sequence[schema.Config], corpora: Sequence[corpus_lib.Corpus], start: int
) -> Generator[dict[str, np.ndarray], None, None]:
  """Arrays [S, B, L] of the steps from `start` on: row i is the batch of a run of the i-th seed."""
  sources = [batches.of_run(cfg, corpus, start=start) for cfg, corpus in zip(cfgs, corpora)]
  with contextlib.ExitStack() as stack:
    for source in sources:
      stack.callback(source.close)
    for together in zip(*sources):
      yield {key: np.stack([b[key] for b in together]) for key in objective.BATCH_KEYS}


def run_training(
  cfg: schema.Config,
  seeds: Sequence[int],
  workdir: pathlib.Path,
  *,
  argv: Sequence[str] = (),
  say: trained_run.Say = print,
) -> tuple[list[trained_run.Run], list[corpus_lib.Corpus]]:
  """Trains the run `cfg` with all seeds at once, resuming from the newest whole checkpoint.

  Args:
    cfg: the run; its own seed plays no part.
    seeds: values of `train.seed`.
    workdir: holds a workdir per seed, named by it, and `together/checkpoints` until all are done.
    argv: command line, for the record.
    say: prints one line.

  Returns:
    The trained (or interrupted) runs and their corpora, in the order of the seeds. Interrupted ones
    have no checkpoint of their own yet.

  Raises:
    errors.InputError: the run does not fit one device, or as `train_run.run_training` says.
  """
  workdir = paths.local(workdir, '--workdir')
  began = time.perf_counter()
  say = terminal.of(say)
  cfgs = [
    working_directory.as_recorded(one, workdir / str(one.train.seed)) for one in configs(cfg, seeds)
  ]
  errors.require(
    not cfg.init_from,
    f'config.init_from={cfg.init_from!r} must be empty for seeds as an axis, which would all start '
    'from the same weights; train them one by one (--together=1)',
  )
  mesh = partitioning.make_mesh(cfg.mesh)
  errors.require(
    mesh.size == 1,
    f'seeds as an axis train on one device, and config.mesh has {mesh.size}; train one seed after '
    'the other (--together=1), or show the process a single device',
  )
  corpora = [
    checks.prepare(working_directory.resolved(one, workdir / str(one.train.seed)))[1]
    for one in cfgs
  ]
  for one in cfgs:
    run_record.check_workdir(workdir / str(one.train.seed), one, allow_change=False)
  together = workdir / 'together'
  with contextlib.ExitStack() as locks:
    # The seeds' own workdirs too, to which all is written but the states on the way.
    for place in (together, *(workdir / str(seed) for seed in seeds)):
      locks.enter_context(atomic_files.lock(place))
    done = workdir / _DONE
    if done.exists():
      shutil.rmtree(done)  # of a start that was killed meanwhile
    state, stopped_by = _train(cfgs, workdir, corpora, mesh, argv, say, began)
    if not stopped_by:
      for i, one in enumerate(cfgs):
        save_one(one, workdir / str(one.train.seed), corpora[i], mesh, take(state, i))
      # Every state now lies in a workdir of its own. A step half deleted would be a damaged one.
      together.rename(done)
      shutil.rmtree(done)
  step = int(state.step[0])
  runs = [
    trained_run.Run(
      one, mesh, take(state, i).variables, corpus.tokenizer, step, corpus.fingerprint, stopped_by
    )
    for i, (one, corpus) in enumerate(zip(cfgs, corpora))
  ]
  return runs, corpora


def _train(
  cfgs: Sequence[schema.Config],
  workdir: pathlib.Path,
  corpora: Sequence[corpus_lib.Corpus],
  mesh: jax.sharding.Mesh,
  argv: Sequence[str],
  say: trained_run.Say,
  began: float,
) -> tuple[train_state.TrainState, str]:
  """(the states, why training ended early): from the newest checkpoint on; see `fit.fit`."""
  together = workdir / 'together'
  with (
    checkpointer_lib.Checkpointer(together / 'checkpoints', cfgs[0].checkpoint) as checkpointer,
    stop_signal.StopSignal() as stop,
  ):
    restored = checkpointer.restore(abstract_state(cfgs[0], mesh, len(cfgs)))
    if restored is not None:
      _check_continues(restored.meta, cfgs, corpora, together)
      state = restored.state
      say(f'resuming after step {restored.step} of {cfgs[0].train.num_steps}')
    else:
      state = _trained(cfgs, corpora, workdir, mesh) or init_state(cfgs, mesh, corpora)
    for one, corpus in zip(cfgs, corpora):
      own = workdir / str(one.train.seed)
      run_record.write(own, one, argv=argv, data_fingerprint=corpus.fingerprint)
      corpus.tokenizer.save(own / 'tokenizer.json')
    return _fit(cfgs, workdir, corpora, mesh, state, checkpointer, stop, say, began)


def _check_continues(
  meta: dict[str, Any],
  cfgs: Sequence[schema.Config],
  corpora: Sequence[corpus_lib.Corpus],
  together: pathlib.Path,
):
  """Refuses to continue with other seeds, settings or text."""
  old = [one['config']['train']['seed'] for one in meta['seeds']]
  new = [cfg.train.seed for cfg in cfgs]
  errors.require(
    old == new,
    f'--seeds: {together} holds the states of seeds {old}, which cannot go on as {new}; ask for '
    'the same seeds, or use another --workdir',
  )
  for saved, cfg, corpus in zip(meta['seeds'], cfgs, corpora):
    checks.check_continues(cfg, saved | {'step': meta['step']}, corpus, allow=False)


def _trained(
  cfgs: Sequence[schema.Config],
  corpora: Sequence[corpus_lib.Corpus],
  workdir: pathlib.Path,
  mesh: jax.sharding.Mesh,
) -> train_state.TrainState | None:
  """The last states out of the seeds' own workdirs, if all of them were trained to the end."""
  states = []
  for cfg, corpus in zip(cfgs, corpora):
    own = workdir / str(cfg.train.seed)
    if not (own / 'checkpoints').is_dir():
      return None
    with trained_run.reader(own) as checkpointer:
      found = checkpointer.restore(train_state.abstract_state(cfg, mesh))
    if found is None or found.step < cfg.train.num_steps:
      return None
    checks.check_continues(cfg, found.meta, corpus, allow=False)
    states.append(found.state)
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def _fit(
  cfgs: Sequence[schema.Config],
  workdir: pathlib.Path,
  corpora: Sequence[corpus_lib.Corpus],
  mesh: jax.sharding.Mesh,
  state: train_state.TrainState,
  checkpointer: checkpointer_lib.Checkpointer,
  stop: stop_signal.StopSignal,
  say: trained_run.Say,
  began: float,
) -> tuple[train_state.TrainState, str]:
  """Trains all seeds from `state` on; see `fit.fit`."""
  start, whole = int(state.step[0]), jax.NamedSharding(mesh, jax.P())
  with contextlib.ExitStack() as stack:
    members = [
      stack.enter_context(
        loop_actions.member(
          cfg,
          corpus,
          workdir / str(cfg.train.seed),
          start,
          label=f'seed={cfg.train.seed} ',
          take=functools.partial(take, i=i),
        )
      )
      for i, (cfg, corpus) in enumerate(zip(cfgs, corpora))
    ]
    return fit.fit(
      members,
      make_train_step(cfgs[0], mesh),
      state,
      _batches(cfgs, corpora, start),
      mesh=mesh,
      put=lambda batch: jax.device_put(batch, whole),
      checkpointer=checkpointer,
      meta={'seeds': [trained_run.meta(cfg, corpus) for cfg, corpus in zip(cfgs, corpora)]},
      stop=stop,
      say=say,
      began=began,
    )


def save_one(
  cfg: schema.Config,
  workdir: pathlib.Path,
  corpus: corpus_lib.Corpus,
  mesh: jax.sharding.Mesh,
  state: train_state.TrainState,
):
  """Writes the last state of a seed as the checkpoint of its own run; a whole one stands."""
  with checkpointer_lib.Checkpointer(workdir / 'checkpoints', cfg.checkpoint) as checkpointer:
    checkpointer.restore(train_state.abstract_state(cfg, mesh))
    checkpointer.save(int(state.step), state, trained_run.meta(cfg, corpus), force=True)
    checkpointer.wait()
