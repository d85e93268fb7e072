"""DeepSeek LLM 67B (arXiv 2401.02954): 67.4B parameters, dense, grouped-query attention, 2T tokens.

Run:    python -m experiments.train --config=configs/deepseek_llm_67b.py --workdir=W
          --config.data.source=parquet --config.data.path='corpus/*.parquet'
          --config.train.micro_batch_size=128
Count:  python -m experiments.describe --config=configs/deepseek_llm_67b.py
          --config=configs/deepseek_v2.py
Takes:  8.4e23 FLOPs; time not yet measured.
Expect: 0.642 Pile bits per byte (the paper's; not yet reproduced here).

67,425,001,472 parameters, a cache of 194,560 numbers per token: 8 key-value heads for 64 queries.
Unlike the 7B model it grew in depth (95 layers), not in the width of its FFNs, 22016 = 8/3 D up to
a multiple of 256. The corpus is not public, and the default source only proves that the page runs:
point config.data at a real one.

Not stated: AdamW's eps, here 1e-8. The rate drops by 0.316 twice, where the paper says to 31.6 %
and to 10 %: 0.1 % apart. The papers' FLOPs count the unaligned width in `config.paper`, and the 8
key-value heads as if they were 64.
"""

from configs import base, recipes

TOKENS = 2.0e12


def get_config() -> base.Page:
  """The page; it has no variants."""
  config = recipes.deepseek(base.get_config())
  config.model.embed_dim = 8192
  config.model.num_layers = 95
  config.model.num_heads = 64
  config.model.attention.num_kv_heads = 8
  recipes.make_dense(config, 22_016)
  config.paper.mlp_dim = 8 / 3 * 8192

  config.optim.peak_lr = 3.2e-4
  config.optim.multi_step_boundaries = (0.8, 0.9)

  config.train.batch_size = 4608  # 18.9M tokens
  config.train.num_steps = recipes.steps_of(config, TOKENS)
  return config
