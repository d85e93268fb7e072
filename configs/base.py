"""The only home of default values. A page starts from `get_config()` and changes a few of them.

`moe_jax/config.py` says what each field means. `variant` helps pages that take an argument after a
colon.
"""

from collections.abc import Callable, Mapping

import ml_collections

Page = ml_collections.ConfigDict


def get_config() -> Page:
  """A small dense-first DeepSeekMoE on the Python standard library; all keys are present."""
  c = ml_collections.ConfigDict()

  c.model = ml_collections.ConfigDict()
  c.model.vocab_size = 8192
  c.model.max_seq_len = 512
  c.model.embed_dim = 256
  c.model.mlp_dim = 704  # 8/3 D, up to a multiple of 64
  c.model.num_layers = 6
  c.model.num_dense_layers = 1
  c.model.num_heads = 4
  c.model.norm_eps = 1e-6
  c.model.init_std = 0.006
  c.model.dtype = 'float32'
  c.model.param_dtype = 'float32'
  c.model.remat = 'none'

  c.model.attention = ml_collections.ConfigDict()
  c.model.attention.num_kv_heads = 4
  c.model.attention.head_dim = 64
  c.model.attention.rope_theta = 10_000.0

  c.model.moe = ml_collections.ConfigDict()
  c.model.moe.num_experts = 63
  c.model.moe.num_shared_experts = 1
  c.model.moe.num_experts_per_tok = 7
  c.model.moe.moe_mlp_dim = 176  # a quarter of mlp_dim: m = 4
  c.model.moe.router = 'softmax_topk'
  c.model.moe.norm_topk_prob = False
  c.model.moe.load_balance_loss_weight = 0.01
  c.model.moe.dispatch = 'dropless'
  c.model.moe.grouped_matmul = 'auto'

  c.data = ml_collections.ConfigDict()
  c.data.source = 'python_source'
  c.data.path = ''  # python_source: the standard library of the running interpreter
  c.data.text_field = 'text'
  c.data.domain_field = ''
  c.data.heldout_fraction = 0.02
  c.data.synthetic_documents = 1000
  c.data.tokenizer = 'bpe'  # trained to model.vocab_size entries
  c.data.bos_token = '<｜begin▁of▁sentence｜>'
  c.data.eos_token = '<｜end▁of▁sentence｜>'
  c.data.fim_rate = 0.0
  c.data.prefetch = 8
  c.data.cache_dir = ''
  c.data.mixture = ml_collections.ConfigDict()

  c.optim = ml_collections.ConfigDict()
  c.optim.peak_lr = 1e-3
  c.optim.schedule = 'multi_step'
  c.optim.warmup_steps = 100
  c.optim.final_lr_fraction = 0.1
  c.optim.multi_step_boundaries = (0.8, 0.9)
  c.optim.multi_step_factor = 0.316
  c.optim.beta1 = 0.9
  c.optim.beta2 = 0.95
  c.optim.eps = 1e-8
  c.optim.weight_decay = 0.1
  c.optim.clip_norm = 1.0

  c.train = ml_collections.ConfigDict()
  c.train.num_steps = 1000
  c.train.batch_size = 32
  c.train.batch_ramp = ()
  c.train.micro_batch_size = 0
  c.train.seed = 0
  c.train.z_loss_weight = 0.0
  c.train.log_every = 10
  c.train.eval_every = 0
  c.train.sample_prompt = 'def main('
  c.train.sample_tokens = 64

  c.checkpoint = ml_collections.ConfigDict()
  c.checkpoint.save_every = 500
  c.checkpoint.keep_last = 2
  c.checkpoint.keep_every = 0

  c.mesh = ml_collections.ConfigDict()
  c.mesh.data = -1

  c.paper = ml_collections.ConfigDict()
  c.paper.mlp_dim = 0.0
  c.paper.moe_mlp_dim = 0.0
  return c


def make_dense(config: Page, mlp_dim: int) -> Page:
  """Turns `config` into a model without experts whose FFNs all have width `mlp_dim`."""
  config.model.moe.num_experts = 0
  config.model.moe.num_shared_experts = 0
  config.model.num_dense_layers = 0
  config.model.mlp_dim = mlp_dim
  return config


def variant(config: Page, name: str, variants: Mapping[str, Callable[[Page], object]]) -> Page:
  """Applies the variant named after the colon of `--config=page.py:name` ('' = the page itself)."""
  if name:
    if name not in variants:
      raise ValueError(
        f'unknown variant {name!r} of this config page; choose one of {", ".join(sorted(variants))}'
      )
    variants[name](config)
  return config
