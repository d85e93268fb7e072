"""DeepSeekMoE 145B (arXiv 2401.06066, section 7): 144.6B parameters, 22.2B activated, 245B tokens.

Run:    python -m experiments.train --config=configs/deepseekmoe_145b.py[:VARIANT] --workdir=W
          --config.data.source=parquet --config.data.path='corpus/*.parquet'
          --config.train.micro_batch_size=512
Count:  python -m experiments.describe --config=configs/deepseekmoe_145b.py[:VARIANT]
Takes:  3.4e22 FLOPs; time not yet measured.
Expect: the Pile loss below (the paper's; not yet reproduced here).

  variant       model                                total / activated   FLOPs per 4K   Pile loss
  (none)        4 shared + 12 of 128, 1/8 size       144.6B / 22.2B      585.6T         1.876
  half          2 shared + 6 of 128, 1/8 size        142.3B / 12.2B      374.6T         1.888
  gshard_137b   2 of 16, whole size                  136.5B / 21.6B      572.7T         1.961
  dense_67b     DeepSeek LLM 67B (arXiv 2401.02954)  67.4B / 67.4B       2057.5T        1.905

The paper's corpus is not public, and the default source only proves that the page runs: point
config.data at a real one. The balance losses are the paper's, alpha_1 = 0.003 and, over the 4
devices of a layer's experts, alpha_2 = 0.05. Not stated, chosen here: alpha_1 of half and both of
gshard_137b, GShard's two gates are divided by their sum, and no model drops a token.

The width of the first, dense layer is not stated; the printed figures pin it down:
* (none): 22,727..23,058 give 585.6T, 144.6B and 22.2B with experts of 1408 = 8/3 D / 8 up to a
  multiple of 64. Taken: 22,912, the multiple of 64 nearest the middle.
* gshard_137b: 19,049..19,380 give all three with experts of 10,944 = 8/3 D up to a multiple of 64.
  Taken: 19,200, likewise.
* half: 11,132..11,463 give 374.6T. Taken: 11,264 = the 2 + 6 experts that a token activates. No
  such width gives its printed sizes: 12.2B contradicts the FLOPs, which imply our 13.6B, and our
  total is 142.37B, or 142.34B without the routers.
The FLOPs of these three therefore count the model's own widths. Those of dense_67b count the
unaligned 8/3 D, and its 8 key-value heads as if they were 64.
dense_67b's peak rate is DeepSeek LLM's, constant because 245B tokens end inside its first stage.
"""

from configs import base, recipes


def get_config(variant: str = '') -> base.Page:
  """The page, or one of `VARIANTS`."""
  config = base.get_config()

  config.model.vocab_size = 102_400
  config.model.max_seq_len = 4096
  config.model.embed_dim = 4096
  config.model.mlp_dim = 22_912
  config.model.num_layers = 62
  config.model.num_dense_layers = 1
  config.model.num_heads = 32
  config.model.init_std = 0.006
  config.model.dtype = 'bfloat16'
  config.model.remat = 'moe_core'
  config.model.attention.num_kv_heads = 32
  config.model.attention.head_dim = 128
  config.model.moe.num_experts = 128
  config.model.moe.num_shared_experts = 4
  config.model.moe.num_experts_per_tok = 12
  config.model.moe.moe_mlp_dim = 1408
  config.model.moe.num_virtual_devices = 4  # the experts of a layer lie on 4 devices
  recipes.minimise(config, expert_level=0.003, device_level=0.05)

  config.optim.peak_lr = 3.0e-4
  config.optim.schedule = 'constant'
  config.optim.warmup_steps = 2000

  config.train.num_steps = 13_000
  config.train.batch_size = 4608  # 18.9M tokens
  config.train.eval_every = 1000
  return recipes.variant(config, variant, VARIANTS)


def _half(config: base.Page):
  config.model.mlp_dim = 11_264
  config.model.moe.num_shared_experts = 2
  config.model.moe.num_experts_per_tok = 6


def _gshard_137b(config: base.Page):
  config.model.mlp_dim = 19_200
  recipes.experts(config, shared=0, routed=16, per_tok=2, width=10_944)
  config.model.moe.norm_topk_prob = True


def _dense_67b(config: base.Page):
  recipes.make_dense(config, 22_016)
  config.paper.mlp_dim = 8 / 3 * 8192
  config.model.embed_dim = 8192
  config.model.num_layers = 95
  config.model.num_heads = 64
  config.model.attention.num_kv_heads = 8
  config.optim.peak_lr = 3.2e-4


VARIANTS = {'half': _half, 'gshard_137b': _gshard_137b, 'dense_67b': _dense_67b}
