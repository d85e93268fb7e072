"""The parts of the GPU benchmark, in order of importance, and the journal of their results."""

import dataclasses
import json
import os
import pathlib
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from experiments.bench import gpu_checks, gpu_kernels, gpu_models, gpu_sizes
from experiments.common import harness
from moe_jax import errors
from moe_jax.devices import tokamax_tiles

Part = Callable[[gpu_sizes.Sizes, harness.Peaks], Iterator[dict[str, Any]]]

# In order of importance, with the seconds on an H200 below which a part is not begun: a guess, of
# which most is compilation.
PARTS: dict[str, tuple[int, Part]] = {
  'checks': (60, gpu_checks.run),
  'layer': (90, gpu_models.layer),
  'cache': (25, gpu_kernels.cache),
  'step': (100, gpu_models.train_step),
  'attention': (45, gpu_kernels.flash),
  'legs': (60, gpu_kernels.legs),
  'dispatch': (20, gpu_kernels.dispatch),
  'head_loss': (20, gpu_kernels.head_loss),
  'generation': (60, gpu_models.generation),
  'layer_profile': (30, gpu_models.layer_profile),
  'decode_suite': (90, gpu_models.decode_suite),
}


class Journal:
  """Results in a JSON file that is whole after each of them."""

  def __init__(self, path: pathlib.Path, head: dict[str, Any]):
    self._path, self._content = path, head | {'results': []}
    path.parent.mkdir(parents=True, exist_ok=True)
    self._write()

  @property
  def results(self) -> list[dict[str, Any]]:
    return self._content['results']

  def add(self, part: str, **result: Any):
    """Writes a result down and prints it in a line."""
    self.results.append({'part': part} | result)
    self._write()
    shown = {k: v for k, v in result.items() if v not in (None, {}, '')}
    print(part, json.dumps(shown, default=str)[:400], flush=True)

  def _write(self):
    whole = self._path.with_suffix('.new')
    whole.write_text(json.dumps(self._content, indent=1, default=str), encoding='utf-8')
    os.replace(whole, self._path)


def run(
  sizes: gpu_sizes.Sizes,
  journal: Journal,
  seconds: float,
  only: Sequence[str] = (),
  peaks: harness.Peaks | None = None,
) -> bool:
  """Runs the parts that fit; whether all that were begun went well.

  Args:
    sizes: full or toy.
    journal: takes the results.
    seconds: for everything, from now on.
    only: names of parts; none = all.
    peaks: of the device, for matrices of bfloat16; measured if not given.
  """
  start, well, took = time.monotonic(), True, {}
  peaks = peaks or harness.measure_peaks(jnp.bfloat16)
  journal.add('peaks', **dataclasses.asdict(peaks))
  for name, (needed, part) in PARTS.items():
    if only and name not in only:
      continue
    left = seconds - (time.monotonic() - start)
    if left < needed * sizes.patience:
      journal.add(name, skipped=f'{left:.0f} s are left and it may take {needed}')
      continue
    begun = time.monotonic()
    try:
      for result in part(sizes, peaks):
        journal.add(name, **result)
        well &= result.get('passed', 'failed' not in result)
        if time.monotonic() - start > seconds:
          journal.add(name, skipped='the rest of it: the time is over')
          break
    except Exception as e:  # of one kernel or library; the others are worth their time
      traceback.print_exc()
      journal.add(name, failed=f'{type(e).__name__}: {e}'[:2000])
      well = False
    took[name] = round(time.monotonic() - begun, 1)
  journal.add('time', seconds=time.monotonic() - start, of_parts=took)
  return well


def main(unused_argv: Sequence[str]) -> int:
  """Measures and writes; status 1 if something failed."""
  args = flags.FLAGS
  errors.require(args.minutes > 0, f'--minutes={args.minutes} must be positive')
  for name in args.only:
    errors.require(name in PARTS, f'--only={name} must be some of {", ".join(PARTS)}')
  platform = jax.default_backend()
  errors.require(
    args.toy or platform == 'gpu',
    f'JAX runs on {platform!r} here and the sizes are those of a GPU; add --toy, or install '
    "'moe_jax[cuda]' where there is one",
  )
  sizes = gpu_sizes.TOY if args.toy else gpu_sizes.FULL
  environment = harness.environment()
  kind = environment['device']
  head = {
    'environment': environment,
    'sizes': dataclasses.asdict(sizes),
    'measured_tiles': tokamax_tiles.path_of(kind).is_file(),
  }
  path = tokamax_tiles.path_of(kind, pathlib.Path(args.out))
  well = run(sizes, Journal(path, head), 60 * args.minutes, args.only)
  print(path)
  return 0 if well else 1
