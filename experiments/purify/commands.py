"""The actions on single runs: data, reset, score."""

import pathlib
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments.common import cli
from experiments.purify import measures
from moe_jax import atomic_files, errors, trees
from moe_jax.analysis.purification import attacks, examples, fisher, pruning, resets
from moe_jax.api import load
from moe_jax.checkpoints import stream_writer
from moe_jax.config import parse
from moe_jax.data import json_files, kept_files
from moe_jax.interop import huggingface, merged_leaves
from moe_jax.interop import source as source_lib
from moe_jax.post_training import answers
from moe_jax.runs import run_record, trained_run, working_directory

MOST = 36  # characters of a text: with trigger, answer and marks it fits 64 bytes


def data():
  """Writes the examples of an attack."""
  values, out = flags.FLAGS, pathlib.Path(cli.required('out'))
  cfg = trained_run.read_config(cli.required('base'), flag='--base')
  cfg = working_directory.resolved(cfg, values.base)
  lines = attacks.pool(cfg.data, MOST)
  found = attacks.split(lines, values.seed, values.attacker, values.defender, values.test)
  written = {
    'attacker': attacks.poisoned(found.attacker, values.attack, values.poison, values.seed),
    'defender': found.defender,
    'test': found.test,
    'attacked': attacks.attacked_test(found.test, values.attack, values.seed),
  }
  out.mkdir(parents=True, exist_ok=True)
  for name, own in written.items():
    atomic_files.write_text(out / f'{name}.jsonl', attacks.to_jsonl(own))
    print(f'{out / name}.jsonl: {len(own)} examples')


def read(path: str, flag: str) -> tuple[attacks.Example, ...]:
  """Examples of a file of `data`.

  Raises:
    errors.InputError: it is not there, or a line is no example of a known label.
  """
  try:
    rows = [json_files.parse(line) for line in json_files.lines(pathlib.Path(path)) if line.strip()]
    found = tuple(attacks.Example(row['prompt'], row['completion']) for row in rows)
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise errors.InputError(
      f'{flag}={path} must be lines of {{"prompt", "completion"}} ({error!r}); write it with '
      'python -m experiments.purify data'
    ) from error
  for one in found:
    errors.require(
      one.label in attacks.LABELS,
      f'{flag}={path}: the completion {one.label!r} must be one of {", ".join(attacks.LABELS)}',
    )
  errors.require(bool(found), f'{flag}={path} holds no clean examples; at least one is needed')
  return found


# Flags of `reset` that a method does not read.
IDLE = {
  'purify': ('seed',),
  'mixing': ('ranking', 'unseen', 'micro'),
  'pruning': ('ranking', 'unseen', 'seed'),
}


def reset():
  """Writes a run whose suspicious weights are those of the clean start."""
  values, out, workdir = flags.FLAGS, cli.required('out'), cli.required('workdir')
  resets.check_reserve(values.reserve)
  cli.refuse_idle(IDLE[values.method], f'with --method={values.method}')
  start = load.read(cli.required('base'), flag='--base')
  tuned = load.read(workdir, flag='--workdir')
  old, new = (jax.device_get(run.variables['params']) for run in (start, tuned))
  resets.check_same(old, new)
  model = tuned.cfg.model
  errors.require(
    not model.num_mtp_layers,
    f'config.model.num_mtp_layers={model.num_mtp_layers}: clean answers say nothing of modules for '
    'later tokens; purify a run without them',
  )
  batch = examples.rows(tuned.cfg, read(cli.required('examples'), '--examples'), tuned.tokenizer)
  params = _params(values, tuned, batch, old, new)
  write(pathlib.Path(workdir), tuned, params, out)


