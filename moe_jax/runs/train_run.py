"""One run and its directory: train from a config, on one process or many. See `run_load` for use.

Layout of a workdir: config.json (resolved config, versions, commit), tokenizer.json, metrics.jsonl,
tensorboard/, profile/, routing/<step>.npz, checkpoints/<step>/, plots/, evaluation.json.
"""

import contextlib
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import tqdm

from moe_jax import atomic_files, errors
from moe_jax.balance import routing_figures
from moe_jax.checkpoints import checkpointer as checkpointer_lib
from moe_jax.config import parse, schema
from moe_jax.data import cache, pipeline
from moe_jax.data import corpus as corpus_lib
from moe_jax.devices import partitioning, peak_flops
from moe_jax.inference import generate
from moe_jax.models.experts import backends, sorted_plan
from moe_jax.planning import flops, profile
from moe_jax.processes import agreement as agreement_lib
from moe_jax.runs import metric_log, router_tables, run_record, trained_run, warm_start
from moe_jax.training import evaluate, loop, optim, optimizer_step, train_state
from moe_jax.training import step_timer as step_timer_lib


def run_training(
  cfg: schema.Config,
  workdir: str | os.PathLike[str],
  *,
  allow_config_change: bool = False,
  argv: Sequence[str] = (),
  say: trained_run.Say = print,
  profile_steps: tuple[int, int] | None = None,
) -> tuple[trained_run.Run, corpus_lib.Corpus]:
  """Trains `cfg` in `workdir`, resuming from the newest whole checkpoint there.

  Everything that can be wrong with the input is found before anything is compiled or written.

  Args:
    cfg: the run.
    workdir: where everything is written.
    allow_config_change: continue a run of another config.
    argv: command line, for the record.
    say: prints one line.
    profile_steps: the first and the last of the steps that are profiled, into workdir/profile.

  Returns:
    The trained (or interrupted) run and its corpus.

  Raises:
    errors.InputError: see the message.
  """
  workdir = pathlib.Path(workdir)
  first = agreement_lib.is_first()
  say = say if first else _say_nothing
  errors.require(
    profile_steps is None or profile_steps[1] <= cfg.train.num_steps,
    f'--profile_steps={profile_steps} (first, last) must end by config.train.num_steps='
    f'{cfg.train.num_steps}; profile earlier steps',
  )
  window = profile.Window(workdir / 'profile', *profile_steps, say) if profile_steps else None
  with agreement_lib.together():
    changes, moved = run_record.check_workdir(workdir, cfg, allow_config_change)
    source = _source(cfg)
    mesh, corpus = prepare(cfg)
    if source is not None:
      _check_source(cfg, source, corpus)
    summary = _summary(cfg, corpus, mesh)
  _check_processes(workdir, corpus)
  with contextlib.ExitStack() as stack:
    with agreement_lib.together():
      stack.enter_context(atomic_files.lock(workdir, first))
    checkpointer = stack.enter_context(
      checkpointer_lib.Checkpointer(workdir / 'checkpoints', cfg.checkpoint)
    )
    stop = stack.enter_context(loop.StopSignal())
    abstract_state = train_state.abstract_state(cfg, mesh)
    restored = checkpointer.restore(abstract_state)
    if restored is not None:
      check_continues(cfg, restored.meta, corpus, allow_config_change)
    with agreement_lib.together():
      if first:
        run_record.write(workdir, cfg, argv=argv, data_fingerprint=corpus.fingerprint)
        corpus.tokenizer.save(workdir / 'tokenizer.json')
    say(summary)
    for line in (*_prefixed('config', changes), *_prefixed('placement', moved)):
      say(line)
    if restored is None:
      state = _first_state(cfg, source, mesh, corpus, say)
    else:
      state = restored.state
      say(f'resuming after step {restored.step} of {cfg.train.num_steps}')
    checkpointer.prepare(abstract_state)
    state, stopped_by = _fit(
      cfg, workdir, corpus, mesh, state, checkpointer, stop, say, window if first else None
    )
    step = int(state.step)
  run = trained_run.Run(
    cfg, mesh, state.variables, corpus.tokenizer, step, corpus.fingerprint, stopped_by
  )
  return run, corpus


