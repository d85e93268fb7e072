"""Does the machinery run? A byte-level MoE on made-up text; learns nothing worth keeping.

Run:    python -m experiments.train --config=configs/smoke.py --workdir=runs/smoke
Takes:  25 s on 2 CPU cores, 11 s once compiled programs are cached.
Expect: a loss near 1.0 nats per byte at step 100 (5.6 at the start), 1.17 bits per byte held out.
"""

from configs import base, recipes

VARIANTS = {'dense': lambda config: recipes.make_dense(config, 64)}


def get_config(variant=''):
  """`:dense` has no experts and the same activated FFN parameters."""
  config = base.get_config()
  config.model.vocab_size = 288  # 256 bytes and the special tokens, up to a multiple of 32
  config.model.max_seq_len = 128
  config.model.embed_dim = 32
  config.model.mlp_dim = 64
  config.model.num_layers = 3
  config.model.num_heads = 2
  config.model.init_std = 0.05
  config.model.attention.num_kv_heads = 1
  config.model.attention.head_dim = 16
  config.model.moe.num_experts = 8
  config.model.moe.num_experts_per_tok = 3
  config.model.moe.moe_mlp_dim = 16
  config.data.source = 'synthetic'
  config.data.synthetic_documents = 400
  config.data.tokenizer = 'bytes'
  config.data.heldout_fraction = 0.1
  config.optim.peak_lr = 1e-2
  config.optim.schedule = 'cosine'
  config.optim.warmup_steps = 10
  config.train.num_steps = 100
  config.train.batch_size = 8
  config.train.sample_prompt = 'def '
  config.train.sample_tokens = 32
  config.checkpoint.save_every = 50
  return recipes.variant(config, variant, VARIANTS)
