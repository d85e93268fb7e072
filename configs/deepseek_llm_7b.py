"""DeepSeek LLM 7B (arXiv 2401.02954): 6.9B parameters, dense, multi-head attention, 2T tokens.

Run:    python -m experiments.train --config=configs/deepseek_llm_7b.py --workdir=W
          --config.data.source=parquet --config.data.path='corpus/*.parquet'
          --config.train.micro_batch_size=256
Count:  python -m experiments.describe --config=configs/deepseek_llm_7b.py
Takes:  8.4e22 FLOPs; time not yet measured.
Expect: 0.725 Pile bits per byte (the paper's; not yet reproduced here). DeepSeekMoE, which compares
        itself with this model, measures 0.75.

6,910,365,696 parameters, a cache of 245,760 numbers per token. The corpus is not public, and the
default source only proves that the page runs: point config.data at a real one.

Not stated: AdamW's eps, here 1e-8. The rate drops by 0.316 twice, where the paper says to 31.6 %
and to 10 %: 0.1 % apart. FFNs are 11008 wide, 8/3 D up to a multiple of 256; `config.paper` keeps
the unaligned width, which the papers' FLOPs count.
`configs/deepseekmoe_16b.py:dense_7b` is the same model and run.
"""

from configs import base, recipes

TOKENS = 2.0e12


def get_config() -> base.Page:
  """The page; it has no variants."""
  config = recipes.deepseek(base.get_config())
  config.model.embed_dim = 4096
  config.model.num_layers = 30
  config.model.num_heads = 32
  config.model.attention.num_kv_heads = 32
  recipes.make_dense(config, 11_008)
  config.paper.mlp_dim = 8 / 3 * 4096

  config.optim.peak_lr = 4.2e-4
  config.optim.multi_step_boundaries = (0.8, 0.9)

  config.train.batch_size = 2304  # 9.4M tokens
  config.train.num_steps = recipes.steps_of(config, TOKENS)
  return config