def _prefixed(what: str, changes: Sequence[str]) -> list[str]:
  return [f'{what} changed: {change}' for change in changes]


def _say_nothing(unused_line: str):
  """What every process but the first says."""


def _check_processes(workdir: pathlib.Path, corpus: corpus_lib.Corpus):
  """Makes sure that all processes see the same text and the same directory."""
  digest = trained_run.digest(corpus.tokenizer)
  agreement_lib.require_same(
    {'the text of config.data': corpus.fingerprint, 'the tokenizer of config.data': digest}
  )
  agreement_lib.require_shared(workdir)


def _source(cfg: schema.Config) -> dict[str, Any] | None:
  """The `meta` of the weights that the run starts from; None for random ones."""
  return trained_run.read_meta(cfg.init_from, flag='config.init_from') if cfg.init_from else None


def _check_source(cfg: schema.Config, source: Mapping[str, Any], corpus: corpus_lib.Corpus):
  """Refuses weights that do not fit the model, or were trained with another tokenizer."""
  warm_start.check(cfg, parse.from_dict(source['config']))
  errors.require(
    source['tokenizer'] == trained_run.digest(corpus.tokenizer),
    f'config.data.tokenizer={cfg.data.tokenizer!r} is not the tokenizer of config.init_from='
    f'{cfg.init_from}, whose embedding is used; pass '
    f'--config.data.tokenizer={pathlib.Path(cfg.init_from) / "tokenizer.json"}',
  )


def _first_state(
  cfg: schema.Config,
  source: Mapping[str, Any] | None,
  mesh: jax.sharding.Mesh,
  corpus: corpus_lib.Corpus,
  say: trained_run.Say,
) -> train_state.TrainState:
  """The state at step 0: random weights, or those of `init_from`."""
  if source is None:
    return router_tables.with_tables(cfg, train_state.init_state(cfg, mesh), corpus)
  with trained_run.reader(pathlib.Path(cfg.init_from)) as checkpointer:
    found = warm_start.read(cfg, parse.from_dict(source['config']), mesh, checkpointer, say)
  state = router_tables.with_tables(cfg, train_state.state_from(cfg, mesh, found['params']), corpus)
  return state.replace(router_state=warm_start.merge(state.router_state, found['router_state']))


def prepare(cfg: schema.Config) -> tuple[jax.sharding.Mesh, corpus_lib.Corpus]:
  """The devices and the text of a run, checked against its config.

  Raises:
    errors.InputError: see the message.
  """
  mesh = partitioning.make_mesh(cfg.mesh)
  partitioning.check(cfg, mesh)
  _check_plan(cfg, mesh)
  corpus = corpus_lib.load_corpus(
    cfg.data, cfg.model.vocab_size, cfg.train.seed, progress=agreement_lib.is_first()
  )
  _check_rows(cfg, corpus, mesh)
  if cfg.train.sample_prompt and cfg.train.sample_tokens:
    prompt = corpus.tokenizer.encode(cfg.train.sample_prompt)
    names = ('config.train.sample_prompt', 'config.train.sample_tokens')
    generate.check_router(cfg.model)
    generate.check_lengths(cfg.model, 1 + len(prompt), cfg.train.sample_tokens, names)
  return mesh, corpus


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
  return (
    f'parameters={total:,} activated={activated:,} train_tokens='
    f'{sum(split.num_tokens for split in corpus.train):,} {experts}devices={mesh.size} x '
    f'{jax.devices()[0].device_kind} processes={jax.process_count()}{axes}'
  )


def _check_rows(cfg: schema.Config, corpus: corpus_lib.Corpus, mesh: jax.sharding.Mesh):
  sizes = [cfg.train.batch_size, *(size for _, size in cfg.train.batch_ramp)]
  pipeline.check_corpus(
    corpus,
    max_seq_len=cfg.model.max_seq_len,
    batch_sizes=sizes,
    num_shards=partitioning.row_ways(mesh),
  )


