"""The only home of default values. A page starts from `get_config()` and changes a few of them.

`moe_jax/config.py` says what each field means. Below it, what several pages share: functions that
change a page and return it, the sizes `tiny` and `small`, and `variant` for pages that take an
argument after a colon.
"""

import math
from collections.abc import Callable, Mapping

import ml_collections

Page = ml_collections.ConfigDict
Variant = Callable[[Page], object]  # changes a page
Variants = dict[str, Variant]

# The tokens over which each balance loss averages in the paper it comes from.
LOSS_SCOPES = {
  'expert_level': 'sequence',
  'device_level': 'sequence',
  'communication': 'sequence',
  'switch': 'micro_batch',
  'gshard': 'micro_batch',
  'squared_deviation': 'micro_batch',
  'normalized_expert_level': 'sequence',
  'mutual_information': 'micro_batch',
  'router_z': 'micro_batch',
  'attention_mutual_information': 'micro_batch',
}


def get_config() -> Page:
  """A small dense-first DeepSeekMoE on the Python standard library; all keys are present."""
  c = ml_collections.ConfigDict()
  c.init_from = ''

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
  c.model.scan_layers = True

  c.model.num_mtp_layers = 0
  c.model.attention = _attention()
  c.model.moe = _moe()

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
  c.optim.stages = ()
  c.optim.beta1 = 0.9
  c.optim.beta2 = 0.95
  c.optim.eps = 1e-8
  c.optim.weight_decay = 0.1
  c.optim.clip_norm = 1.0
  c.optim.moment_dtype = 'float32'

  c.train = ml_collections.ConfigDict()
  c.train.num_steps = 1000
  c.train.batch_size = 32
  c.train.batch_ramp = ()
  c.train.micro_batch_size = 0
  c.train.loss_chunk = 4096
  c.train.seed = 0
  c.train.z_loss_weight = 0.0
  c.train.mtp_loss_weight = 0.3
  c.train.mtp_loss_ramp = ()
  c.train.log_every = 10
  c.train.eval_every = 0
  c.train.routing_every = 100
  c.train.sample_prompt = 'def main('
  c.train.sample_tokens = 64

  c.checkpoint = ml_collections.ConfigDict()
  c.checkpoint.save_every = 500
  c.checkpoint.keep_last = 2
  c.checkpoint.keep_every = 0

  c.mesh = ml_collections.ConfigDict()
  c.mesh.dcn_data = 1
  c.mesh.dcn_fsdp = 1
  c.mesh.data = -1
  c.mesh.fsdp = 1
  c.mesh.expert = 1
  c.mesh.sequence = 1
  c.mesh.tensor = 1
  c.mesh.zero1 = False

  c.paper = ml_collections.ConfigDict()
  c.paper.mlp_dim = 0.0
  c.paper.moe_mlp_dim = 0.0
  return c


def _attention() -> Page:
  """The section `model.attention`: MHA; the sizes of MLA are for four heads of 64."""
  attention = ml_collections.ConfigDict()
  attention.kind = 'gqa'
  attention.impl = 'auto'
  attention.num_kv_heads = 4
  attention.head_dim = 64
  attention.num_experts = 0

  attention.rope = ml_collections.ConfigDict()
  attention.rope.theta = 10_000.0
  attention.rope.layout = 'half'
  yarn = attention.rope.yarn = ml_collections.ConfigDict()
  yarn.factor = 1.0
  yarn.original_max_seq_len = 4096
  yarn.beta_fast = 32.0
  yarn.beta_slow = 1.0
  yarn.mscale = 1.0
  yarn.mscale_all_dim = 1.0

  mla = attention.mla = ml_collections.ConfigDict()
  mla.q_lora_rank = 0
  mla.kv_lora_rank = 128
  mla.qk_nope_head_dim = 64
  mla.qk_rope_head_dim = 32
  mla.v_head_dim = 64
  return attention


