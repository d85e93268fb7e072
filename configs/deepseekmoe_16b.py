"""DeepSeekMoE 16B (arXiv 2401.06066, section 5): 16.4B parameters, 2.8B activated, 2T tokens.

Run:    python -m experiments.train --config=configs/deepseekmoe_16b.py[:VARIANT] --workdir=W
          --config.data.source=parquet --config.data.path='corpus/*.parquet'
          --config.train.micro_batch_size=512
Count:  python -m experiments.describe --config=configs/deepseekmoe_16b.py[:VARIANT]
Takes:  3.4e22 FLOPs; time not yet measured.
Expect: the Pile bits per byte below (the paper's; not yet reproduced here).

  variant     model                                 parameters       FLOPs per 4K   Pile
  (none)      2 shared + 6 of 64, 1/4 size          16,375,728,128   74.4T          0.74
  dense_7b    DeepSeek LLM 7B (arXiv 2401.02954)     6,910,365,696   183.5T         0.75
  llama2_7b   LLaMA2 7B (arXiv 2307.09288)           6,738,415,616   187.9T         0.76

LLaMA2 saw other data than the two DeepSeek models. Their corpus is not public, and the default
source only proves that the page runs: point config.data at a real one.

Widths are the released model's: experts 1408 = 8/3 D / 4 and the first, dense layer 10944 = 2 x
8/3 D, both up to a multiple of 64; `config.paper` keeps the unaligned ones, which the paper's FLOPs
count.
dense_7b drops its learning rate by 0.316 twice, where the DeepSeek LLM paper says to 31.6 % and to
10 %: 0.1 % apart. llama2_7b is here to be counted: its optimizer values are its paper's from memory
(cosine to 10 %, peak 3e-4, eps 1e-5, 4M tokens a step) and otherwise this page's.
"""

from configs import base, recipes


def get_config(variant: str = '') -> base.Page:
  """The page, or one of `VARIANTS`."""
  config = base.get_config()

  config.model.vocab_size = 102_400
  config.model.max_seq_len = 4096
  config.model.embed_dim = 2048
  config.model.mlp_dim = 10_944
  config.model.num_layers = 28
  config.model.num_dense_layers = 1  # its balance would converge slowly
  config.model.num_heads = 16
  config.model.init_std = 0.006
  config.model.dtype = 'bfloat16'
  config.model.remat = 'moe_core'
  config.model.attention.num_kv_heads = 16
  config.model.attention.head_dim = 128
  config.model.moe.num_experts = 64
  config.model.moe.num_shared_experts = 2
  config.model.moe.num_experts_per_tok = 6
  config.model.moe.moe_mlp_dim = 1408
  config.model.moe.balance.expert_level.weight = 0.001
  config.paper.mlp_dim = 2 * 8 / 3 * 2048
  config.paper.moe_mlp_dim = 8 / 3 * 2048 / 4

  config.optim.peak_lr = 4.2e-4
  config.optim.schedule = 'multi_step'
  config.optim.warmup_steps = 2000

  config.train.num_steps = 106_449
  config.train.batch_size = 4608  # 18.9M tokens
  config.train.eval_every = 1000
  return recipes.variant(config, variant, VARIANTS)


def _dense_7b(config: base.Page):
  recipes.make_dense(config, 11_008)
  config.paper.mlp_dim = 8 / 3 * 4096
  config.model.embed_dim = 4096
  config.model.num_layers = 30
  config.model.num_heads = 32
  config.model.attention.num_kv_heads = 32
  config.train.batch_size = 2304
  config.train.num_steps = 211_928  # 2.0T tokens


def _llama2_7b(config: base.Page):
  _dense_7b(config)
  config.model.vocab_size = 32_000
  config.model.num_layers = 32
  config.model.norm_eps = 1e-5
  config.optim.peak_lr = 3e-4
  config.optim.schedule = 'cosine'
  config.optim.final_lr_fraction = 0.1
  config.optim.eps = 1e-5
  config.train.batch_size = 1024
  config.train.num_steps = 476_837  # 2.0T tokens


VARIANTS = {'dense_7b': _dense_7b, 'llama2_7b': _llama2_7b}
