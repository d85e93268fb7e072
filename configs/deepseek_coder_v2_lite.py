"""DeepSeek-Coder-V2-Lite (arXiv 2406.11931): V2-Lite on code, 6T more tokens, half of them FIM.

Run:    python -m experiments.train --config=configs/deepseek_coder_v2_lite.py[:VARIANT]
          --workdir=W2 --config.init_from=W
          --config.data.source=parquet --config.data.path='corpus/*.parquet'
          --config.train.micro_batch_size=32
        W: of configs/deepseek_v2_lite.py after 4.2T tokens (step 222,524), or the stage before
Count:  python -m experiments.describe --config=configs/deepseek_coder_v2_lite.py
Takes:  9.8e22 FLOPs; time not yet measured.
Expect: not yet reproduced here. The paper prints no loss; filling in single lines, 86.4 % exact.

  variant     stage
  (none)      6T tokens in rows of 4K without YaRN
  long_32k    then 1000 steps of 1152 rows of 32K, YaRN by 40
  long_128k   then 1000 steps of 288 rows of 128K

The model is V2-Lite: 15,706,484,224 parameters. Half of the documents are rearranged as prefix,
suffix and middle, before packing. 60 % of the paper's tokens are source code, 10 % mathematics and
30 % natural language: with such sources, data.source='mixture'. Its corpus is not public, and the
default source, Python code, only proves that the page runs.

The peak rate is V2-Lite's, to which the paper refers, and a cosine leads to a tenth of it. Not
stated, chosen here: init_std (the family's 0.006), which only a run without init_from needs,
AdamW's eps (1e-8) and the rate of the long stages, that with which the first one ended.
YaRN's scale of the logits, (0.0707 ln 40 + 1)^2, is V2's: mscale 0.707.
"""

from configs import base, recipes

TOKENS = 6.0e12
PEAK_LR = 4.2e-4


def get_config(variant: str = '') -> base.Page:
  """The page, or one of `VARIANTS`."""
  config = recipes.deepseek(base.get_config())
  config.model.embed_dim = 2048
  config.model.mlp_dim = 10_944
  config.model.num_layers = 27
  config.model.num_dense_layers = 1
  config.model.num_heads = 16
  recipes.latent_attention(config, q_lora_rank=0)
  recipes.experts(config, shared=2, routed=64, per_tok=6, width=1408)
  recipes.minimise(config, expert_level=0.001)

  config.data.fim_rate = 0.5

  config.optim.peak_lr = PEAK_LR
  config.optim.schedule = 'cosine'
  config.optim.final_lr_fraction = 0.1

  config.train.batch_size = 4608  # 18.9M tokens
  config.train.num_steps = recipes.steps_of(config, TOKENS)
  return recipes.variant(config, variant, VARIANTS)


def _long_32k(config: base.Page):
  recipes.long_context(config, 32_768, 1152, PEAK_LR / 10, mscale=0.707)


def _long_128k(config: base.Page):
  recipes.long_context(config, 131_072, 288, PEAK_LR / 10, mscale=0.707)


VARIANTS = {'long_32k': _long_32k, 'long_128k': _long_128k}
