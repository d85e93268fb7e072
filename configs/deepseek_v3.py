"""DeepSeek-V3 (arXiv 2412.19437): 671B parameters, 37B activated, MLA, loss-free balancing, MTP.

Run:    python -m experiments.train --config=configs/deepseek_v3.py[:VARIANT] --workdir=W
          --config.data.source=parquet --config.data.path='corpus/*.parquet'
          --config.train.micro_batch_size=32
        A later stage goes on from the workdir before: --workdir=W2 --config.init_from=W
Count:  python -m experiments.describe --config=configs/deepseek_v3.py
Takes:  3.9e24 FLOPs; time not yet measured.
Expect: not yet reproduced here. The report prints no loss that another tokenizer could meet.

  variant     stage
  (none)      14.8T tokens in rows of 4K without YaRN
  long_32k    then 1000 steps of 1920 rows of 32K, YaRN by 40
  long_128k   then 1000 steps of 480 rows of 128K

671,026,404,352 parameters, of which a token activates 36,625,603,584 if one of the vocabulary
matrices is counted, as in the report's 37B; the module that predicts a second token has
11,610,067,968 more. A cache of 35,136 numbers per token. The corpus and its tokenizer are not
public as such, and the default source only proves that the page runs: point config.data at a real
one.

Experts lie on 8 nodes, and a token uses those of 4; nothing is dropped. Selection is balanced by a
bias that moves by 0.001 until 14.3T tokens, and a loss of 1e-4 keeps single sequences from
extremes. The second token's loss weighs 0.3 until 10T tokens and 0.1 then. The page holds the
shares of the steps that see as many tokens.

The rate is constant to 10T tokens, falls as a cosine to a tenth at 14.3T, stays for 333B and ends
with 167B at 7.3e-6.
Not stated, chosen here: the batch grows from 3072 to 15360 rows over 469B tokens in four equal
rises; AdamW's eps (1e-8); that the later stages leave the bias as it is. YaRN's scale of the
logits is (0.1 ln 40 + 1)^2: mscale 1.
"""

from configs import base, recipes

TOKENS = 14.8e12


def get_config(variant: str = '') -> base.Page:
  """The page, or one of `VARIANTS`."""
  config = recipes.deepseek(base.get_config())
  config.model.vocab_size = 129_280
  config.model.embed_dim = 7168
  config.model.mlp_dim = 18_432
  config.model.num_layers = 61
  config.model.num_dense_layers = 3
  config.model.num_heads = 128
  config.model.num_mtp_layers = 1
  recipes.latent_attention(config, q_lora_rank=1536)
  recipes.experts(config, shared=1, routed=256, per_tok=8, width=2048)
  config.model.moe.score_func = 'sigmoid'
  config.model.moe.norm_topk_prob = True
  config.model.moe.routed_scaling_factor = 2.5
  config.model.moe.num_expert_groups = 8
  config.model.moe.num_limited_groups = 4
  config.model.moe.group_score = 'top2_sum'
  config.model.moe.num_virtual_devices = 8

  config.train.batch_size = 15_360  # 62.9M tokens
  recipes.ramp_batch(config, first=3072, tokens=469e9)
  config.train.num_steps = recipes.steps_of(config, TOKENS)
  config.train.mtp_loss_weight = 0.1
  config.train.mtp_loss_ramp = ((recipes.step_share(config, 10e12), 0.3),)

  config.model.moe.expert_bias.update_rule = 'sign'
  config.model.moe.expert_bias.update_rate = 1e-3
  config.model.moe.expert_bias.update_until = recipes.step_share(config, 14.3e12)
  recipes.minimise(config, normalized_expert_level=1e-4)

  config.optim.peak_lr = 2.2e-4
  config.optim.schedule = 'stages'
  config.optim.stages = (
    (recipes.step_share(config, 10e12), 1.0, 'constant'),
    (recipes.step_share(config, 14.3e12), 0.1, 'cosine'),
    (recipes.step_share(config, 14.633e12), 0.1, 'constant'),
    (1.0, 7.3 / 220, 'constant'),
  )
  return recipes.variant(config, variant, VARIANTS)


def _long_32k(config: base.Page):
  _long(config, 32_768, 1920)


def _long_128k(config: base.Page):
  _long(config, 131_072, 480)


def _long(config: base.Page, length: int, batch_size: int):
  recipes.long_context(config, length, batch_size, learning_rate=7.3e-6, mscale=1.0)
  config.train.mtp_loss_ramp = ()
  config.model.moe.expert_bias.update_rate = 0.0


VARIANTS = {'long_32k': _long_32k, 'long_128k': _long_128k}
