"""DeepSeekMoE 2B (arXiv 2401.06066, section 4), the paper's validation scale, and its baselines.

Run:    python -m experiments.train --config=configs/deepseekmoe_2b.py[:VARIANT] --workdir=W
          --config.data.source=parquet --config.data.path='corpus/*.parquet'
          --config.train.micro_batch_size=256
Count:  python -m experiments.describe --config=configs/deepseekmoe_2b.py[:VARIANT]
Takes:  2.1e20 FLOPs (100B tokens); time not yet measured.
Expect: the Pile loss below (the paper's; not yet reproduced here).

  variant               experts                              Pile loss
  (none)                1 shared + 7 of 63, 1/4 size         1.808
  gshard                2 of 16, whole size                  1.867
  gshard_x1.2, _x1.5    the same, 1.2 and 1.5 x as wide      1.824, 1.808
  switch                1 of 16, whole size                  1.881
  hash                  the same, by token id (Hash Layer)   1.932
  dense, _x4, _x16      1, 4, 16 always on = one wide FFN    2.060, 1.908, 1.806
  1_15                  1 shared + 1 of 15, whole size       not printed
  1_31                  1 shared + 3 of 31, 1/2 size         not printed
  shared_2, shared_4    2 + 6 of 62, 4 + 4 of 60, 1/4 size   1.806, 1.811
  half                  1 shared + 3 of 63, 1/4 size         not printed (Figure 6)

Figure 3 climbs gshard, 1_15, 1_31, (none). deepseekmoe_tiny, _mini and _small are the same ladder
for minutes and hours of a CPU core and for one GPU. The paper's corpus is not public, and the
default source only proves that the page runs: point config.data at a real one.

Widths: a whole FFN is 8/3 D = 3413.33 wide and a quarter of it 853.33; every printed parameter and
FLOPs figure comes from these. 3413, 1707 and 853 are the nearest integers (1.8867B expert
parameters for the paper's 1.8874B, both printed 1.89B); an aligned 896 would be 5 % more
model. Where speed matters more than the table, override --config.model.moe.moe_mlp_dim=896.
`config.paper` keeps the exact widths for `describe`.

Not stated in the paper, chosen here: norm, RoPE, activation, untied embeddings as in the released
16B model, AdamW eps as in configs/base.py, the same balance loss weight for the baselines (hash has
none), GShard's two gates divided by their sum, a random table for hash, and no dropped tokens.
"""

from configs import base, recipes

FFN = 8 / 3 * 1280  # width of the paper's standard FFN, unaligned


def get_config(variant: str = '') -> base.Page:
  """The page, or one of `VARIANTS`."""
  config = base.get_config()

  config.model.vocab_size = 8192  # "8K"
  config.model.max_seq_len = 2048
  config.model.embed_dim = 1280
  config.model.mlp_dim = 3413
  config.model.num_layers = 9
  config.model.num_dense_layers = 0
  config.model.num_heads = 10
  config.model.init_std = 0.006
  config.model.dtype = 'bfloat16'
  config.model.remat = 'moe_core'
  config.model.attention.num_kv_heads = 10
  config.model.attention.head_dim = 128
  recipes.experts(config, shared=1, routed=63, per_tok=7, width=FFN / 4)
  config.model.moe.balance.expert_level.weight = 0.01

  config.optim.peak_lr = 1.08e-3
  config.optim.schedule = 'multi_step'
  config.optim.warmup_steps = 2000

  config.train.num_steps = 25_000
  config.train.batch_size = 2048  # 4M tokens
  config.train.eval_every = 1000
  return recipes.variant(config, variant, VARIANTS)


VARIANTS = recipes.ladder(FFN)
