"""What every field of `model.attention` means, its type, and the rules between fields.

How keys and values are made (`kind`), how positions enter (`rope`) and how scores are computed
(`impl`) are independent choices.
"""

import dataclasses
import math
from collections.abc import Mapping

from moe_jax import errors

KINDS = ('gqa', 'mla')
IMPLS = ('auto', 'reference', 'short', 'chunked', 'dot_product', 'splash', 'tokamax')
ROPE_LAYOUTS = ('half', 'interleaved')


@dataclasses.dataclass(frozen=True)
class YarnConfig:
  """YaRN: a longer context by slower rotations (arXiv 2309.00071; DeepSeek-V2, section 3.1.4)."""

  factor: float  # s, target length / original length; 1.0 = off
  original_max_seq_len: int  # length that was trained before
  beta_fast: float  # pairs with more turns than this over the original length keep their frequency
  beta_slow: float  # pairs with fewer turns than this are slowed down by `factor`
  # The cosines grow by m(mscale) / m(mscale_all_dim), with m(a) = 0.1 a ln s + 1.
  mscale: float
  mscale_all_dim: float  # the softmax scale grows by m(mscale_all_dim)^2; 0 = by nothing


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """Rotary positions."""

  theta: float  # base of the frequencies, theta^(-2i/H)
  layout: str  # one of ROPE_LAYOUTS: pair i is (i, i + H/2), or (2i, 2i + 1) as in V2 and V3
  yarn: YarnConfig


@dataclasses.dataclass(frozen=True)
class MLAConfig:
  """Multi-head latent attention (DeepSeek-V2, section 2.1); read with kind 'mla'."""

  q_lora_rank: int  # d_c', width of the query latent; 0 = queries come straight from the input
  kv_lora_rank: int  # R (d_c), width of the latent that the cache holds
  qk_nope_head_dim: int  # d_h, part of a query or key without position
  qk_rope_head_dim: int  # d_h^R, rotated part, whose key is one for all heads; even
  v_head_dim: int  # width of a value

  @property
  def latent_width(self) -> int:
    """Numbers per token that keys and values of all heads are made from: R + Hr."""
    return self.kv_lora_rank + self.qk_rope_head_dim


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
  """Self-attention: multi-head with grouped key-value heads, or latent; rotary positions."""

  kind: str  # one of KINDS: 'gqa' (MHA, GQA, MQA) or 'mla'
  impl: str  # one of IMPLS: how scores are computed; 'auto' asks the platform
  num_kv_heads: int  # gqa: = model.num_heads is MHA, 1 is MQA, anything between is GQA
  head_dim: int  # gqa: size of one head, H; must be even for the rotation
  rope: RopeConfig
  mla: MLAConfig
  num_experts: int  # gqa: mixture of attention heads (DS-MoE), experts that share them; 0 = none

  @property
  def qk_head_dim(self) -> int:
    """Width of a query, and of a key."""
    latent = self.mla.qk_nope_head_dim + self.mla.qk_rope_head_dim
    return latent if self.kind == 'mla' else self.head_dim

  @property
  def v_head_dim(self) -> int:
    """Width of a value."""
    return self.mla.v_head_dim if self.kind == 'mla' else self.head_dim

  @property
  def softmax_scale(self) -> float:
    """Factor on every logit: qk_head_dim^-0.5, times m(mscale_all_dim)^2 under YaRN."""
    yarn = self.rope.yarn
    return self.qk_head_dim**-0.5 * yarn_mscale(yarn.factor, yarn.mscale_all_dim) ** 2


def yarn_mscale(factor: float, mscale: float) -> float:
  """m(mscale) = 0.1 mscale ln(factor) + 1, and 1 without stretching (DeepSeek's code)."""
  return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def validate(attention: AttentionConfig, num_heads: int):
  """The rules inside `model.attention`.

  Raises:
    errors.InputError: names the field, its value, the rule and the way out.
  """
  prefix = 'model.attention'
  errors.choice(f'{prefix}.kind', attention.kind, KINDS)
  errors.choice(f'{prefix}.impl', attention.impl, IMPLS)
  if attention.kind == 'mla':
    _validate_mla(attention)
  else:
    _validate_heads(attention, num_heads)
  _validate_rope(attention.rope)


def _validate_heads(attention: AttentionConfig, num_heads: int):
  errors.at_least(attention, 'model.attention', 1, 'num_kv_heads', 'head_dim')
  errors.require(
    num_heads % attention.num_kv_heads == 0,
    f'config.model.attention.num_kv_heads={attention.num_kv_heads} must divide '
    f'model.num_heads={num_heads}; choose a divisor of {num_heads}',
  )
  _require_even('head_dim', attention.head_dim)


def _validate_mla(attention: AttentionConfig):
  mla, prefix = attention.mla, 'model.attention.mla'
  sizes = ('kv_lora_rank', 'qk_nope_head_dim', 'qk_rope_head_dim', 'v_head_dim')
  errors.at_least(mla, prefix, 1, *sizes)
  errors.at_least(mla, prefix, 0, 'q_lora_rank')
  _require_even('mla.qk_rope_head_dim', mla.qk_rope_head_dim)
  errors.require(
    not attention.num_experts,
    f'config.model.attention.num_experts={attention.num_experts} mixes the heads of kind gqa only; '
    "set it to 0, or kind='gqa'",
  )


def _require_even(name: str, value: int):
  errors.require(
    value % 2 == 0,
    f'config.model.attention.{name}={value} must be even: RoPE rotates pairs; choose {value + 1}',
  )


def _validate_rope(rope: RopeConfig):
  prefix, yarn = 'config.model.attention.rope', rope.yarn
  errors.require(rope.theta > 1, f'{prefix}.theta={rope.theta} must be above 1; 10000 is usual')
  errors.choice('model.attention.rope.layout', rope.layout, ROPE_LAYOUTS)
  errors.require(
    1 <= yarn.factor < math.inf,
    f'{prefix}.yarn.factor={yarn.factor} must be at least 1; 1.0 switches YaRN off',
  )
  names = ('mscale', 'mscale_all_dim', 'beta_slow')
  errors.at_least(yarn, 'model.attention.rope.yarn', 0, *names)
  errors.at_least(yarn, 'model.attention.rope.yarn', 1, 'original_max_seq_len')
  errors.require(
    yarn.factor == 1 or 0 < yarn.beta_slow < yarn.beta_fast,
    f'{prefix}.yarn.beta_slow={yarn.beta_slow} must be positive and below beta_fast='
    f'{yarn.beta_fast}; 1 and 32 are usual',
  )


def effective_settings(attention: AttentionConfig) -> Mapping[str, object]:
  """Flat settings without those of the other kind, and of YaRN if it is off."""
  flat = {'kind': attention.kind, 'impl': attention.impl}
  if attention.kind == 'mla':
    flat |= {f'mla.{k}': v for k, v in dataclasses.asdict(attention.mla).items()}
  else:
    names = ('num_kv_heads', 'head_dim', *(['num_experts'] if attention.num_experts else []))
    flat |= {name: getattr(attention, name) for name in names}
  flat |= {'rope.theta': attention.rope.theta, 'rope.layout': attention.rope.layout}
  if attention.rope.yarn.factor > 1:
    flat |= {f'rope.yarn.{k}': v for k, v in dataclasses.asdict(attention.rope.yarn).items()}
  return flat
