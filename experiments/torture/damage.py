"""Damage to every file of a checkpoint, for every reader: noticed or harmless, never silent.

One step is damaged at a time: a byte flipped at the beginning, in the middle, at the end or
anywhere in a file, the file cut in half, emptied, filled with zeros, made longer or deleted. Each
reader then reads the workdir as its command does. Noticed: one line of an error. Harmless: what is
read is bit by bit what was written. Silent: anything else is read. A traceback in place of a line
is counted apart, as broken as silence.
"""

import collections
import dataclasses
import hashlib
import logging
import pathlib
import random
import shutil
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

import moe_jax
from configs import smoke
from moe_jax import errors
from moe_jax.analysis import assignments, interventions
from moe_jax.analysis.probes import probe_types, report
from moe_jax.checkpoints import checkpointer as checkpointer_lib
from moe_jax.config import parse, schema
from moe_jax.interop import huggingface
from moe_jax.runs import checks, first_state, train_run, trained_run, upcycle_run
from moe_jax.training import evaluate, train_state

PLACES = {'first byte': 0.0, 'middle byte': 0.5, 'last byte': 1.0}  # shares of a file
DAMAGES = (*PLACES, 'half', 'empty', 'zeros', 'longer', 'deleted')
PROBES, ANALYSED_TOKENS = ('expert_weights', 'coactivation', 'confidence'), 256
OUTCOMES = ('noticed', 'harmless', 'silent', 'traceback')


def config(cache: pathlib.Path, **overrides) -> schema.Config:
  """A tiny run of a few steps."""
  page = smoke.get_config(overrides.pop('variant', ''))
  values = {
    'data.cache_dir': str(cache),
    'data.synthetic_documents': 40,
    'model.max_seq_len': 32,
    'model.num_layers': 2,
    'optim.warmup_steps': 0,
    'train.num_steps': 2,
    'train.batch_size': 8,
    'train.sample_prompt': '',
    'checkpoint.save_every': 1,
    'checkpoint.keep_last': 1,
  }
  page.update_from_flattened_dict(values | overrides)
  return parse.from_dict(page.to_dict())


def digest(tree) -> str:
  """Of every array of a tree, bit by bit."""
  found = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    found.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
  return found.hexdigest()


def readers(cfg: schema.Config, workdir: pathlib.Path, scratch: pathlib.Path) -> dict:
  """Command -> what it reads of a workdir, as a digest."""
  mesh_cfg, mesh = trained_run.on_devices_here(cfg)
  corpus = checks.prepare(cfg)[1]

  def train() -> str:
    with checkpointer_lib.Checkpointer(workdir / 'checkpoints', cfg.checkpoint) as reader:
      reader.read_meta()
      return digest(reader.restore(train_state.abstract_state(mesh_cfg, mesh)).state)

  def loaded() -> trained_run.Run:
    run = trained_run.load(workdir)
    trained_run.encode_prompt(run, 'def ')
    return run

  def evaluated() -> str:
    run = loaded()
    corpus = trained_run.heldout_corpus(run, workdir, warn=lambda line: None)
    found = evaluate.evaluate(run.cfg, run.variables, corpus, run.mesh)
    return f'{found.loss!r} {digest(run.variables)}'

  def analysed() -> str:
    # As `analyze_experts` does, on a little text, with a probe of the weights and two of choices.
    assignments.check(trained_run.read_config(workdir).model)
    run = loaded()
    corpus = trained_run.heldout_corpus(run, workdir, warn=lambda line: None)
    subject = interventions.Subject(run.cfg, run.variables, corpus, run.mesh)
    context = probe_types.Context(subject, ANALYSED_TOKENS, step=run.step)
    found, skipped = report.run(context, PROBES)
    return digest(({k: dict(one.arrays) for k, one in found.items()}, sorted(skipped)))

  def opened() -> str:
    run = moe_jax.load(workdir)
    routing, found = run.routing('def f(x):'), run.evaluate(progress=False)
    return digest((routing.experts, routing.gates, found.loss, found.routing, run.variables))

  def convert() -> str:
    target = scratch / 'exported'
    shutil.rmtree(target, ignore_errors=True)
    huggingface.export_checkpoint(workdir, target, say=lambda line: None)
    return repr([(p.name, _hash(p)) for p in sorted(target.iterdir())])

  def init_from() -> str:
    # As a new run's check and its first state do.
    new = dataclasses.replace(mesh_cfg, init_from=str(workdir))
    return digest(
      first_state.make(new, first_state.of_run(new), mesh, corpus, lambda line: None).params
    )

  return {
    'train': train,
    'generate': lambda: digest(loaded().variables),
    'evaluate': evaluated,
    'analyse': analysed,
    'moe_jax.load': opened,
    'convert': convert,
    'init_from': init_from,
  }


def upcycle_reader(cfg: schema.Config, dense: pathlib.Path, scratch: pathlib.Path) -> Callable:
  """What upcycling makes of a dense run's workdir, as a digest."""
  mesh = trained_run.on_devices_here(cfg)[1]

  def upcycled() -> str:
    target = scratch / 'upcycled'
    shutil.rmtree(target, ignore_errors=True)
    upcycle_run.create(dense, None, cfg, target, say=lambda line: None)
    with trained_run.reader(target) as reader:
      return digest(reader.restore(train_state.abstract_state(cfg, mesh)).state)

  return upcycled


