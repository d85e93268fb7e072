"""Tokens per second of generation beside transformers: same weights, same prompts, same process.

python -m experiments.generation_speed.run [--out=experiments/generation_speed] [--repeats=5]

Needs the extra `hf`. transformers makes a random DeepSeek-V2 model and saves it; both read the same
files. Greedy, prompt 64, 192 new tokens, float32. Writes results.json and the table of README.md.
"""

import json
import pathlib
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import torch
import tqdm
import transformers
from absl import flags

from configs import base
from experiments import cli
from moe_jax import errors, files, generate
from moe_jax import sampling as sampling_lib
from moe_jax.interop import huggingface

PROMPT, NEW, BATCHES = 64, 192, (1, 8)
MEDIUM = dict(
  vocab_size=8192,
  hidden_size=512,
  intermediate_size=1408,
  moe_intermediate_size=176,
  num_hidden_layers=8,
  first_k_dense_replace=1,
  num_attention_heads=8,
  num_key_value_heads=8,
  q_lora_rank=None,
  kv_lora_rank=128,
  qk_nope_head_dim=64,
  qk_rope_head_dim=32,
  v_head_dim=64,
  n_routed_experts=64,
  n_shared_experts=2,
  num_experts_per_tok=6,
  max_position_embeddings=1024,
)
# The size of configs/quickstart.py, a little less latent: what is trained on a laptop.
SMALL = MEDIUM | dict(
  hidden_size=256,
  intermediate_size=704,
  moe_intermediate_size=88,
  num_hidden_layers=6,
  num_attention_heads=4,
  num_key_value_heads=4,
  kv_lora_rank=64,
  qk_nope_head_dim=32,
  qk_rope_head_dim=16,
  v_head_dim=32,
)
SHAPES = {'small': SMALL, 'medium': MEDIUM}
START, END = '<!-- table: written by the command -->', '<!-- end of table -->'


def define_flags():
  """Flags of this command."""
  flags.DEFINE_string('out', 'experiments/generation_speed', 'directory of the results')
  flags.DEFINE_integer('repeats', 5, 'timed repetitions of each program, in turn')
  flags.DEFINE_integer('threads', 2, 'threads of torch')


def make_model(shape: dict[str, Any], directory: str) -> Any:
  """A random model of transformers in float32, saved; large weights make texts that differ."""
  torch.manual_seed(0)
  model = transformers.DeepseekV2ForCausalLM(transformers.DeepseekV2Config(**shape)).eval()
  with torch.no_grad():
    for name, weight in model.named_parameters():
      if weight.ndim > 1:
        weight.normal_(0.0, 1.0 if 'embed' in name else 1.5 * weight.shape[-1] ** -0.5)
  model.save_pretrained(directory)
  return model


def theirs(model: Any, prompts: np.ndarray) -> Callable[[], np.ndarray]:
  """transformers' own greedy generation with its cache."""
  ids = torch.tensor(prompts)
  fixed = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)

  @torch.inference_mode()
  def run() -> np.ndarray:
    return model.generate(ids, attention_mask=torch.ones_like(ids), **fixed).numpy()[:, PROMPT:]

  return run


def ours(generator: generate.Generator, prompts: np.ndarray) -> Callable[[], np.ndarray]:
  """The same by this project."""
  rows, greedy = prompts.tolist(), sampling_lib.Sampling(temperature=0.0)
  return lambda: np.array(generator.generate(rows, NEW, greedy).tokens)


def measure(programs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
  """Seconds of each program, run in turn after one warm-up."""
  seconds = {name: [] for name in programs}
  for i in tqdm.trange(repeats + 1, desc='repetitions', leave=False, disable=None):
    for name, program in programs.items():
      start = time.perf_counter()
      program()
      if i:
        seconds[name].append(time.perf_counter() - start)
  return seconds


def compare(model: Any, generator: generate.Generator, batch: int, repeats: int) -> dict[str, Any]:
  """The record of one model and batch size."""
  prompts = np.random.default_rng(batch).integers(2, model.config.vocab_size, (batch, PROMPT))
  programs = {'moe_jax': ours(generator, prompts), 'transformers': theirs(model, prompts)}
  texts = {name: program() for name, program in programs.items()}
  seconds = measure(programs, repeats)
  record: dict[str, Any] = {'batch': batch}
  for name, values in seconds.items():
    record[name] = {
      'tokens_per_second': batch * NEW / statistics.median(values),
      'slowest': batch * NEW / max(values),
      'fastest': batch * NEW / min(values),
    }
  ratio = statistics.median(seconds['transformers']) / statistics.median(seconds['moe_jax'])
  record['ratio'] = ratio
  record['same_tokens'] = float((texts['moe_jax'] == texts['transformers']).mean())
  return record


def table(records: Sequence[dict[str, Any]]) -> str:
  """Markdown rows."""
  lines = [
    '| model | weights | batch | moe_jax tokens/s | transformers tokens/s | ratio | same tokens |',
    '| --- | --- | --- | --- | --- | --- | --- |',
  ]
  for r in records:
    cells = [
      f'{r[name]["tokens_per_second"]:.0f} ({r[name]["slowest"]:.0f}-{r[name]["fastest"]:.0f})'
      for name in ('moe_jax', 'transformers')
    ]
    cells += [f'{r["ratio"]:.1f}', f'{r["same_tokens"]:.1%}']
    size = f'{r["parameters"] / 1e6:.1f}M'
    lines.append(f'| {r["shape"]} | {size} | {r["batch"]} | {" | ".join(cells)} |')
  return '\n'.join(lines)


def main(unused_argv: Sequence[str]):
  """Measures, prints and writes."""
  repeats = flags.FLAGS.repeats
  errors.require(repeats >= 1, f'--repeats={repeats} must be at least 1')
  torch.set_num_threads(flags.FLAGS.threads)
  records = []
  for name, shape in SHAPES.items():
    with tempfile.TemporaryDirectory() as directory:
      model = make_model(shape, directory)
      cfg, variables = huggingface.load(directory, base.get_config().to_dict())
    generator = generate.Generator(cfg.model, variables, ())
    weights = sum(weight.numel() for weight in model.parameters())
    for batch in BATCHES:
      found = compare(model, generator, batch, repeats)
      records.append({'shape': name, 'parameters': weights, **found})
  versions = {
    'python': platform.python_version(),
    'jax': jax.__version__,
    'torch': torch.__version__,
    'transformers': transformers.__version__,
    'device': jax.devices()[0].device_kind,
    'torch_threads': flags.FLAGS.threads,
  }
  out = pathlib.Path(flags.FLAGS.out)
  out.mkdir(parents=True, exist_ok=True)
  results = {'shapes': SHAPES, 'versions': versions, 'repeats': repeats, 'results': records}
  files.write_text(out / 'results.json', json.dumps(results, indent=2) + '\n')
  text = table(records)
  readme = out / 'README.md'
  if readme.is_file():
    before, rest = readme.read_text(encoding='utf-8').split(START)
    files.write_text(readme, f'{before}{START}\n\n{text}\n\n{END}{rest.split(END)[1]}')
  print(text)


if __name__ == '__main__':
  cli.run(main, define_flags)
