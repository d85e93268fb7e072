"""Measures both programs on every case, and writes results.json and the tables of the README."""

import json
import pathlib
import platform
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import torch
import tqdm
import transformers
from absl import flags

from experiments.parity import hf_models, hf_training
from moe_jax import atomic_files, errors

START, END = '<!-- table: written by the command -->', '<!-- end of table -->'
COLUMNS = {
  'case': 'case',
  'family': 'model_type',
  'largest_logit': 'largest logit',
  'difference': 'largest difference',
  'relative': 'relative',
  'other_experts': 'other experts',
  'export_difference': 'after export',
}
TRAINING_COLUMNS = {
  'case': 'case',
  'loss': 'loss, relative',
  'grad_norm': 'gradient norm, relative',
  'weights': 'weights, of a step',
}


def main(unused_argv: Sequence[str]):
  """Measures and writes."""
  names, out = flags.FLAGS.names or list(hf_models.CASES), pathlib.Path(flags.FLAGS.out)
  for name in names:
    errors.choice('--names', name, tuple(hf_models.CASES))
  hf_models.one_thread()
  transformers.utils.logging.disable_progress_bar()
  logits = [_logits(name) for name in tqdm.tqdm(names, desc='logits', unit='case')]
  trained = [name for name in hf_training.CASES if hf_training.CASES[name][0] in names]
  training = [_training(name) for name in tqdm.tqdm(trained, desc='training', unit='case')]
  record = {'versions': _versions(), 'logits': logits, 'training': training}
  out.mkdir(parents=True, exist_ok=True)
  atomic_files.write_text(out / 'results.json', json.dumps(record, indent=2) + '\n')
  text = f'{markdown(logits, COLUMNS)}\n\n{markdown(training, TRAINING_COLUMNS)}'
  print(text)
  _put_into(out / 'README.md', text)


def _logits(name: str) -> dict[str, Any]:
  with tempfile.TemporaryDirectory() as directory:
    found = hf_models.measure(name, pathlib.Path(directory))
  want = found.theirs.logits
  largest = float(np.abs(want).max())
  difference = float(np.abs(found.ours.logits - want).max())
  return {
    'case': name,
    'family': hf_models.CASES[name]['model_type'],
    'largest_logit': largest,
    'difference': difference,
    'relative': difference / largest,
    'other_experts': int((found.ours.experts != found.theirs.experts).sum()),
    'export_difference': float(np.abs(found.exported.logits - want).max()),
  }


def _training(name: str) -> dict[str, Any]:
  """Largest relative difference over the steps; of weights in units of the learning rate."""
  case, changes = hf_training.CASES[name]
  with tempfile.TemporaryDirectory() as directory:
    _, ours, theirs = hf_training.measure(case, pathlib.Path(directory), **changes)

  def relative(a, b):
    return float(np.abs(np.array(a) / np.array(b) - 1).max())

  pairs = [(ours.weights[key], theirs.weights[key]) for key in theirs.weights]
  return {
    'case': name,
    'loss': relative(ours.loss, theirs.loss),
    'grad_norm': relative(ours.grad_norm, theirs.grad_norm),
    'weights': float(max(np.abs(a - b).max() for a, b in pairs)) / hf_training.LR,
  }


def _versions() -> dict[str, str]:
  modules = {'jax': jax, 'torch': torch, 'transformers': transformers, 'numpy': np}
  versions = {name: module.__version__ for name, module in modules.items()}
  return {'python': platform.python_version(), **versions}


def markdown(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
  """A table; small numbers in powers of ten."""
  lines = [list(columns.values()), ['---'] * len(columns)]
  lines += [[_cell(row[key]) for key in columns] for row in rows]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def _cell(value: Any) -> str:
  if isinstance(value, float):
    return f'{value:.1f}' if value >= 1 or value == 0 else f'{value:.1e}'
  return str(value)


def _put_into(readme: pathlib.Path, text: str):
  """Replaces what stands between the marks, if there is such a file."""
  old = readme.read_text(encoding='utf-8') if readme.exists() else ''
  if START in old and END in old:
    before, after = old.split(START)[0], old.split(END)[1]
    atomic_files.write_text(readme, f'{before}{START}\n\n{text}\n\n{END}{after}')
