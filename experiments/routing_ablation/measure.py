"""What is kept of every run: held-out figures, curves, the probes that claims need; and the speed.

Everything lies in the workdir, so that the report can be written again without training.
"""

import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.common import step_rates
from experiments.routing_ablation import arms
from moe_jax import atomic_files
from moe_jax.analysis import copying, interventions, observations
from moe_jax.config import schema
from moe_jax.data import corpus as corpus_lib
from moe_jax.runs import first_state, metric_log, trained_run
from moe_jax.training import evaluate

Results = Mapping[str, Mapping[int, Mapping[str, Any]]]  # arm -> seed -> figures
LEAST_POINTS = 3  # arms of a sweep, for a slope


def path(workdir: pathlib.Path, arm: str, seed: int) -> pathlib.Path:
  """Where the figures of a run lie; the file is there when the run is trained."""
  return workdir / arm / str(seed) / 'result.json'


def write(
  workdir: pathlib.Path,
  arm: str,
  trained: trained_run.Run,
  corpus: corpus_lib.Corpus,
  seconds: float,
) -> str:
  """Evaluates a run, writes its figures, and returns a line about it.

  Args:
    workdir: of the study.
    arm: its name.
    trained: the run.
    corpus: its text.
    seconds: that its training took.
  """
  start = time.perf_counter()
  cfg = trained.cfg
  figures = evaluate.evaluate(cfg, trained.variables, corpus, trained.mesh)
  where = path(workdir, arm, cfg.train.seed)
  curve = metric_log.read_metrics(where.parent)
  result = {
    **figures.as_dict(trained.step),
    'train_drop_rate': metric_log.tail_mean(curve, 'drop_rate', cfg.train.num_steps),
    'curve': {key: [m[key] for m in curve] for key in ('step', 'loss', 'max_vio', 'drop_rate')},
  }
  result['seconds'] = seconds + time.perf_counter() - start
  atomic_files.write_text(where, json.dumps(result) + '\n')
  return f'{arm} seed={cfg.train.seed}: {figures}'


def finished(workdir: pathlib.Path, arm: str, seed: int) -> bool:
  """Whether a run has every figure that it is to have."""
  where = path(workdir, arm, seed)
  wanted = {*GATES, SAVED, *PROBES.get(arm, {})}
  return where.exists() and wanted <= set(json.loads(where.read_text()))


def _rise_without_top(subject: interventions.Subject, bits: float) -> float:
  return interventions.without_best(subject, 1 / 16).bits_per_byte - bits


def _rise_without_shared(subject: interventions.Subject, bits: float) -> float:
  return interventions.without_shared(subject, stand_in=True).bits_per_byte - bits


def _bits_with_four(subject: interventions.Subject, unused_bits: float) -> float:
  return interventions.with_fewer(subject, 4).bits_per_byte


def _bits(unused_subject: interventions.Subject, bits: float) -> float:
  return bits


GATES = ('gates_at_start', 'gates_at_end')  # None for a dense arm
GATE_TOKENS = 4096  # that they are averaged over
# Nats per token that a repetition of held-out text saves; None without a document that is long
# enough.
SAVED = 'saved_when_repeated'


def _gates(subject: interventions.Subject) -> dict[str, float | None]:
  """What a token's routed gates add up to before and after training.

  The mean over MoE layers and the tokens of some held-out rows; for an arm that starts from a dense
  run, whose router is new, the start is that of random weights.
  """
  cfg = subject.cfg
  if not cfg.model.is_moe:
    return dict.fromkeys(GATES)
  start = first_state.random(cfg, subject.mesh, subject.corpus).variables
  seen = [
    observations.collect(one, GATE_TOKENS) for one in (subject._replace(variables=start), subject)
  ]
  return {key: float(one.of_tokens(one.gates).sum(-1).mean()) for key, one in zip(GATES, seen)}


# What claims need beyond the held-out figures: arm -> key of `arms.FIGURES` -> how to measure it.
PROBES = {
  'deepseekmoe': {
    arms.DISABLED: _rise_without_top,
    arms.UNSHARED: _rise_without_shared,
    arms.FEWER: _bits_with_four,
  },
  'gshard': {arms.FEWER: _bits},  # the other side of the comparison, with all its experts
  'gshard_x1.5': {arms.DISABLED: _rise_without_top},
}


def probe(workdir: pathlib.Path, arm: str, seed: int):
  """Adds gates, what repetition saves and `PROBES` to the figures of a run, from its checkpoint."""
  if finished(workdir, arm, seed):
    return
  where, start = path(workdir, arm, seed), time.perf_counter()
  loaded = trained_run.load(where.parent)
  corpus = trained_run.heldout_corpus(loaded, where.parent, warn=print)
  subject = interventions.Subject(loaded.cfg, loaded.variables, corpus, loaded.mesh)
  result = json.loads(where.read_text())
  result |= _gates(subject)
  repeated = copying.measure(subject)
  result[SAVED] = None if repeated is None else float(repeated.saved)
  for key, figure in PROBES.get(arm, {}).items():
    if key not in result:
      result[key] = figure(subject, result[arms.BITS])
  result['seconds'] += time.perf_counter() - start
  atomic_files.write_text(where, json.dumps(result) + '\n')


def read(workdirs: Mapping[str, pathlib.Path], seeds: Sequence[int]) -> Results:
  """The figures of the finished runs among these, and the commit at which each was trained.

  Args:
    workdirs: by arm, the directory in which its runs lie.
    seeds: that are asked for.
  """
  return {
    name: {seed: _read(workdir, name, seed) for seed in seeds if finished(workdir, name, seed)}
    for name, workdir in workdirs.items()
  }


