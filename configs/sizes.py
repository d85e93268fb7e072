"""Sizes that pages share: `tiny` (seconds), `laptop` (minutes), `mini` (hours), `small` (a GPU)."""

from configs import base, recipes

TINY_FFN = 128  # 2 D; a quarter is 32
LAPTOP_FFN = 256  # 2 D; a quarter is 64
MINI_FFN = 320  # 2 D; a quarter is 80
SMALL_FFN = 1024  # 8/3 D as in the paper, here without a remainder; a quarter is 256


def tiny(config: base.Page) -> base.Page:
  """DeepSeekMoE for 2 CPU cores: 1.35M parameters, 0.3M tokens. All values are ours."""
  config.model.vocab_size = 1024
  config.model.max_seq_len = 128
  config.model.embed_dim = 64
  config.model.mlp_dim = TINY_FFN
  config.model.num_layers = 3
  config.model.num_dense_layers = 0
  config.model.num_heads = 4
  config.model.init_std = 0.05
  config.model.attention.num_kv_heads = 2  # a mixture of attention heads then fits in: 2 x 2
  config.model.attention.head_dim = 16
  config.model.moe.num_virtual_devices = 8
  recipes.experts(config, shared=1, routed=63, per_tok=7, width=TINY_FFN / 4)
  config.optim.peak_lr = 6e-3  # better than 3e-3 and, for fine-grained experts, 1e-2
  config.optim.schedule = 'cosine'
  config.optim.warmup_steps = 20
  config.train.num_steps = 300
  config.train.batch_size = 8
  config.train.log_every = 20
  config.train.routing_every = 50
  config.checkpoint.save_every = 300
  return config


def laptop(config: base.Page) -> base.Page:
  """Width, depth and rate for minutes on 2 CPU cores; experts and text are the page's."""
  config.model.max_seq_len = 256
  config.model.embed_dim = 128
  config.model.num_layers = 3
  config.model.num_dense_layers = 0
  config.model.num_heads = 4
  config.model.init_std = 0.03
  config.model.attention.num_kv_heads = 4
  config.model.attention.head_dim = 32
  config.optim.peak_lr = 3e-3
  config.optim.schedule = 'cosine'
  config.optim.warmup_steps = 50
  return config


def mini(config: base.Page) -> base.Page:
  """DeepSeekMoE for hours of a CPU core: 10.9M parameters, 20M tokens. All values are ours."""
  config.model.vocab_size = 2048
  config.model.max_seq_len = 256
  config.model.embed_dim = 160
  config.model.mlp_dim = MINI_FFN
  config.model.num_layers = 4
  config.model.num_dense_layers = 0
  config.model.num_heads = 5
  config.model.init_std = 0.03
  config.model.attention.num_kv_heads = 5
  config.model.attention.head_dim = 32
  config.model.moe.num_virtual_devices = 8
  recipes.experts(config, shared=1, routed=63, per_tok=7, width=MINI_FFN / 4)
  config.optim.peak_lr = 3e-3
  config.optim.schedule = 'cosine'
  config.optim.warmup_steps = 100
  config.train.num_steps = 5000
  config.train.batch_size = 16  # 4K tokens
  config.train.log_every = 25
  config.train.routing_every = 500
  config.checkpoint.save_every = 250  # some minutes
  return config


def small(config: base.Page) -> base.Page:
  """DeepSeekMoE for one GPU: 162M parameters, 131M tokens. All values are ours."""
  config.model.vocab_size = 8192
  config.model.max_seq_len = 1024
  config.model.embed_dim = 384
  config.model.mlp_dim = SMALL_FFN
  config.model.num_layers = 8
  config.model.num_dense_layers = 0
  config.model.num_heads = 6
  config.model.init_std = 0.02
  config.model.dtype = 'bfloat16'
  config.model.attention.num_kv_heads = 6
  config.model.attention.head_dim = 64
  config.model.moe.num_virtual_devices = 8
  recipes.experts(config, shared=1, routed=63, per_tok=7, width=SMALL_FFN / 4)
  config.optim.peak_lr = 1e-3
  config.optim.schedule = 'multi_step'
  config.optim.warmup_steps = 200
  config.train.num_steps = 4000
  config.train.batch_size = 32  # 32K tokens
  config.train.eval_every = 1000
  config.checkpoint.save_every = 1000
  return config
