"""DeepSeek-V2 (arXiv 2405.04434): 236B parameters, 21B activated, latent attention, 8.1T tokens.

Run:    python -m experiments.train --config=configs/deepseek_v2.py[:long] --workdir=W
          --config.data.source=parquet --config.data.path='corpus/*.parquet'
          --config.train.micro_batch_size=64
        The stage `long` goes on from its workdir: --workdir=W2 --config.init_from=W
Count:  python -m experiments.describe --config=configs/deepseek_llm_67b.py
          --config=configs/deepseek_v2.py
Takes:  1.3e24 FLOPs; time not yet measured.
Expect: 0.606 Pile bits per byte (the paper's; not yet reproduced here), and in `describe`, beside
        67B, a cache that is 82.2 % smaller at equal precision and 93.3 % with 6 bits against 16.

  variant   stage
  (none)    rows of 4K without YaRN
  long      then 1000 steps of 576 rows of 32K, YaRN by 40; meant for 128K

235,741,434,880 parameters, of which a token activates 20,851,512,320 if one of the vocabulary
matrices is counted, as in the paper's 21B; a cache of 34,560 numbers per token. The corpus is not
public, and the default source only proves that the page runs: point config.data at a real one.

Experts lie on 8 devices, and a token uses those of 3. Three balance losses; in training, the
assignments with the lowest affinity are dropped above a device's mean, except in 10 % of the rows.
Stated as shares of the tokens, and here as the shares of the steps that see as many: the rate drops
by 0.316 after 60 % and 90 %.

Not stated, chosen here: the batch grows from 2304 to 9216 rows over 225B tokens in four equal
rises; AdamW's eps (1e-8); whose tokens compete for a device, here those of a forward pass; the rate
of `long`, that with which pre-training ended. routed_scaling_factor is the released code's.
YaRN's scale of the logits, (0.0707 ln 40 + 1)^2, is the paper's: mscale 0.707.
"""

from configs import base, recipes

TOKENS = 8.1e12
PEAK_LR = 2.4e-4


def get_config(variant: str = '') -> base.Page:
  """The page, or one of `VARIANTS`."""
  config = recipes.deepseek(base.get_config())
  config.model.embed_dim = 5120
  config.model.mlp_dim = 12_288
  config.model.num_layers = 60
  config.model.num_dense_layers = 1
  config.model.num_heads = 128
  recipes.latent_attention(config, q_lora_rank=1536)
  recipes.experts(config, shared=2, routed=160, per_tok=6, width=1536)
  config.model.moe.routed_scaling_factor = 16.0
  config.model.moe.num_expert_groups = 8
  config.model.moe.num_limited_groups = 3
  config.model.moe.group_score = 'max'
  config.model.moe.num_virtual_devices = 8
  recipes.minimise(config, expert_level=0.003, device_level=0.05, communication=0.02)
  config.model.moe.capacity.policy = 'device'
  config.model.moe.capacity.factor = 1.0
  config.model.moe.capacity.group_rows = 0
  config.model.moe.capacity.exempt_fraction = 0.1

  config.train.batch_size = 9216  # 37.7M tokens
  recipes.ramp_batch(config, first=2304, tokens=225e9)
  config.train.num_steps = recipes.steps_of(config, TOKENS)

  config.optim.peak_lr = PEAK_LR
  config.optim.multi_step_boundaries = (
    recipes.step_share(config, 0.6 * TOKENS),
    recipes.step_share(config, 0.9 * TOKENS),
  )
  return recipes.variant(config, variant, VARIANTS)


def _long(config: base.Page):
  recipes.long_context(config, 32_768, 576, PEAK_LR * 0.316**2, mscale=0.707)


VARIANTS = {'long': _long}
