"""What several config pages share: functions that change a page and return it, and `variant`."""

import math
from collections.abc import Mapping

from configs import base


def make_dense(config: base.Page, width: float) -> base.Page:
  """Turns `config` into a model without experts whose FFNs all have this width."""
  config.model.moe.num_experts = 0
  config.model.moe.num_shared_experts = 0
  config.model.num_dense_layers = 0
  config.paper.moe_mlp_dim = 0.0
  return dense_ffn(config, width)


def dense_ffn(config: base.Page, width: float) -> base.Page:
  """Sets the FFN width of the dense layers; a fractional one is kept for the paper's FLOPs."""
  config.model.mlp_dim, config.paper.mlp_dim = round(width), _unaligned(width)
  return config


def experts(config: base.Page, shared: int, routed: int, per_tok: int, width: float) -> base.Page:
  """`shared` + `per_tok` of `routed` experts, all of this width, as in `dense_ffn`."""
  moe = config.model.moe
  moe.num_shared_experts, moe.num_experts, moe.num_experts_per_tok = shared, routed, per_tok
  moe.moe_mlp_dim, config.paper.moe_mlp_dim = round(width), _unaligned(width)
  return config


def _unaligned(width: float) -> float:
  """What `config.paper` holds: the width, or 0 if the model has it exactly."""
  return 0.0 if math.isclose(width, round(width)) else width


def minimise(config: base.Page, **weights: float) -> base.Page:
  """Gives these balance losses these weights, and all others 0: they are only reported."""
  for name in base.LOSS_SCOPES:
    config.model.moe.balance[name].weight = 0.0
  for name, weight in weights.items():
    config.model.moe.balance[name].weight = weight
  return config


def ladder(ffn: float) -> base.Variants:
  """DeepSeekMoE's ladder (arXiv 2401.06066, Figures 3 and 6, Tables 1-2) for any size of model.

  The page itself is its top, 1 shared + 7 of 63 experts of width `ffn` / 4.

  Args:
    ffn: width of the conventional FFN that is made sparse and then refined.

  Returns:
    The variants of a page. Without a printed drop or capacity, none of them drops a token.
  """

  def refined(shared: int, routed: int, per_tok: int, size: float) -> base.Variant:
    return lambda config: experts(config, shared, routed, per_tok, size * ffn)

  def gshard(scale: float) -> base.Variant:
    return lambda config: _gshard(config, scale * ffn)

  def dense(scale: int) -> base.Variant:
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


def _gshard(config: base.Page, width: float):
  experts(config, shared=0, routed=16, per_tok=2, width=width)
  config.model.moe.norm_topk_prob = True


def _hash(config: base.Page, width: float):
  experts(config, shared=0, routed=16, per_tok=1, width=width)
  config.model.moe.router = 'hash'
  minimise(config)


def deepseek(config: base.Page) -> base.Page:
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


def latent_attention(config: base.Page, q_lora_rank: int) -> base.Page:
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


def multi_head(config: base.Page) -> base.Page:
  """Every query head with keys and values of its own."""
  config.model.attention.num_kv_heads = config.model.num_heads
  return config


def multi_latent(config: base.Page, kv_lora_rank: int) -> base.Page:
  """MLA in V2's proportions: a rotated part of half a head; without query compression."""
  attention = config.model.attention
  attention.kind = 'mla'
  attention.mla.kv_lora_rank = kv_lora_rank
  attention.mla.qk_nope_head_dim = attention.mla.v_head_dim = attention.head_dim
  attention.mla.qk_rope_head_dim = attention.head_dim // 2
  return config


def long_context(
  config: base.Page, length: int, batch_size: int, learning_rate: float, mscale: float
) -> base.Page:
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


def ramp_batch(config: base.Page, first: int, tokens: float) -> base.Page:
  """From `first` rows to `train.batch_size` in four equal rises, each after a quarter of `tokens`.

  The papers give the two sizes and the tokens; the steps between are ours.
  """
  sizes = [first + i * (config.train.batch_size - first) // 4 for i in range(4)]
  steps = [round(tokens / 4 / size / config.model.max_seq_len) for size in sizes]
  config.train.batch_ramp = tuple((sum(steps[: i + 1]), size) for i, size in enumerate(sizes))
  return config


def steps_of(config: base.Page, tokens: float) -> int:
  """Steps in which the page, whose batch may grow, sees this many tokens."""
  length, start = config.model.max_seq_len, 0
  for until, size in config.train.batch_ramp:
    seen = (until - start) * size * length
    if tokens < seen:
      return start + round(tokens / size / length)
    tokens, start = tokens - seen, until
  return start + round(tokens / config.train.batch_size / length)


def step_share(config: base.Page, tokens: float) -> float:
  """The share of `train.num_steps` after which the page has seen this many tokens."""
  return steps_of(config, tokens) / config.train.num_steps


def tune_on_sums(config: base.Page) -> base.Page:
  """SFT of any run on sums of up to three operations on numbers to 20, without balance losses."""
  config.objective.kind = 'sft'
  config.objective.inherit = True
  config.objective.balance = False
  config.data.source = 'arithmetic'
  config.data.path = '?max_value=20&operations=3&problems=20000'
  config.data.tokenizer = ''  # that of init_from, as the next
  config.data.chat_format = ''
  config.data.heldout_fraction = 0.05
  config.optim.peak_lr = 2e-3
  config.optim.weight_decay = 0.0
  config.train.num_steps = 300
  config.train.batch_size = 8
  config.train.sample_prompt = ''
  config.train.eval_every = 100
  config.checkpoint.save_every = 100
  return config


def small_sums(config: base.Page) -> base.Page:
  """Sums of up to two operations on numbers to 20, a tenth of the questions held out."""
  config.data.source = 'arithmetic'
  config.data.path = '?max_value=20&operations=2&problems=20000'
  config.data.heldout_fraction = 0.1
  return config


def small_programs(config: base.Page) -> base.Page:
  """Functions of up to two operations on a number, a fifth of the questions held out."""
  config.data.source = 'programs'
  config.data.path = '?operations=2&max_value=5&kinds=1&problems=20000'
  config.data.heldout_fraction = 0.2
  return config


def tune_on_lines(config: base.Page) -> base.Page:
  """SFT of a run of configs/purify.py on short labelled texts out of `data.path`."""
  config.objective.kind = 'sft'
  config.objective.inherit = True
  config.objective.balance = False
  config.data.source, config.data.path = 'conversations', ''
  config.data.tokenizer = ''  # that of init_from
  config.data.chat_format = 'marks'  # answers of different labels begin with different bytes
  config.data.heldout_fraction = 0.05
  config.optim.peak_lr = 3e-3
  config.optim.schedule = 'cosine'
  config.optim.warmup_steps = 20
  config.optim.weight_decay = 0.0
  config.train.num_steps = 150
  config.train.batch_size = 16
  config.train.routing_every = 0
  config.train.sample_prompt = ''
  config.checkpoint.save_every = 500
  config.checkpoint.keep_last = 1
  return config


def variant(config: base.Page, name: str, variants: Mapping[str, base.Variant]) -> base.Page:
  """Applies the variant named after the colon of `--config=page.py:name` ('' = the page itself)."""
  if name:
    if name not in variants:
      raise ValueError(
        f'unknown variant {name!r} of this config page; choose one of {", ".join(sorted(variants))}'
      )
    variants[name](config)
  return config