def _moe() -> Page:
  """The section `model.moe`."""
  moe = ml_collections.ConfigDict()
  moe.num_experts = 63
  moe.num_shared_experts = 1
  moe.num_experts_per_tok = 7
  moe.moe_mlp_dim = 176  # a quarter of mlp_dim: m = 4
  moe.router = 'topk'
  moe.score_func = 'softmax'
  moe.norm_topk_prob = False
  moe.routed_scaling_factor = 1.0
  moe.num_expert_groups = 1
  moe.num_limited_groups = 1
  moe.group_score = 'max'
  moe.num_virtual_devices = 1
  moe.dispatch = 'dropless'
  moe.grouped_matmul = 'auto'
  moe.exchange = ml_collections.ConfigDict()
  moe.exchange.kind = 'auto'
  moe.exchange.buffer_factor = 0.0

  options = moe.options = ml_collections.ConfigDict()
  options.input_jitter = 0.0
  options.logit_norm_scale = 0.0
  options.random_second_expert = False
  options.hash_table = 'random'
  options.chunk_tokens = 0
  options.shuffle_chunks = False
  options.skew = 0.0
  options.inference = 'all'
  options.inference_threshold = 0.48  # DS-MoE 3B
  options.replay_path = ''
  options.replay_rows = 0

  moe.expert_bias = ml_collections.ConfigDict()
  moe.expert_bias.update_rule = 'none'
  moe.expert_bias.form = 'additive'
  moe.expert_bias.update_rate = 1e-3
  moe.expert_bias.update_until = 1.0

  moe.balance = ml_collections.ConfigDict()
  for name, scope in LOSS_SCOPES.items():
    moe.balance[name] = ml_collections.ConfigDict({'weight': 0.0, 'scope': scope})
  moe.balance.expert_level.weight = 0.01
  moe.balance.adaptive = ml_collections.ConfigDict()
  moe.balance.adaptive.loss = ''
  moe.balance.adaptive.slope = 0.2
  moe.balance.adaptive.max_coefficient = 0.01
  moe.balance.adaptive.decay = 0.99
  moe.balance.adaptive.capacity_factor = 1.0

  moe.capacity = ml_collections.ConfigDict()
  moe.capacity.policy = 'none'
  moe.capacity.factor = 1.25
  moe.capacity.group_rows = 1
  moe.capacity.exempt_fraction = 0.0
  moe.capacity.at_eval = False
  return moe


def make_dense(config: Page, width: float) -> Page:
  """Turns `config` into a model without experts whose FFNs all have this width."""
  config.model.moe.num_experts = 0
  config.model.moe.num_shared_experts = 0
  config.model.num_dense_layers = 0
  config.paper.moe_mlp_dim = 0.0
  return dense_ffn(config, width)


def dense_ffn(config: Page, width: float) -> Page:
  """Sets the FFN width of the dense layers; a fractional one is kept for the paper's FLOPs."""
  config.model.mlp_dim, config.paper.mlp_dim = round(width), _unaligned(width)
  return config


def experts(config: Page, shared: int, routed: int, per_tok: int, width: float) -> Page:
  """`shared` + `per_tok` of `routed` experts, all of this width, as in `dense_ffn`."""
  moe = config.model.moe
  moe.num_shared_experts, moe.num_experts, moe.num_experts_per_tok = shared, routed, per_tok
  moe.moe_mlp_dim, config.paper.moe_mlp_dim = round(width), _unaligned(width)
  return config


def _unaligned(width: float) -> float:
  """What `config.paper` holds: the width, or 0 if the model has it exactly."""
  return 0.0 if math.isclose(width, round(width)) else width


def minimise(config: Page, **weights: float) -> Page:
  """Gives these balance losses these weights, and all others 0: they are only reported."""
  for name in LOSS_SCOPES:
    config.model.moe.balance[name].weight = 0.0
  for name, weight in weights.items():
    config.model.moe.balance[name].weight = weight
  return config


def ladder(ffn: float) -> Variants:
  """DeepSeekMoE's ladder (arXiv 2401.06066, Figures 3 and 6, Tables 1-2) for any size of model.

  The page itself is its top, 1 shared + 7 of 63 experts of width `ffn` / 4.

  Args:
    ffn: width of the conventional FFN that is made sparse and then refined.

  Returns:
    The variants of a page. Without a printed drop or capacity, none of them drops a token.
  """

  def refined(shared: int, routed: int, per_tok: int, size: float) -> Variant:
    return lambda config: experts(config, shared, routed, per_tok, size * ffn)

  def gshard(scale: float) -> Variant:
    return lambda config: _gshard(config, scale * ffn)

  def dense(scale: int) -> Variant:
    return lambda config: make_dense(config, scale * ffn)

  return {
    'gshard': gshard(1.0),
    'gshard_x1.2': gshard(1.2),
    'gshard_x1.5': gshard(1.5),
    'hash': lambda config: _hash(config, ffn),
    'switch': refined(0, 16, 1, 1.0),
    'dense': dense(1),
    'dense_x4': dense(4),
    'dense_x16': dense(16),
    '1_15': refined(1, 15, 1, 1.0),
    '1_31': refined(1, 31, 3, 0.5),
    'shared_2': refined(2, 62, 6, 0.25),
    'shared_4': refined(4, 60, 4, 0.25),
    'half': refined(1, 63, 3, 0.25),
  }


def _gshard(config: Page, width: float):
  experts(config, shared=0, routed=16, per_tok=2, width=width)
  config.model.moe.norm_topk_prob = True


def _hash(config: Page, width: float):
  experts(config, shared=0, routed=16, per_tok=1, width=width)
  config.model.moe.router = 'hash'
  minimise(config)