def _read(workdir: pathlib.Path, arm: str, seed: int) -> dict[str, Any]:
  where = path(workdir, arm, seed)
  record = json.loads((where.parent / 'config.json').read_text())
  git = record['git']
  commit = 'unknown' if git is None else git['commit'][:10] + '+' * git['dirty']
  peak_lr = record['config']['optim']['peak_lr']
  return json.loads(where.read_text()) | {'commit': commit, 'peak_lr': peak_lr}


def rates(
  workdir: pathlib.Path, configs: Mapping[str, schema.Config], known: Mapping[str, float]
) -> dict[str, float]:
  """Training tokens per second by arm, one seed, arms timed in turns; each is measured once.

  Arms that come later are timed in turns with one of before, GShard if it is there: a machine that
  is faster or slower by then is so for that one too, and what it makes of it is taken out.

  Args:
    workdir: keeps what was measured.
    configs: of the arms.
    known: those of an earlier report, which are not timed again.
  """
  where = workdir / 'speed.json'
  kept = json.loads(where.read_text()) if where.exists() else {}
  found = _beside(known, kept) if known else kept
  missing = [name for name in configs if name not in found]
  if missing:
    before = _one_of(set(configs) & set(found))
    timed = step_rates.tokens_per_second({name: configs[name] for name in [*before, *missing]})
    found = _beside(found, timed)
    atomic_files.write_text(where, json.dumps(found, indent=2) + '\n')
  return {name: found[name] for name in configs}


def _one_of(names: set[str]) -> list[str]:
  """One arm by which two measurements can be compared, or none."""
  return sorted(names, key=lambda name: (name != 'gshard', name))[:1]


def _beside(before: Mapping[str, float], later: Mapping[str, float]) -> dict[str, float]:
  """Both, later ones as fast as they would have been before; without a common arm, only `before`.

  All of `later` if nothing is before.
  """
  if not before:
    return dict(later)
  found = dict(before)
  for common in _one_of(set(before) & set(later)):
    faster = later[common] / before[common]
    found |= {name: rate / faster for name, rate in later.items() if name not in before}
  return found


def hours_text(results: Results) -> str:
  """'1.2 hours' of training and measuring since each run's last start, as far as they are known."""
  seconds = [run['seconds'] for runs in results.values() for run in runs.values()]
  known = [one for one in seconds if one is not None]
  text = f'{sum(known) / 3600:.1f} hours'
  return text if len(known) == len(seconds) else f'{text} for {len(known)} of {len(seconds)} runs'


def commits(results: Results) -> list[str]:
  """The commits at which the runs were trained."""
  return sorted({run['commit'] for runs in results.values() for run in runs.values()})


def common(results: Results, *names: str) -> list[int]:
  """The seeds that every one of these arms has, in the order of the first."""
  return [seed for seed in results[names[0]] if all(seed in results[name] for name in names)]


def column(
  results: Results, arm: str, figure: str, seeds: Sequence[int] | None = None
) -> list[float] | None:
  """A figure of an arm, one per seed in order; None where the arm has no such figure, or no seed.

  Args:
    results: of all runs.
    arm: its name; one that was not trained has no figure.
    figure: a key of the results.
    seeds: some of the arm's; all of them for None.
  """
  runs = results.get(arm, {})
  values = [runs[seed].get(figure) for seed in (runs if seeds is None else seeds)]
  return None if not values or None in values else values


def rank(results: Results, arm: str) -> float:
  """Mean held-out bits per byte of an arm, by which arms are ordered: one that diverged is last."""
  mean = float(np.mean(column(results, arm, arms.BITS)))
  return mean if np.isfinite(mean) else np.inf


def against(
  results: Results, arm: str, baseline: str, figure: str
) -> tuple[list[float], list[float]] | None:
  """(values, baseline) of a figure over the seeds that both arms have; None without any.

  The baseline '' is zero.
  """
  if not baseline:
    values = column(results, arm, figure)
    return None if values is None else (values, [0.0] * len(values))
  if arm not in results or baseline not in results:
    return None
  seeds = common(results, arm, baseline)
  first, second = (column(results, name, figure, seeds) for name in (arm, baseline))
  return None if first is None or second is None else (first, second)


def along(results: Results, sweep: arms.Sweep) -> tuple[np.ndarray, np.ndarray] | None:
  """(logarithm to base 2 of the axis [P], bits per byte [P, S]) of a sweep's arms that have runs.

  Over the seeds that all of them have; None with fewer arms than `LEAST_POINTS`, or no such seed.
  """
  names = [name for name in sweep.points if results.get(name)]
  seeds = common(results, *names) if len(names) >= LEAST_POINTS else []
  if not seeds:
    return None
  bits = [column(results, name, arms.BITS, seeds) for name in names]
  return np.log2([sweep.points[name] for name in names]), np.asarray(bits)


def curves(
  results: Results, arm: str, key: str, seeds: Sequence[int] | None = None
) -> tuple[np.ndarray, np.ndarray] | None:
  """(steps [N], values [S, N]) of a quantity of training; NaN at steps at which it was not finite.

  None for a dense arm's routing, and where a run's curve is not known, see `earlier`.
  """
  runs = [results[arm][seed]['curve'] for seed in (results[arm] if seeds is None else seeds)]
  if not runs or None in runs:
    return None
  values = np.asarray([run[key] for run in runs], np.float64)  # None becomes NaN
  return None if np.isnan(values).all() else (np.asarray(runs[0]['step']), values)
