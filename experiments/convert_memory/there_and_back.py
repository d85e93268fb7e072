"""Makes a checkpoint, imports and exports it, and compares the files."""

import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np
import tokenizers
from absl import flags
from tokenizers import models

from configs import base
from experiments.common import cli
from moe_jax import errors
from moe_jax.config import parse
from moe_jax.interop import hf_config, mapping, safetensors_files

RESULTS = pathlib.Path(__file__).parent / 'results.json'

# config.json of DeepSeek-V2-Lite, but for num_hidden_layers.
V2_LITE = {
  'architectures': ['DeepseekV2ForCausalLM'],
  'model_type': 'deepseek_v2',
  'vocab_size': 102400,
  'max_position_embeddings': 163840,
  'hidden_size': 2048,
  'intermediate_size': 10944,
  'num_attention_heads': 16,
  'num_key_value_heads': 16,
  'rms_norm_eps': 1e-6,
  'rope_theta': 10000,
  'rope_scaling': {
    'type': 'yarn',
    'factor': 40,
    'original_max_position_embeddings': 4096,
    'beta_fast': 32,
    'beta_slow': 1,
    'mscale': 0.707,
    'mscale_all_dim': 0.707,
  },
  'initializer_range': 0.02,
  'hidden_act': 'silu',
  'attention_bias': False,
  'tie_word_embeddings': False,
  'bos_token_id': 0,
  'eos_token_id': 1,
  'torch_dtype': 'bfloat16',
  'n_routed_experts': 64,
  'n_shared_experts': 2,
  'num_experts_per_tok': 6,
  'moe_intermediate_size': 1408,
  'first_k_dense_replace': 1,
  'moe_layer_freq': 1,
  'norm_topk_prob': False,
  'scoring_func': 'softmax',
  'topk_method': 'greedy',
  'n_group': 1,
  'topk_group': 1,
  'routed_scaling_factor': 1.0,
  'aux_loss_alpha': 0.001,
  'seq_aux': True,
  'q_lora_rank': None,
  'kv_lora_rank': 512,
  'qk_nope_head_dim': 128,
  'qk_rope_head_dim': 64,
  'v_head_dim': 128,
}


def make(directory: pathlib.Path, layers: int) -> list[safetensors_files.Spec]:
  """Writes the checkpoint, a part at a time, and returns its tensors."""
  directory.mkdir()
  hf = V2_LITE | {'num_hidden_layers': layers}
  values = hf_config.to_values(hf, base.get_config().to_dict())
  entries = list(mapping.entries(parse.from_dict(values).model, mapping.Layout()))
  specs = list(
    dict.fromkeys(safetensors_files.Spec(e.hf_name, 'BF16', e.hf_shape) for e in entries)
  )
  needed = 3 * sum(spec.num_bytes for spec in specs)
  free = shutil.disk_usage(directory).free
  errors.require(
    needed * 1.1 < free,
    f'--layers={layers} writes {needed / 1e9:.0f} GB, but only {free / 1e9:.0f} GB are free in '
    f'{directory.parent}; choose fewer',
  )
  (directory / 'config.json').write_text(json.dumps(hf))
  vocab = {'<s>': 0, '</s>': 1, 'a': 2}
  tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[])).save(str(directory / 'tokenizer.json'))
  # One block of noise, read from another place for every tensor: drawing all would take longer.
  noise = np.random.default_rng(0).normal(0, 0.02, 2**27).astype(ml_dtypes.bfloat16)

  def parts() -> Iterator[np.ndarray]:
    for i, entry in enumerate(entries):
      start = i * 7919 % (len(noise) - entry.size)
      yield noise[start : start + entry.size].reshape(entry.hf_part)

  safetensors_files.write(directory, specs, parts())
  return specs


def run(*arguments: str) -> dict[str, Any]:
  """Runs experiments.convert and returns its seconds, peak memory in GiB and last line."""
  command = [sys.executable, '-m', 'experiments.convert', *arguments]
  began = time.monotonic()
  done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
  errors.require(done.returncode == 0, f'{" ".join(command)} ended with {done.returncode}')
  line = done.stdout.strip().splitlines()[-1]
  return {
    'seconds': round(time.monotonic() - began, 1),
    'peak_gib': float(re.search(r'peak host memory ([\d.]+) GiB', line)[1]),
    'line': line,
  }


def equal(a: pathlib.Path, b: pathlib.Path) -> bool:
  """Whether two checkpoints hold the same bytes under the same names."""
  first, second = safetensors_files.find(a), safetensors_files.find(b)
  if first.keys() != second.keys():
    return False
  with safetensors_files.Reader(first) as x, safetensors_files.Reader(second) as y:
    for name, tensor in first.items():
      if (tensor.dtype, tensor.shape) != (second[name].dtype, second[name].shape):
        return False
      pair = (reader.read(name, 0, tensor.shape).view(np.uint16) for reader in (x, y))
      if not np.array_equal(*pair):
        return False
  return True


def main(unused_argv: Sequence[str]):
  """Converts there and back, compares, and writes results.json."""
  workdir = pathlib.Path(cli.required('workdir'))
  errors.require(not workdir.exists(), f'--workdir={workdir} exists; it would be deleted')
  workdir.mkdir(parents=True)
  try:
    specs = make(workdir / 'in', flags.FLAGS.layers)
    found = {
      'layers': flags.FLAGS.layers,
      'tensors': len(specs),
      'gb': round(sum(spec.num_bytes for spec in specs) / 1e9, 2),
      'largest_tensor_gib': round(max(spec.num_bytes for spec in specs) / 2**30, 2),
    }
    print(found)
    target = f'--workdir={workdir / "run"}'
    found['import'] = run(f'--from_hf={workdir / "in"}', target)
    print(found['import'])
    found['export'] = run(f'--to_hf={workdir / "out"}', target)
    print(found['export'])
    found['equal'] = equal(workdir / 'in', workdir / 'out')
    found['machine'] = f'{os.cpu_count()} CPU cores, Python {platform.python_version()}, JAX ' + (
      jax.__version__
    )
    RESULTS.write_text(json.dumps(found, indent=2) + '\n')
    print(f'equal={found["equal"]}')
  finally:
    shutil.rmtree(workdir)
