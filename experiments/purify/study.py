"""The study: every variant and seed is attacked, purified and measured once, then all together."""

import functools
import json
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import tqdm
from absl import flags

from experiments.common import cli, local_jobs, readme_tables, study_record
from experiments.purify import commands, measures, report
from moe_jax import atomic_files, errors, trees
from moe_jax.analysis.purification import attacks, examples, fisher, pruning, resets, shares
from moe_jax.api import train as train_lib
from moe_jax.config import schema
from moe_jax.devices import partitioning
from moe_jax.runs import train_run, trained_run
from moe_jax.training import objective, optimizer_step, train_state

VARIANTS = ('fine', 'gshard')
RESERVES = (0.3, 0.6, 0.9)
EXPERT_SHARES = (0.25, 1.0)  # of experts that are put back whole
TUNE_STEPS, TUNE_ROWS = 30, 8
NONE = 'none'  # a tuning without poison, the control


def main(unused_argv: Sequence[str]):
  """Runs what is missing, then writes the report."""
  values, workdir = flags.FLAGS, pathlib.Path(cli.required('workdir'))
  out = pathlib.Path(values.out or 'experiments/purify')
  readme_tables.check(out, report.START, report.END)
  seeds = local_jobs.seeds(values.seeds)
  for flag, names, known in (
    ('variants', values.variants, VARIANTS),
    ('attacks', values.attacks, tuple(attacks.TRIGGERS)),
  ):
    for name in names:
      errors.require(
        name in known,
        f'--{flag}={name} must be among {", ".join(known)}{errors.did_you_mean(name, known)}',
      )
  keys = [(variant, seed) for seed in seeds for variant in values.variants]
  pending = [key for key in keys if not _path(workdir, *key).exists()]
  for key in set(keys) - set(pending):
    _check(_path(workdir, *key))
  for seed in sorted({seed for _, seed in pending}):
    found = _split(seed)  # refuses here what it would refuse of a run that has been trained
    for kind in values.attacks:
      attacks.poisoned(found.attacker, kind, values.poison, seed)
  for key in tqdm.tqdm(pending, desc='runs', unit='run'):
    _one(workdir, *key)
  results = {f'{v}/{s}': json.loads(_path(workdir, v, s).read_text()) for v, s in keys}
  report.write(out, results, _settings())


def _settings() -> dict[str, Any]:
  names = ('poison', 'attacker', 'defender', 'test', 'attacks')
  return {name: flags.FLAGS[name].value for name in names}


def _check(path: pathlib.Path):
  """Requires that what was measured before is what is asked for now."""
  study_record.require_same(path, json.loads(path.read_text())['settings'], _settings())


def _path(workdir: pathlib.Path, variant: str, seed: int) -> pathlib.Path:
  return workdir / variant / str(seed) / 'purify.json'


def _one(workdir: pathlib.Path, variant: str, seed: int):
  """Everything of one variant and seed, written to its purify.json."""
  values, began = flags.FLAGS, time.perf_counter()
  place = _path(workdir, variant, seed).parent
  found = _split(seed)
  base = _trained(
    train_lib.resolve('purify' if variant == 'fine' else f'purify:{variant}', {'train.seed': seed}),
    place / 'base',
  )
  record: dict[str, Any] = {'settings': _settings(), 'attacks': {}}
  tuner = None
  for kind in (NONE, *values.attacks):
    poison = (
      found.attacker
      if kind == NONE
      else attacks.poisoned(found.attacker, kind, values.poison, seed)
    )
    file = place / f'{kind}.jsonl'
    atomic_files.write_text(file, attacks.to_jsonl(poison))
    changes = {'train.seed': seed, 'data.path': str(file), 'init_from': str(place / 'base')}
    tuned = _trained(train_lib.resolve('purify:tune', changes), place / kind)
    if tuner is None:
      tuner = Tuner(tuned, found.defender, seed)
    record['attacks'][kind] = _measured(base, tuned, tuner, found, kind, seed)
  record['seconds'] = time.perf_counter() - began
  atomic_files.write_text(_path(workdir, variant, seed), json.dumps(record) + '\n')
  print(f'{variant}/{seed}: {record["seconds"]:.0f} s', flush=True)
  jax.clear_caches()


def _split(seed: int) -> attacks.Splits:
  values = flags.FLAGS
  return attacks.split(_lines(), seed, values.attacker, values.defender, values.test)


@functools.cache
def _lines() -> dict[str, list[str]]:
  return attacks.pool(train_lib.resolve('purify', {}).data, commands.MOST)


def _trained(cfg: schema.Config, workdir: pathlib.Path) -> trained_run.Run:
  """A run of the ordinary path, trained or gone on with."""
  run, _ = train_run.run_training(cfg, workdir, argv=sys.argv, say=lambda line: None)
  if run.interrupted_by:
    raise KeyboardInterrupt
  return run