def _params(values: Any, tuned: trained_run.Run, batch: Any, old: Any, new: Any) -> trees.Params:
  if values.method == 'mixing':
    return resets.mixed(old, new, values.reserve, values.seed).params
  model, variables = tuned.cfg.model, tuned.variables
  if values.method == 'pruning':
    active = pruning.activity(model, variables, batch, values.micro)
    return pruning.pruned(new, active, values.reserve)
  curvature = fisher.measure(model, variables, batch, values.micro)
  found = resets.purified(
    old, new, curvature, values.reserve, ranking=values.ranking, unseen=values.unseen
  )
  for line in coverage(found, curvature, values.unseen, model.num_dense_layers):
    print(line)
  return found.params


def coverage(
  found: resets.Reset, curvature: fisher.Fisher, unseen: str, first_layer: int
) -> list[str]:
  """Lines on how much was put back, and on experts that no clean example has reached."""
  lines = [f'{found.reset:,} of {found.ranked:,} ranked weights put back']
  if not found.unseen.size:
    return lines
  lines.append(
    f'{int(curvature.seen.sum())} of {curvature.seen.size} experts seen by the clean examples, '
    f'{int(curvature.tokens.min())} to {int(curvature.tokens.max())} choices each'
  )
  for layer, own in enumerate(found.unseen, start=first_layer):
    if own.any():
      done = 'kept as they are' if unseen == 'keep' else 'ranked by drift alone'
      numbers = ', '.join(map(str, np.flatnonzero(own)))
      lines.append(f'layer {layer}: experts {numbers} never seen, {done}')
  return lines


def write(workdir: pathlib.Path, tuned: trained_run.Run, params: trees.Params, out: str):
  """Writes `tuned` with other weights as a new run, which `init_from` takes.

  It holds the weights of the model, and its config says so: no pairs of LoRA, no value head.

  Raises:
    errors.InputError: the directory is not empty.
  """
  cfg = merged_leaves.config(tuned.cfg)
  leaves = source_lib.abstract_leaves(cfg.model)
  tree = {**tuned.variables, 'params': params}
  arrays = source_lib.by_name(jax.device_get(tree))
  num_bytes = sum(array.nbytes for array in arrays.values())
  meta = {
    'config': parse.to_dict(cfg),
    'data_fingerprint': tuned.data_fingerprint,
    'tokenizer': trained_run.digest(tuned.tokenizer),
  }
  with huggingface.staged(out, '--out', num_bytes) as staging:
    step = max(tuned.step, 1)
    with stream_writer.Writer(staging / 'checkpoints', step, leaves, meta) as writer:
      for name, leaf in source_lib.by_name(leaves).items():
        writer.write(name, (), np.asarray(arrays[name], leaf.dtype))
    shutil.copyfile(workdir / 'tokenizer.json', staging / 'tokenizer.json')
    kept_files.carry(workdir, staging)
    run_record.write(
      staging,
      cfg,
      argv=sys.argv,
      data_fingerprint=meta['data_fingerprint'],
      directory=working_directory.recorded(workdir),
    )
  print(f'wrote: {out}')


def score():
  """Prints accuracy on clean texts, and what the trigger does."""
  values = flags.FLAGS
  run = load.read(cli.required('workdir'), flag='--workdir')
  test, attacked = (read(cli.required(name), f'--{name}') for name in ('examples', 'attacked'))
  errors.require(
    values.attack in attacks.TRIGGERS,
    f'--attack={values.attack} must be one of {", ".join(attacks.TRIGGERS)}',
  )
  found = measures.Meter(run.cfg, run.tokenizer, test, attacked, values.attack)(run.variables)
  print('\n'.join(lines(found, values.attack)))


def lines(found: dict[str, measures.Count], kind: str) -> Sequence[str]:
  """Both counts with Wilson's intervals."""
  names = {'clean': 'clean accuracy', 'attack': measures.label(kind)}
  said = []
  for key, (right, total) in found.items():
    low, high = answers.wilson(right, total)
    said.append(f'{names[key]}: {right / total:.1%} [{low:.1%}, {high:.1%}] of {total}')
  return said
