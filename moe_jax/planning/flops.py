"""How many parameters a model has and how much arithmetic it costs, in closed form from its config.

Two countings of training FLOPs (forward and backward, backward = 2 x forward):

* exact: what the mathematics of the model needs. A matrix of W weights costs 6 W per token; the
  routers and the output head count, the embedding look-up does not; query i attends to i + 1 keys;
  grouped and latent key-value projections have their real size. A module of multi-token prediction
  costs its projection, its block and the head once more, for every token: those at the end of a
  document, which have no target so far ahead, count too. Recomputation (remat), the wasted work of
  a masked dispatch and the work that dropped tokens save are no part of it, so that MFU compares
  runs by the model they train.
* paper: the convention behind the tables of DeepSeekMoE (arXiv 2401.06066), which full attention,
  "as if MHA" projections and unaligned FFN widths reproduce to the printed digits. It knows neither
  latent attention, whose real projections count here, nor multi-token prediction, which does not.

A token's experts are those of training, as its router's traits count them: K of them in most, on
average where experts choose tokens, and all where training is dense.

Axis letters are those of `moe_jax.models`.
"""

import dataclasses
from typing import TypeVar

from moe_jax.config import moe_config, router_traits, schema

_Number = TypeVar('_Number', int, float)

# Forward 2 (a multiplication and an addition per weight), backward twice that.
TRAIN_FLOPS_PER_WEIGHT = 6


@dataclasses.dataclass(frozen=True)
class ParameterCount:
  """Parameters of a whole model by what they are for; the fields but `mtp` add up to `total`."""

  embedding: int  # [V, D]; 0 where it is the head
  attention: int  # q, k, v and output projections, or the five of MLA (four without q_lora_rank)
  norms: int  # scales of the two norms of each layer, of the last one and of MLA's latents
  dense_ffn: int  # FFNs of the dense layers
  shared_experts: int
  routed_experts: int
  router: int  # one row of D per routed expert, and per expert of a mixture of attention heads
  head: int  # [D, V]
  mtp: int  # all of the modules of multi-token prediction, which share embedding and head

  @property
  def total(self) -> int:
    """Of the main model, which is what papers and checkpoints are named after."""
    return sum(dataclasses.astuple(self)) - self.mtp

  @property
  def without_embedding(self) -> int:
    """The total with one of the vocabulary matrices, as DeepSeek-V2 counts what is activated."""
    return self.total - self.embedding


def count_parameters(model: schema.ModelConfig) -> ParameterCount:
  """All parameters of `model`."""
  return _count(model, model.moe.num_experts)


def count_activated(model: schema.ModelConfig, train: bool = True) -> ParameterCount:
  """The activated parameters of a token in training: all but the experts not chosen for it.

  Both vocabulary matrices, the norms and the routers count, as in the "activated params" of
  DeepSeekMoE's tables (2.8B of the 16B model).
  """
  return _count(model, active_experts(model.moe, train) if model.is_moe else 0)


def active_experts(moe: moe_config.MoEConfig, train: bool = True) -> int:
  """Routed experts that a token visits, in training or outside of it."""
  return router_traits.of(moe).active_experts(moe, train)


def _count(model: schema.ModelConfig, experts: int) -> ParameterCount:
  """Counts `experts` routed experts per MoE layer."""
  d, moe, num_moe = model.embed_dim, model.moe, model.num_moe_layers
  expert = _swiglu(d, moe.moe_mlp_dim)
  return ParameterCount(
    embedding=0 if model.tie_embeddings else model.vocab_size * d,
    attention=model.num_layers * _attention(model),
    norms=model.num_layers * _norms(model) + d,
    dense_ffn=(model.num_layers - num_moe) * _swiglu(d, model.mlp_dim),
    shared_experts=num_moe * moe.num_shared_experts * expert,
    routed_experts=num_moe * experts * expert,
    router=num_moe * _router(model) + model.num_layers * d * model.attention.num_experts,
    head=d * model.vocab_size,
    mtp=model.num_mtp_layers * (_mtp_weights(model, experts) + _norms(model) + 3 * d),
  )