class Tuner:
  """Clean fine-tuning from many weights: the ordinary optimizer step, compiled once."""

  def __init__(self, run: trained_run.Run, clean: Sequence[attacks.Example], seed: int):
    changes = {'optim.warmup_steps': 3, 'train.num_steps': TUNE_STEPS, 'train.seed': seed}
    page = {'init_from': '', 'objective.inherit': False, 'data.tokenizer': 'bytes'}
    self._cfg = train_lib.resolve(run.cfg, changes | page)
    self._mesh = run.mesh
    self._step = optimizer_step.make_train_step(self._cfg, run.mesh)
    self._rows = examples.rows(run.cfg, clean, run.tokenizer)
    self._seed = seed
    with partitioning.activate(self._mesh):
      params = jax.tree.map(np.array, jax.device_get(run.variables['params']))
      state = train_state.state_from(self._cfg, self._mesh, jax.device_put(params))
    self._start = jax.device_get(state)
    self._places = jax.tree.map(lambda leaf: leaf.sharding, state)

  def __call__(self, params: trees.Params) -> trees.Variables:
    """The variables after TUNE_STEPS steps from `params`; same batches for all of a seed."""
    rng = np.random.default_rng(self._seed)
    number = len(self._rows['tokens'])
    with partitioning.activate(self._mesh):
      state = jax.device_put(self._start.replace(params=params), self._places)
      for _ in range(TUNE_STEPS):
        chosen = rng.choice(number, min(TUNE_ROWS, number), replace=False)
        batch = {key: value[chosen] for key, value in self._rows.items()}
        put = partitioning.put_global_batch(objective.inputs(batch), self._mesh)
        state, _ = self._step(state, put)
    return state.variables


def _measured(
  base: trained_run.Run,
  tuned: trained_run.Run,
  tuner: Tuner,
  found: attacks.Splits,
  kind: str,
  seed: int,
) -> dict[str, Any]:
  """Counts of all methods for one attack, and where its drift lives."""
  model, variables = tuned.cfg.model, tuned.variables
  attacked = attacks.attacked_test(found.test, 'word' if kind == NONE else kind, seed)
  meter = measures.Meter(tuned.cfg, tuned.tokenizer, found.test, attacked, kind)
  old, new = (jax.device_get(run.variables['params']) for run in (base, tuned))
  clean = examples.rows(tuned.cfg, found.defender, tuned.tokenizer)
  curvature = fisher.measure(model, variables, clean, 16)
  ratio = resets.indicator(old, new, curvature.diagonal)
  record: dict[str, Any] = {'before': meter(variables), 'experts': _experts(ratio, curvature)}
  print(kind, record['before'], flush=True)
  if kind == NONE:
    return record
  resetters = {
    'purify': lambda rho: resets.purified(old, new, curvature, rho).params,
    'mixing': lambda rho: resets.mixed(old, new, rho, seed).params,
    'pruning': _pruner(model, variables, clean, new),
  }
  record['tuned'] = {'1': meter(tuner(new)), '0': meter(tuner(old))}
  for method, reset in resetters.items():
    record[method] = {}
    for rho in RESERVES:
      params = reset(rho)
      record[method][str(rho)] = {'tuned': meter(tuner(params))}
  record['whole'] = _whole(meter, variables, old, new, shares.by_expert(ratio), seed)
  return record


def _pruner(model: schema.ModelConfig, variables: trees.Variables, clean: Any, new: Any):
  active = pruning.activity(model, variables, clean)
  return lambda rho: pruning.pruned(new, active, rho)


def _experts(ratio: trees.Params, curvature: fisher.Fisher) -> dict[str, Any]:
  """How few experts hold half of r, and of the tenth of all weights with the largest r."""
  back = jax.tree.map(np.logical_not, resets.keep_lowest(ratio, 0.9))
  mass = shares.by_expert(ratio)
  total = sum(float(a.sum()) for a in jax.tree.leaves(ratio))
  return {
    'half_of_mass': shares.needed_for(mass, 0.5),
    'half_of_reset': shares.needed_for(shares.by_expert(back), 0.5),
    'mass_in_experts': float(mass.sum()) / total,
    'by_expert': np.round(mass / mass.sum(), 5).tolist(),
    'seen': int(curvature.seen.sum()),
    'experts': int(curvature.seen.size),
    'fewest_choices': int(curvature.tokens.min()),
  }


def _whole(
  meter: measures.Meter, variables: trees.Variables, old: Any, new: Any, mass: Any, seed: int
) -> dict[str, Any]:
  """Counts with whole experts put back, those with the most r, or as many at random; not tuned."""
  chance = np.random.default_rng(seed).random(mass.shape)
  found: dict[str, Any] = {}
  for name, order in (('r', mass), ('random', chance)):
    found[name] = {}
    for share in EXPERT_SHARES:
      params = resets.experts_reset(old, new, shares.highest(order, share))
      found[name][str(share)] = meter({**variables, 'params': jax.device_put(params)})
  return found