def _hash(path: pathlib.Path) -> str:
  return hashlib.sha256(path.read_bytes()).hexdigest()


def harm(path: pathlib.Path, how: str):
  """Damages a file in one of the ways of DAMAGES, or at 'byte at SHARE' of its length."""
  data = bytearray(path.read_bytes())
  if how == 'deleted':
    path.unlink()
  elif how in ('half', 'empty'):
    path.write_bytes(data[: len(data) // 2 if how == 'half' else 0])
  elif how in ('zeros', 'longer'):
    path.write_bytes(bytes(len(data)) if how == 'zeros' else data + b'\0' * 7)
  elif data:
    share = PLACES[how] if how in PLACES else float(how.removeprefix('byte at '))
    data[round(share * (len(data) - 1))] ^= 1
    path.write_bytes(data)


def cases(
  files: Sequence[pathlib.Path], rng: random.Random, most: int
) -> list[tuple[pathlib.Path, str]]:
  """`most` damages as (file, how): every file once, then once more, in other ways each time.

  A file that has had all of DAMAGES goes on with bytes flipped at random places.
  """
  rounds = -(-most // len(files))
  places = [f'byte at {rng.random():.6f}' for _ in range(max(rounds - len(DAMAGES), 0))]
  ways = {file: rng.sample(DAMAGES, len(DAMAGES)) + places for file in files}
  return [(file, ways[file][i]) for i in range(rounds) for file in files][:most]


def judge(read: Callable[[], str], want: str) -> tuple[str, str]:
  """(outcome, why) of one reader on what has been damaged."""
  try:
    return ('harmless', '') if read() == want else ('silent', 'other arrays')
  except errors.InputError as error:
    return ('noticed', '') if '\n' not in str(error) else ('traceback', str(error)[:200])
  except Exception as error:  # what a user would see as a traceback is what is counted
    return 'traceback', f'{type(error).__name__}: {error}'[:200]


def run(workdir: pathlib.Path, stop: float, seed: int, most: int) -> dict:
  """Damages `most` files, drawn by `seed`, until the time is over.

  Args:
    workdir: scratch; emptied.
    stop: of `time.monotonic`.
    seed: decides files and damages.
    most: damages, each read by every reader.

  Returns:
    counts by reader and outcome, files damaged and in all by subject, and the broken promises.
  """
  shutil.rmtree(workdir, ignore_errors=True)
  cfg = config(workdir / 'cache')
  dense_cfg = config(workdir / 'cache', variant='dense')
  for one, name in ((cfg, 'moe'), (dense_cfg, 'dense')):
    train_run.run_training(one, workdir / name, say=lambda line: None)
  subjects = {'moe': readers(cfg, workdir / 'moe', workdir)}
  tokenizer = str(workdir / 'dense/tokenizer.json')
  # 4 slices of the dense FFN, one of them shared: copies of the other 3.
  upcycled = config(workdir / 'cache', **{'data.tokenizer': tokenizer, 'model.moe.num_experts': 6})
  subjects['dense'] = {'upcycle': upcycle_reader(upcycled, workdir / 'dense', workdir)}
  counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
  broken, files = [], {}
  logging.disable(logging.CRITICAL)  # of damage that is noticed there are many lines
  try:
    for name, reads in subjects.items():
      share = most if name == 'moe' else most // 4  # upcycling compiles
      deadline = stop if name == 'dense' else stop - 0.2 * (stop - time.monotonic())
      rng = random.Random(seed)
      files[name], found = _damage_all(workdir / name, reads, rng, share, deadline, counts)
      broken += found
  finally:
    logging.disable(logging.NOTSET)
  print(table(counts))
  print(
    '; '.join(f'{hit} of {total} files of a {name} step' for name, (hit, total) in files.items())
  )
  by_reader = {k: dict(v) for k, v in counts.items()}
  return {'by_reader': by_reader, 'files': files, 'broken': broken}


def _damage_all(
  workdir, reads, rng, most: int, stop: float, counts
) -> tuple[tuple[int, int], list[str]]:
  """Damages files of a workdir's only step one after the other; each is mended again.

  Returns:
    ((files that were damaged, files in all), broken promises).
  """
  whole = workdir.with_name(f'{workdir.name}-whole')
  shutil.copytree(workdir / 'checkpoints', whole)
  wanted = {name: read() for name, read in reads.items()}
  files = sorted(p.relative_to(whole) for p in whole.rglob('*') if p.is_file())
  broken, hit = [], set()
  for path, how in cases(files, rng, most):
    if time.monotonic() > stop:
      break
    hit.add(path)
    for name, read in reads.items():
      harm(workdir / 'checkpoints' / path, how)
      outcome, why = judge(read, wanted[name])
      counts[name][outcome] += 1
      if outcome in ('silent', 'traceback'):
        broken.append(f'{name}: {how} of {path}: {outcome}: {why}')
      shutil.rmtree(workdir / 'checkpoints')  # a reader may have moved it aside
      shutil.copytree(whole, workdir / 'checkpoints')
  return (len(hit), len(files)), broken


def table(counts: dict[str, collections.Counter]) -> str:
  """Outcomes by reader."""
  lines = ['| reader | ' + ' | '.join(OUTCOMES) + ' |', '|---|' + '---:|' * len(OUTCOMES)]
  for name, count in counts.items():
    lines.append(f'| {name} | ' + ' | '.join(str(count[o]) for o in OUTCOMES) + ' |')
  return '\n'.join(lines)
