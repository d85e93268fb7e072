"""Workdirs as training leaves them, without training: tests `from tests.analysis.comparison`."""

import json
import pathlib

import numpy as np

from moe_jax.balance import routing_figures
from moe_jax.config import parse
from tests import tiny

POINTS = 12  # logged steps, every second one
BIAS = {'model__moe__expert_bias__update_rule': 'sign'}  # of the second of `two_groups`


def run(
  path: pathlib.Path,
  *,
  seed: int = 0,
  loss: float = 1.0,
  slope: float = 0.0,
  tokenizer: str = '{}',
  fingerprint: str = 'text',
  steps: int = 2 * POINTS,
  held_out: bool = True,
  routing: bool = True,
  upcycled: dict | None = None,
  **overrides,
) -> pathlib.Path:
  """Writes a workdir; its loss falls to `loss` and moves by `slope` with log2 of the tokens.

  Seeds differ by 0.1 in loss, which pairs do not see, and by 0.001 in what `loss` is.
  """
  values = {'train__seed': seed, 'train__num_steps': 2 * POINTS, 'train__log_every': 2}
  cfg = tiny.make(**(values | overrides))
  path.mkdir(parents=True)
  record = {'config': parse.to_dict(cfg), 'data_fingerprint': fingerprint}
  (path / 'config.json').write_text(json.dumps(record))
  (path / 'tokenizer.json').write_text(tokenizer)
  own = 0.1 * seed + (0.001 * seed if loss != 1.0 else 0.0)
  lines = [
    {
      'step': step,
      'loss': loss + own + 2.0 / step + slope * float(np.log2(step / (2 * POINTS))),
      'max_vio': 0.5 + 0.1 * seed,
      'drop_rate': 0.0,
      'tokens_per_second': 64.0,
    }
    for step in range(2, steps + 1, 2)
  ]
  (path / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  if upcycled:
    (path / 'upcycled.json').write_text(json.dumps(upcycled))
  if held_out:
    found = {'step': steps, 'loss': loss + own, 'bits_per_byte': loss + own, 'max_vio': 0.5}
    (path / 'evaluation.json').write_text(json.dumps(found))
  if routing:
    load = np.full((2, 8), 4.0)
    load[0, seed % 7], load[0, 7] = 6.0, 2.0  # MaxVio 0.5 in layer 1, 0 in layer 2
    for step in (8, 16, 24):
      figures = {'load': load, 'max_vio': np.asarray([0.5, 0.0])}
      routing_figures.write(path / 'routing' / f'{step}.npz', figures)
  return path


def two_groups(top: pathlib.Path, num_seeds: int = 3, **second) -> list[pathlib.Path]:
  """`plain0`, `plain1` ... and `bias0` ..., whose loss is 0.2 lower."""
  second = {'loss': 0.8} | BIAS | second
  plain = [run(top / f'plain{seed}', seed=seed) for seed in range(num_seeds)]
  return plain + [run(top / f'bias{seed}', seed=seed, **second) for seed in range(num_seeds)]


def rewritten(path: pathlib.Path, until: int = 2 * POINTS, rise: float = 0.0):
  """Cuts the log of a written run; its loss comes from below up to step 12, `rise` per doubling."""
  lines = [json.loads(line) for line in (path / 'metrics.jsonl').read_text().splitlines()]
  for line in lines:
    line['loss'] += rise * float(np.log2(min(line['step'] / 12, 1)))
  kept = [line for line in lines if line['step'] <= until]
  (path / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in kept))


def diverged(path: pathlib.Path, *steps: int):
  """Lets a written run have no finite loss at some logged steps; at the end too without any."""
  lines = [json.loads(line) for line in (path / 'metrics.jsonl').read_text().splitlines()]
  for line in lines:
    if line['step'] in steps or not steps:
      line['loss'] = None
  (path / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  if not steps:
    found = json.loads((path / 'evaluation.json').read_text())
    found |= {'loss': float('nan'), 'bits_per_byte': float('nan')}
    (path / 'evaluation.json').write_text(json.dumps(found))
