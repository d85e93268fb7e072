"""How long tracing and compiling the train step take, against depth and experts; and a cold start.

Every measurement is a process of its own, so that nothing is remembered from the one before and the
peak of host memory is known; they take turns. The persistent cache is off, but for the last case:
the time from starting the quickstart's command to its first step, on empty and on filled caches.
"""

import dataclasses
import json
import os
import pathlib
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import tqdm

from configs import base, sizes
from experiments.bench import twins
from experiments.common import harness
from moe_jax.config import parse, schema

ROOT = pathlib.Path(__file__).parents[2]
DEPTHS, EXPERTS = (6, 12, 30, 60), (8, 64, 256)
LAYERS = 6  # of the models that differ in experts
WARM_UP_LAYERS = 2
MAX_REPEATS = 3  # a round of all cases takes minutes, and spreads little
FIRST_STEP = re.compile(r'\bstep=1 ')


@dataclasses.dataclass(frozen=True)
class Case:
  """A model whose train step is compiled."""

  name: str
  variant: str
  layers: int
  experts: int
  dense: bool = False  # its dense twin in its place

  def config(self, layers: int) -> schema.Config:
    """Tiny widths: what grows with them is another question."""
    page = sizes.tiny(base.get_config())
    page.model.num_layers, page.model.moe.num_experts = layers, self.experts
    cfg = parse.from_dict(page.to_dict())
    return twins.dense_twin(cfg) if self.dense else cfg


CASES = (
  *(Case('depth, 63 experts', f'{n} layers', n, 63) for n in DEPTHS),
  *(Case('depth, dense', f'{n} layers', n, 63, dense=True) for n in DEPTHS),
  *(Case(f'experts, {LAYERS} layers', f'{e} experts', LAYERS, e) for e in EXPERTS),
)


def run(
  options: harness.Options, peaks: harness.Peaks, cases: Sequence[Case] = CASES
) -> list[harness.Result]:
  """Measures what was asked for; `peaks` do not matter here."""
  del peaks
  asked = [case for case in cases if options.wants(case.name, case.variant)]
  repeats = min(options.repeats, MAX_REPEATS)
  found: dict[Case, list[dict[str, float]]] = {case: [] for case in asked}
  order = random.Random(0)
  bar = tqdm.tqdm(total=repeats * len(asked), desc='compile', leave=False, disable=None)
  for _ in range(repeats):
    for case in order.sample(asked, len(asked)):
      found[case].append(_in_process(case))
      bar.update()
  bar.close()
  results = [_result(case, found) for case in asked]
  if options.wants('first step', 'quickstart'):
    results += first_steps(repeats)
  return results


def _in_process(case: Case) -> dict[str, float]:
  values = {
    'config': parse.to_dict(case.config(case.layers)),
    'warm_up': parse.to_dict(case.config(WARM_UP_LAYERS)),
  }
  command = [sys.executable, '-m', 'experiments.bench.compile_case']
  done = subprocess.run(
    command, input=json.dumps(values), cwd=ROOT, capture_output=True, text=True, check=False
  )
  if done.returncode:
    raise RuntimeError(f'{case} failed:\n{done.stderr[-2000:]}')
  return json.loads(done.stdout.splitlines()[-1])


def _result(case: Case, found: Mapping[Case, list[dict[str, float]]]) -> harness.Result:
  runs = found[case]
  both = [run['trace_seconds'] + run['compile_seconds'] for run in runs]
  detail = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
  first = next(other for other in found if other.name == case.name)
  firsts = [run['trace_seconds'] + run['compile_seconds'] for run in found[first]]
  detail[f'of {first.variant}'] = statistics.median(a / b for a, b in zip(both, firsts))
  detail['host_MiB'] = round(detail.pop('host_bytes') / 2**20, 1)
  return _timed(case.name, case.variant, both, detail)


def _timed(
  name: str, variant: str, seconds: Sequence[float], detail: Mapping[str, Any]
) -> harness.Result:
  """A result without programs to compare with."""
  return harness.Result(
    suite='compile',
    name=name,
    variant=variant,
    seconds_median=statistics.median(seconds),
    seconds_min=min(seconds),
    seconds_max=max(seconds),
    repeats=len(seconds),
    ratio_to_dense=None,
    ratio_to_peak=None,
    ratio_to_transformers=None,
    peak_bytes=None,
    detail=dict(detail),
  )


def first_steps(repeats: int) -> list[harness.Result]:
  """Seconds from starting the quickstart's command to its first step, once cold, then warm.

  Cold: no corpus, tokenizer, matmul peak or compiled program in the cache.
  """
  with tempfile.TemporaryDirectory() as cache:
    cold, *warm = [first_step('configs/quickstart.py', cache) for _ in range(repeats + 1)]
  name = 'first step, quickstart'
  return [_timed(name, 'cold cache', [cold], {}), _timed(name, 'warm cache', warm, {})]


def first_step(page: str, cache: str | os.PathLike[str], arguments: Sequence[str] = ()) -> float:
  """Seconds from starting `experiments.train` on a page to the line of its first step.

  The line is printed when the step's loss has come back from the device.

  Args:
    page: path of the config page.
    cache: directory of everything that is kept between runs.
    arguments: further ones of the command.
  """
  environment = {**os.environ, 'MOE_JAX_CACHE': str(cache), 'PYTHONUNBUFFERED': '1'}
  environment.pop('JAX_COMPILATION_CACHE_DIR', None)  # it would be shared with other runs
  with tempfile.TemporaryDirectory() as workdir:
    command = [sys.executable, '-m', 'experiments.train', f'--config={page}']
    command += [f'--workdir={workdir}', '--config.train.log_every=1', *arguments]
    start = time.perf_counter()
    with subprocess.Popen(
      command,
      cwd=ROOT,
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    ) as process:
      said = []
      try:
        for line in process.stdout:
          said.append(line)
          if FIRST_STEP.search(line):
            return time.perf_counter() - start
      finally:
        process.kill()
  raise RuntimeError(f'{page} ended before its first step:\n{"".join(said[-20:])}')