def deepseek(config: Page) -> Page:
  """What DeepSeek LLM, V2 and V3 have in common; sizes are left to the page."""
  config.model.vocab_size = 102_400  # 100,000 and some special tokens, padded
  config.model.max_seq_len = 4096
  config.model.init_std = 0.006
  config.model.dtype = 'bfloat16'
  config.model.remat = 'moe_core'
  config.model.attention.head_dim = 128
  config.optim.schedule = 'multi_step'
  config.optim.warmup_steps = 2000
  config.train.eval_every = 1000
  return config


def latent_attention(config: Page, q_lora_rank: int) -> Page:
  """MLA as V2 and V3 have it; with kind 'gqa' the page is the MHA that V2 compares it with."""
  attention = config.model.attention
  attention.kind = 'mla'
  attention.num_kv_heads = config.model.num_heads
  attention.rope.layout = 'interleaved'
  attention.mla.q_lora_rank = q_lora_rank
  attention.mla.kv_lora_rank = 512
  attention.mla.qk_nope_head_dim = 128
  attention.mla.qk_rope_head_dim = 64
  attention.mla.v_head_dim = 128
  return config


def multi_head(config: Page) -> Page:
  """Every query head with keys and values of its own."""
  config.model.attention.num_kv_heads = config.model.num_heads
  return config


def multi_latent(config: Page, kv_lora_rank: int) -> Page:
  """MLA in V2's proportions: a rotated part of half a head; without query compression."""
  attention = config.model.attention
  attention.kind = 'mla'
  attention.mla.kv_lora_rank = kv_lora_rank
  attention.mla.qk_nope_head_dim = attention.mla.v_head_dim = attention.head_dim
  attention.mla.qk_rope_head_dim = attention.head_dim // 2
  return config


def long_context(
  config: Page, length: int, batch_size: int, learning_rate: float, mscale: float
) -> Page:
  """1000 further steps on longer rows: YaRN by 40, from 4K to up to 160K, at a constant rate."""
  config.model.max_seq_len = length
  yarn = config.model.attention.rope.yarn
  yarn.factor = 40.0
  yarn.original_max_seq_len = 4096
  yarn.mscale = yarn.mscale_all_dim = mscale
  config.optim.schedule = 'constant'
  config.optim.stages = ()
  config.optim.peak_lr = learning_rate
  config.optim.warmup_steps = 0
  config.train.batch_size, config.train.batch_ramp = batch_size, ()
  config.train.num_steps = 1000
  config.train.eval_every = 250
  return config


def ramp_batch(config: Page, first: int, tokens: float) -> Page:
  """From `first` rows to `train.batch_size` in four equal rises, each after a quarter of `tokens`.

  The papers give the two sizes and the tokens; the steps between are ours.
  """
  sizes = [first + i * (config.train.batch_size - first) // 4 for i in range(4)]
  steps = [round(tokens / 4 / size / config.model.max_seq_len) for size in sizes]
  config.train.batch_ramp = tuple((sum(steps[: i + 1]), size) for i, size in enumerate(sizes))
  return config


def steps_of(config: Page, tokens: float) -> int:
  """Steps in which the page, whose batch may grow, sees this many tokens."""
  length, start = config.model.max_seq_len, 0
  for until, size in config.train.batch_ramp:
    seen = (until - start) * size * length
    if tokens < seen:
      return start + round(tokens / size / length)
    tokens, start = tokens - seen, until
  return start + round(tokens / config.train.batch_size / length)


def step_share(config: Page, tokens: float) -> float:
  """The share of `train.num_steps` after which the page has seen this many tokens."""
  return steps_of(config, tokens) / config.train.num_steps


TINY_FFN = 128  # 2 D; a quarter is 32
SMALL_FFN = 1024  # 8/3 D as in the paper, here without a remainder; a quarter is 256


def tiny(config: Page) -> Page:
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
  experts(config, shared=1, routed=63, per_tok=7, width=TINY_FFN / 4)
  config.optim.peak_lr = 6e-3  # better than 3e-3 and, for fine-grained experts, 1e-2
  config.optim.schedule = 'cosine'
  config.optim.warmup_steps = 20
  config.train.num_steps = 300
  config.train.batch_size = 8
  config.train.log_every = 20
  config.train.routing_every = 50
  config.checkpoint.save_every = 300
  return config


def small(config: Page) -> Page:
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
  experts(config, shared=1, routed=63, per_tok=7, width=SMALL_FFN / 4)
  config.optim.peak_lr = 1e-3
  config.optim.schedule = 'multi_step'
  config.optim.warmup_steps = 200
  config.train.num_steps = 4000
  config.train.batch_size = 32  # 32K tokens
  config.train.eval_every = 1000
  config.checkpoint.save_every = 1000
  return config


def variant(config: Page, name: str, variants: Mapping[str, Variant]) -> Page:
  """Applies the variant named after the colon of `--config=page.py:name` ('' = the page itself)."""
  if name:
    if name not in variants:
      raise ValueError(
        f'unknown variant {name!r} of this config page; choose one of {", ".join(sorted(variants))}'
      )
    variants[name](config)
  return config