def _swiglu(embed_dim: int, width: _Number) -> _Number:
  """Weights of a SwiGLU FFN: gate and up [D, 2, F], down [F, D]. Integer for an integer width."""
  return 3 * embed_dim * width


def _router(model: schema.ModelConfig) -> int:
  """Weights of one layer that make logits: none for a hash table, which reads token ids."""
  has_logits = router_traits.of(model.moe).has_logits
  return model.embed_dim * model.moe.num_experts if has_logits else 0


def _norms(model: schema.ModelConfig) -> int:
  """Scales in one layer: of its two norms, and of those of the latents."""
  attention = model.attention
  latents = attention.mla.q_lora_rank + attention.mla.kv_lora_rank
  return 2 * model.embed_dim + (latents if attention.kind == 'mla' else 0)


def _attention(model: schema.ModelConfig) -> int:
  """Weights of one attention layer.

  gqa: q and output of N heads, k and v of the key-value heads. mla: queries [D, Q], [Q, N, Hn + Hr]
  or [D, N, Hn + Hr], latent and rotated key [D, R + Hr], up [R, N, Hn + Hv], output [N, Hv, D].
  """
  d, n, attention, mla = model.embed_dim, model.num_heads, model.attention, model.attention.mla
  if attention.kind != 'mla':
    return d * attention.head_dim * (2 * n + 2 * attention.num_kv_heads)
  queries = n * attention.qk_head_dim
  rank = mla.q_lora_rank
  return (
    (d * rank + rank * queries if rank else d * queries)
    + d * (mla.kv_lora_rank + mla.qk_rope_head_dim)
    + mla.kv_lora_rank * n * (mla.qk_nope_head_dim + mla.v_head_dim)
    + n * mla.v_head_dim * d
  )


def _mtp_weights(model: schema.ModelConfig, experts: int) -> int:
  """Matrices of one module of multi-token prediction: [2 D, D] and those of a block.

  The block is an MoE layer with `experts` routed experts, or a dense one in a dense model.
  """
  d, moe = model.embed_dim, model.moe
  if model.is_moe:
    ffn = (moe.num_shared_experts + experts) * _swiglu(d, moe.moe_mlp_dim) + _router(model)
  else:
    ffn = _swiglu(d, model.mlp_dim)
  of_heads = d * model.attention.num_experts
  return 2 * d * d + _attention(model) + of_heads + ffn


def train_flops_per_sequence(model: schema.ModelConfig) -> int:
  """Exact training FLOPs of one sequence of `max_seq_len` tokens that is a single document."""
  count, modules = count_activated(model), model.num_mtp_layers
  weights = count.total - count.embedding - count.norms
  weights += modules * (_mtp_weights(model, active_experts(model.moe)) + count.head)
  length = model.max_seq_len
  # L (L + 1) / 2 pairs of a query and a key; a pair costs a head 2 FLOPs per number of the key for
  # its score, and 2 per number of the value.
  pairs = length * (length + 1) // 2
  forward = 2 * (model.num_layers + modules) * _pair_width(model) * pairs
  return length * TRAIN_FLOPS_PER_WEIGHT * weights + 3 * forward


def attention_flops_per_token(model: schema.ModelConfig) -> float:
  """Forward FLOPs per token of scores and weighted sums, a part of `train_flops_per_token`."""
  layers = model.num_layers + model.num_mtp_layers
  return 2.0 * layers * _pair_width(model) * (model.max_seq_len + 1) / 2


def _pair_width(model: schema.ModelConfig) -> int:
  """Numbers of all heads of a layer that meet for each pair of a query and a key."""
  return model.num_heads * (model.attention.qk_head_dim + model.attention.v_head_dim)