def _check_plan(cfg: schema.Config, mesh: jax.sharding.Mesh):
  """Refuses a forward pass whose choices per device overflow the sort key of the dropless plan.

  A device of an expert-parallel group may be sent the tokens of all of it.
  """
  model, data_ways, ways = cfg.model, partitioning.row_ways(mesh), mesh.shape['expert']
  if not model.is_moe or model.moe.dispatch != 'dropless':
    return
  largest_batch = max([cfg.train.batch_size, *(size for _, size in cfg.train.batch_ramp)])
  rows = cfg.train.micro_batch_size or largest_batch
  per_row = model.max_seq_len // mesh.shape['sequence'] * model.moe.num_experts_per_tok * ways
  num_experts = model.moe.num_experts // ways
  legal = rows
  while legal > data_ways and not sorted_plan.fits(legal // data_ways * per_row, num_experts):
    legal -= data_ways
  if legal < rows:
    raise errors.InputError(
      f'config.train.micro_batch_size={cfg.train.micro_batch_size} (0 = the whole batch) puts '
      f'{rows // data_ways} rows on a device, more tokens than the int32 sort key of '
      f'{model.moe.num_experts} experts can number; choose a divisor of the batch size of at most '
      f'{legal}'
    )


def check_continues(
  cfg: schema.Config, meta: Mapping[str, Any], corpus: corpus_lib.Corpus, allow: bool
):
  """Refuses to continue on other token ids and, unless allowed, under other settings.

  Raises:
    errors.InputError: names what is different.
  """
  if meta['tokenizer'] != trained_run.digest(corpus.tokenizer):
    raise errors.InputError(
      f'config.data.tokenizer: the checkpoint of step {meta["step"]} was trained with another '
      'tokenizer, so its vocabulary would not match; keep the old one with '
      '--config.data.tokenizer=WORKDIR/tokenizer.json, or use another --workdir'
    )
  if allow:
    return
  if meta['data_fingerprint'] != corpus.fingerprint:
    raise errors.InputError(
      f'config.data.path: the corpus has changed since the checkpoint of step {meta["step"]} (was '
      f'{meta["data_fingerprint"]}, is {corpus.fingerprint}), so the run would not continue on the '
      'same data; restore the text, use another --workdir, or pass --allow_config_change'
    )
  changes, _ = run_record.differences(meta['config'], cfg)
  if changes:
    raise errors.InputError(
      f'the checkpoint of step {meta["step"]} was trained with another config: '
      f'{"; ".join(changes)}; undo the change, use another --workdir, or pass --allow_config_change'
    )


def meta(cfg: schema.Config, corpus: corpus_lib.Corpus) -> dict[str, Any]:
  """What is saved with every checkpoint of a run."""
  return {
    'config': parse.to_dict(cfg),
    'data_fingerprint': corpus.fingerprint,
    'tokenizer': trained_run.digest(corpus.tokenizer),
  }


def _fit(
  cfg: schema.Config,
  workdir: pathlib.Path,
  corpus: corpus_lib.Corpus,
  mesh: jax.sharding.Mesh,
  state: train_state.TrainState,
  checkpointer: checkpointer_lib.Checkpointer,
  stop: loop.StopSignal,
  say: trained_run.Say,
  window: profile.Window | None,
) -> tuple[train_state.TrainState, str]:
  """The loop with its periodic actions.

  All processes do the same, step by step; only writing is left to the first.

  Returns:
    (the last state, which is saved; the name of the signal that ended the run early, or '').
  """
  start, total = int(state.step), cfg.train.num_steps
  first = agreement_lib.is_first()
  timer = step_timer(cfg, first)
  agreement = agreement_lib.StopAgreement(mesh)
  batches = pipeline.train_batches(
    corpus,
    seed=cfg.train.seed,
    max_seq_len=cfg.model.max_seq_len,
    batch_size_at=lambda step: optim.batch_size_at(cfg.train, step),
    start_step=start,
    num_steps=total,
    shards=partitioning.row_shards(mesh),
    num_shards=partitioning.row_ways(mesh),
    prefetch=cfg.data.prefetch,
  )
  writer = metric_log.MetricWriter(workdir, resume_step=start, enabled=first)
  if first:
    drop_routing_after(workdir, start)
  stopped_by = ''
  bar = tqdm.tqdm(total=total, initial=start, unit='step', disable=None if first else True)
  with bar:
    for report in loop.steps(cfg, mesh, state, batches, timer, window):
      step, state = report.step, report.state
      bar.update()
      stopped_by = agreement.after_step(stop.name)  # asked once: signals come at any line below
      last = step == total or bool(stopped_by)
      if step % cfg.train.log_every == 0 or step == total:
        line = {'step': step, **loop.host_metrics(report.metrics), **timer.report()}
        writer.write(line)
        say(metric_log.format_line(line))
        bar.set_postfix(loss=f'{line["loss"]:.3f}', refresh=False)
        check_finite(cfg, step, report.metrics)
      with timer.paused():
        every = cfg.train.routing_every
        if cfg.model.is_moe and (step == total or every and step % every == 0):
          write_routing(cfg, workdir, report)
        if cfg.train.eval_every and step % cfg.train.eval_every == 0 and step < total:
          evaluate_midway(cfg, step, state.variables, corpus, mesh, writer, say)
      if last or checkpointer.is_due(step):
        check_finite(cfg, step, report.metrics)
        jax.block_until_ready(state)  # the steps in flight are training, what follows is not
        with timer.saving():
          checkpointer.save(step, state, meta(cfg, corpus), force=last)
      if stopped_by:
        break
  writer.close()
  batches.close()
  checkpointer.wait()
  return state, stopped_by if int(state.step) < total else ''


def step_timer(cfg: schema.Config, first: bool = True) -> step_timer_lib.StepTimer:
  """The clock of the first process; the others' is never looked at, so it measures no peak."""
  peak = math.inf
  if first:
    peak = peak_flops.matmul_peak(cfg.model.dtype, cache.root(cfg.data.cache_dir))
  return step_timer_lib.StepTimer(flops.train_flops_per_token(cfg.model), peak)


def drop_routing_after(workdir: pathlib.Path, step: int):
  """Removes routing figures of steps that will come again."""
  for path in (workdir / 'routing').glob('*.npz'):
    if path.stem.isdigit() and int(path.stem) > step:
      path.unlink()


def write_routing(cfg: schema.Config, workdir: pathlib.Path, report: loop.StepReport):
  """Writes the routing figures of a step to `routing/<step>.npz`."""
  figures = evaluate.routing_figures(cfg.model, report.state.variables, report.metrics.stats)
  if agreement_lib.is_first():
    routing_figures.write(workdir / 'routing' / f'{report.step}.npz', figures)


def evaluate_midway(
  cfg: schema.Config,
  step: int,
  variables: Any,
  corpus: corpus_lib.Corpus,
  mesh: jax.sharding.Mesh,
  writer: metric_log.MetricWriter,
  say: trained_run.Say,
):
  """Writes and says the held-out figures of a run that goes on."""
  figures = evaluate.evaluate(cfg, variables, corpus, mesh)
  scalars = {'heldout_loss': figures.loss, 'heldout_bits_per_byte': figures.bits_per_byte}
  writer.write_scalars(step, scalars)
  say(f'step={step} ' + ' '.join(f'{k}={v:.4f}' for k, v in scalars.items()))


def check_finite(cfg: schema.Config, step: int, step_metrics: optimizer_step.StepMetrics):
  """Stops a diverged run before its state is saved over a good one.

  Raises:
    errors.InputError: loss or gradient norm is not a number.
  """
  loss, norm = float(step_metrics.loss), float(step_metrics.grad_norm)
  if not (math.isfinite(loss) and math.isfinite(norm)):
    raise errors.InputError(
      f'loss {loss} and gradient norm {norm} at step {step}: training diverged with '
      f'config.optim.peak_lr={cfg.optim.peak_lr} and clip_norm={cfg.optim.clip_norm}; lower the '
      'rate or lengthen config.optim.warmup_steps, and start in a new --workdir'
    )
