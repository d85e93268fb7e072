"""How many parameters a model has and how much arithmetic it costs, in closed form from its config.

Two countings of training FLOPs (forward and backward, backward = 2 x forward):

* exact: what the mathematics of the model needs. A matrix of W weights costs 6 W per token; the
  routers and the output head count, the embedding look-up does not; query i attends to i + 1 keys;
  grouped key-value projections have their real size. Recomputation (remat), the wasted work of a
  masked dispatch and the work that dropped tokens save are no part of it, so that MFU compares runs
  by the model they train.
* paper: the convention behind the tables of DeepSeekMoE (arXiv 2401.06066), which full attention,
  "as if MHA" projections and unaligned FFN widths reproduce to the printed digits.

A token's experts are those of training: K of them, on average with router 'expert_choice', and all
with 'ds_moe', which is dense in training and sparse outside of it.

Letters: V vocab, D embed, N query heads, H head dim, F FFN width, E experts, K experts per token, L
tokens.
"""

import dataclasses

from moe_jax import config, config_moe

# Forward 2 (a multiplication and an addition per weight), backward twice that.
TRAIN_FLOPS_PER_WEIGHT = 6


@dataclasses.dataclass(frozen=True)
class ParameterCount:
  """Parameters of a whole model by what they are for; the fields add up to `total`."""

  embedding: int  # [V, D]
  attention: int  # q, k, v and output projections
  norms: int  # scales of the two norms of each layer, and of the last one
  dense_ffn: int  # FFNs of the dense layers
  shared_experts: int
  routed_experts: int
  router: int  # one row of D per routed expert, and per expert of a mixture of attention heads
  head: int  # [D, V], untied

  @property
  def total(self) -> int:
    return sum(dataclasses.astuple(self))


def count_parameters(model: config.ModelConfig) -> ParameterCount:
  """All parameters of `model`."""
  return _count(model, model.moe.num_experts)


def count_activated(model: config.ModelConfig) -> ParameterCount:
  """The parameters that one token meets in training: all but the experts that it does not visit.

  Both vocabulary matrices, the norms and the routers count, as in the "activated params" of
  DeepSeekMoE's tables (2.8B of the 16B model).
  """
  return _count(model, active_experts(model.moe))


def active_experts(moe: config_moe.MoEConfig) -> int:
  """Routed experts that a token visits in training."""
  return moe.num_experts if moe.router == 'ds_moe' else moe.num_experts_per_tok


def _count(model: config.ModelConfig, experts: int) -> ParameterCount:
  """Counts `experts` routed experts per MoE layer."""
  d, moe, num_moe = model.embed_dim, model.moe, model.num_moe_layers
  expert = _swiglu(d, moe.moe_mlp_dim)
  return ParameterCount(
    embedding=model.vocab_size * d,
    attention=model.num_layers * _attention(model),
    norms=(2 * model.num_layers + 1) * d,
    dense_ffn=(model.num_layers - num_moe) * _swiglu(d, model.mlp_dim),
    shared_experts=num_moe * moe.num_shared_experts * expert,
    routed_experts=num_moe * experts * expert,
    router=_routers(model),
    head=d * model.vocab_size,
  )


def _swiglu(embed_dim: int, width: float) -> float:
  """Weights of a SwiGLU FFN: gate and up [D, 2, F], down [F, D]. Integer for an integer width."""
  return 3 * embed_dim * width


def _routers(model: config.ModelConfig) -> int:
  """Weights that make logits: none for the experts of a hash table, which reads token ids."""
  of_experts = 0 if model.moe.router == 'hash' else model.moe.num_experts
  of_heads = model.num_layers * model.attention.num_experts
  return model.embed_dim * (model.num_moe_layers * of_experts + of_heads)


def _attention(model: config.ModelConfig) -> int:
  """Weights of one attention layer: q and output of N heads, k and v of the key-value heads."""
  heads = 2 * model.num_heads + 2 * model.attention.num_kv_heads
  return model.embed_dim * model.attention.head_dim * heads


def train_flops_per_sequence(model: config.ModelConfig) -> int:
  """Exact training FLOPs of one sequence of `max_seq_len` tokens that is a single document."""
  count = count_activated(model)
  weights = count.total - count.embedding - count.norms
  length = model.max_seq_len
  # L (L + 1) / 2 pairs of a query and a key; a pair costs a head 2 H for q.k and 2 H for its value.
  pairs = length * (length + 1) // 2
  forward = 4 * model.num_layers * model.num_heads * model.attention.head_dim * pairs
  return length * TRAIN_FLOPS_PER_WEIGHT * weights + 3 * forward


def train_flops_per_token(model: config.ModelConfig) -> int:
  """Exact training FLOPs per token, the mean over a sequence of `max_seq_len` tokens.

  Packed rows hold shorter documents that do not see each other and cost a little less.
  """
  # Exact division: 3 * 4 * pairs = 6 L (L + 1).
  return train_flops_per_sequence(model) // model.max_seq_len


def train_flops_per_sequence_paper(model: config.ModelConfig, paper: config.PaperConfig) -> int:
  """Training FLOPs of one sequence in the convention of DeepSeekMoE's tables.

  T (6 N_act + 12 num_layers D T) for T = `max_seq_len`: full attention, 4 D^2 attention weights per
  layer whatever the number of key-value heads, the output head but neither the input embedding nor
  the router, and the FFN widths of `paper` where they are not 0. Rounded to a whole number, as
  those widths are not.
  """
  d, length, moe = model.embed_dim, model.max_seq_len, model.moe
  dense = _swiglu(d, paper.mlp_dim or model.mlp_dim)
  expert = _swiglu(d, paper.moe_mlp_dim or moe.moe_mlp_dim)
  active = moe.num_shared_experts + active_experts(moe)
  weights = (
    model.num_layers * 4 * d**2
    + (model.num_layers - model.num_moe_layers) * dense
    + model.num_moe_layers * active * expert
    + d * model.vocab_size
  )
  attention = 12 * model.num_layers * d * length
  return round(length * (TRAIN_FLOPS_PER_WEIGHT * weights + attention))


def kv_cache_elements_per_token(model: config.ModelConfig) -> int:
  """Numbers that decoding keeps per token of context: keys and values of all layers and heads."""
  return 2 * model.num_layers * model.attention.num_kv_heads * model.attention.head_dim