def train_flops_per_token(model: schema.ModelConfig) -> int:
  """Exact training FLOPs per token, the mean over a sequence of `max_seq_len` tokens.

  Packed rows hold shorter documents that do not see each other and cost a little less.
  """
  # Exact division: 3 * 2 * pairs = 3 L (L + 1).
  return train_flops_per_sequence(model) // model.max_seq_len


def train_flops_per_sequence_paper(model: schema.ModelConfig, paper: schema.PaperConfig) -> int:
  """Training FLOPs of one sequence in the convention of DeepSeekMoE's tables.

  T (6 N_act + 12 num_layers D T) for T = `max_seq_len`: full attention, 4 D^2 attention weights per
  layer whatever the number of key-value heads, the output head but neither the input embedding nor
  the router, and the FFN widths of `paper` where they are not 0. Rounded to a whole number, as
  those widths are not. MLA: its own weights, and N (Hn + Hr + Hv) in place of 2 D in the attention.
  """
  weights = _paper_weights(model, paper) + model.embed_dim * model.vocab_size
  length = model.max_seq_len
  return round(length * (TRAIN_FLOPS_PER_WEIGHT * weights + _paper_attention(model)))


def _paper_weights(model: schema.ModelConfig, paper: schema.PaperConfig) -> float:
  """Matrices that a token meets in the paper's convention, those of the vocabulary left out."""
  d, moe = model.embed_dim, model.moe
  dense = _swiglu(d, paper.mlp_dim or model.mlp_dim)
  expert = _swiglu(d, paper.moe_mlp_dim or moe.moe_mlp_dim)
  active = moe.num_shared_experts + active_experts(moe)
  return (
    model.num_layers * (_attention(model) if model.attention.kind == 'mla' else 4 * d**2)
    + (model.num_layers - model.num_moe_layers) * dense
    + model.num_moe_layers * active * expert
  )


def _paper_attention(model: schema.ModelConfig) -> int:
  """Training FLOPs per token of scores and weighted sums over `max_seq_len` keys."""
  width = _pair_width(model) if model.attention.kind == 'mla' else 2 * model.embed_dim
  return 6 * model.num_layers * width * model.max_seq_len


@dataclasses.dataclass(frozen=True)
class ModelScale:
  """How large a model is, in the three measures of DeepSeek LLM (arXiv 2401.02954, Eq. 2).

  The convention is that of `train_flops_per_sequence_paper`: full attention, projections as if MHA,
  no router. For an MoE all three are of what a token activates, the shared experts and K others,
  since they stand for compute: C = M D, or 6 N D. Dense models with a SwiGLU of 8/3 D have
  N1 = 12 num_layers D^2 and M = 72 num_layers D^2 + 12 num_layers D T.
  """

  non_embedding: float  # N1, parameters without any vocabulary matrix
  complete: float  # N2, with one of them
  flops_per_token: float  # M, non-embedding training FLOPs per token, attention included


def model_scale(model: schema.ModelConfig, paper: schema.PaperConfig) -> ModelScale:
  """N1, N2 and M of a model; `paper` has its FFN widths where these were rounded."""
  weights = _paper_weights(model, paper)
  return ModelScale(
    non_embedding=weights,
    complete=weights + model.embed_dim * model.vocab_size,
    flops_per_token=TRAIN_FLOPS_PER_WEIGHT * weights + _paper_attention(model),
  )


def kv_cache_elements_per_token(model: schema.ModelConfig) -> int:
  """Numbers that decoding keeps per token of context, in all layers of the main model.

  gqa: keys and values of the key-value heads; mla: one latent and one rotated key (DeepSeek-V2,
  Table 1).
  """
  attention, mla = model.attention, model.attention.mla
  if attention.kind == 'mla':
    return model.num_layers * (mla.kv_lora_rank + mla.qk_rope_head_dim)
  return 2 * model.num_layers * attention.num_kv_heads * attention.head_dim


def bytes_at(elements: int, bits: int) -> int:
  """Bytes that hold so many numbers of so many bits, up to a whole one."""
  return -(-elements * bits // 8)
