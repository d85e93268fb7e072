"""DeepSeek-V2-Lite (arXiv 2405.04434): 15.7B parameters, 2.4B activated, MLA, 5.7T tokens.

Run:    python -m experiments.train --config=configs/deepseek_v2_lite.py[:VARIANT] --workdir=W
          --config.data.source=parquet --config.data.path='corpus/*.parquet'
          --config.train.micro_batch_size=64
        The stage `long` goes on from its workdir: --workdir=W2 --config.init_from=W
Count:  python -m experiments.describe --config=configs/deepseek_v2_lite.py
          --config=configs/deepseek_v2_lite.py:mha
Takes:  9.3e22 FLOPs; time not yet measured.
Expect: not yet reproduced here. The paper prints no loss; MMLU 58.3, BBH 44.1, GSM8K 41.1.

  variant   model or stage                                   parameters       cache per token
  (none)    MLA; rows of 4K without YaRN                     15,706,484,224    15,552 numbers
  long      then 1000 steps on rows of 32K, YaRN by 40       the same          the same
  mha       the paper's ablation: MHA, 1.33T tokens          15,787,866,112   110,592 numbers

The corpus is not public, and the default source only proves that the page runs: point config.data
at a real one. 2.4B activated is 2,451,435,008: the paper counts one of the vocabulary matrices.

Not stated, chosen here: init_std (the family's 0.006) and AdamW's eps (1e-8); for `long`, which the
paper describes for V2 only, V2's 576 rows and steps, and the rate with which pre-training ended;
for `mha`, which has the page's schedule, everything but its tokens.
YaRN's scale of the logits, (0.0707 ln 40 + 1)^2, is the paper's: mscale 0.707.
"""

from configs import base, recipes

TOKENS = 5.7e12
PEAK_LR = 4.2e-4


def get_config(variant: str = '') -> base.Page:
  """The page, or one of `VARIANTS`."""
  config = recipes.deepseek(base.get_config())
  config.model.embed_dim = 2048
  config.model.mlp_dim = 10_944
  config.model.num_layers = 27
  config.model.num_dense_layers = 1
  config.model.num_heads = 16
  recipes.latent_attention(config, q_lora_rank=0)  # queries come straight from the input
  recipes.experts(config, shared=2, routed=64, per_tok=6, width=1408)
  recipes.minimise(config, expert_level=0.001)  # all experts of a layer are on one device

  config.optim.peak_lr = PEAK_LR
  config.optim.multi_step_boundaries = (0.8, 0.9)

  config.train.batch_size = 4608  # 18.9M tokens
  config.train.num_steps = recipes.steps_of(config, TOKENS)
  return recipes.variant(config, variant, VARIANTS)


def _long(config: base.Page):
  recipes.long_context(config, 32_768, 576, PEAK_LR * 0.316**2, mscale=0.707)


def _mha(config: base.Page):
  config.model.attention.kind = 'gqa'
  config.train.num_steps = recipes.steps_of(config, 1.33e12)


VARIANTS = {'long': _long, 'mha': _mha}
