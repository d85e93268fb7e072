"""Which tensor of a Hugging Face checkpoint is which part of our parameters, in both directions.

The tables below are all there is to know about names. Each row has the file's name, ours, and the
axes of our array, split by '|' into what a projection reads and what it makes: a file's matrix is
[all that is made, all that is read] (torch's layout), so the two differ by a transposition and a
reshape, never by an order of rows. Axes: embed D, heads N, kv_heads, head_dim H, qk and v (widths
of a query and of a value), kv_v (qk_nope_head_dim + v), q_lora, kv_lora R, kv_rope (R + rotated
part), mlp, expert_mlp and shared_mlp (FFN widths F), experts E, twice (2 D), vocab V.

The names of the four families follow from the structure alone: llama and deepseek have 'gqa'
attention, deepseek_v2 and deepseek_v3 'mla'; V3 alone has expert biases and prediction modules.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_jax import errors
from moe_jax.config import schema

WEIGHT, COPY, TIED = 'weight', 'copy', 'tied'  # roles of an `Entry`

_BAND = 64  # rows
_PART = 2**26  # elements: the vocabulary's matrices, by far the largest, are moved in such parts


class Layout(NamedTuple):
  """Choices of a set of files that the model does not decide."""

  fused_experts: bool = False  # all experts of a layer in two tensors, as transformers holds them
  lm_head: bool = True  # False: the head is the embedding and has no tensor


class Entry(NamedTuple):
  """A contiguous part of a tensor in the files, and the part of a leaf of ours that it is.

  `role` is WEIGHT; or COPY, a tensor that repeats a leaf which another one holds; or TIED, a second
  leaf that is filled from a tensor.
  """

  hf_name: str
  hf_shape: tuple[int, ...]  # of the whole tensor
  start: int  # first element of the part within the tensor
  hf_part: tuple[int, ...]  # shape of the part
  leaf: str  # 'params/...' or 'router_state/...'
  index: tuple[int | slice, ...]  # of the part within the leaf
  shape: tuple[int, ...]  # of leaf[index]
  transposed: bool
  role: str = WEIGHT

  @property
  def size(self) -> int:
    """Elements of the part."""
    return math.prod(self.hf_part)

  def to_ours(self, array: np.ndarray) -> np.ndarray:
    """[hf_part] -> [shape]."""
    return (_transpose(array) if self.transposed else array).reshape(self.shape)

  def to_hf(self, array: np.ndarray) -> np.ndarray:
    """[shape] -> [hf_part]; the inverse of `to_ours`."""
    if self.transposed:
      return _transpose(array.reshape(self.hf_part[::-1]))
    return array.reshape(self.hf_part)


def _transpose(array: np.ndarray) -> np.ndarray:
  """[rows, columns] -> [columns, rows], contiguous.

  By bands that the processor's cache holds and as plain bits, which is several times as fast as a
  copy of the transposed view.
  """
  bits = array.view(f'u{array.itemsize}')
  out = np.empty(bits.shape[::-1], bits.dtype)
  for row in range(0, len(bits), _BAND):
    out[:, row : row + _BAND] = bits[row : row + _BAND].T
  return out.view(array.dtype)


class _Row(NamedTuple):
  """One line of a table."""

  hf: str
  ours: str
  axes: str
  pick: int | None = None  # place on our axis of (gate, up), which follows the first axis


class _Place(NamedTuple):
  """The names of a layer's tensors in the files and in our tree."""

  axes: dict[str, int]  # sizes of `_Row.axes`
  prefix: str = ''  # of names in the files
  leaf_prefix: str = ''
  index: tuple[int, ...] = ()  # over the leading axes of our leaves


_EMBEDDING = _Row('model.embed_tokens.weight', 'params/embedding', 'vocab embed')
_FINAL_NORM = _Row('model.norm.weight', 'params/final_norm/scale', 'embed')
_HEAD = _Row('lm_head.weight', 'params/head', 'embed | vocab')
_TIED_HEAD = _Row('model.embed_tokens.weight', 'params/head', 'embed | vocab')
_REPEATED_HEAD = _Row('lm_head.weight', 'params/embedding', 'vocab embed')

_NORMS = (
  _Row('input_layernorm.weight', 'attention_norm/scale', 'embed'),
  _Row('post_attention_layernorm.weight', 'ffn_norm/scale', 'embed'),
)
_GQA = (
  _Row('self_attn.q_proj.weight', 'attention/q', 'embed | heads head_dim'),
  _Row('self_attn.k_proj.weight', 'attention/k', 'embed | kv_heads head_dim'),
  _Row('self_attn.v_proj.weight', 'attention/v', 'embed | kv_heads head_dim'),
  _Row('self_attn.o_proj.weight', 'attention/o', 'heads head_dim | embed'),
)
_MLA_QUERY = (_Row('self_attn.q_proj.weight', 'attention/q', 'embed | heads qk'),)
_MLA_LORA_QUERY = (
  _Row('self_attn.q_a_proj.weight', 'attention/q_a', 'embed | q_lora'),
  _Row('self_attn.q_a_layernorm.weight', 'attention/q_a_norm/scale', 'q_lora'),
  _Row('self_attn.q_b_proj.weight', 'attention/q_b', 'q_lora | heads qk'),
)
_MLA = (
  _Row('self_attn.kv_a_proj_with_mqa.weight', 'attention/kv_a', 'embed | kv_rope'),
  _Row('self_attn.kv_a_layernorm.weight', 'attention/kv_a_norm/scale', 'kv_lora'),
  _Row('self_attn.kv_b_proj.weight', 'attention/kv_b', 'kv_lora | heads kv_v'),
  _Row('self_attn.o_proj.weight', 'attention/o', 'heads v | embed'),
)


def _swiglu(hf: str, ours: str, width: str) -> tuple[_Row, ...]:
  return (
    _Row(f'{hf}gate_proj.weight', f'{ours}gate_up', f'embed | {width}', pick=0),
    _Row(f'{hf}up_proj.weight', f'{ours}gate_up', f'embed | {width}', pick=1),
    _Row(f'{hf}down_proj.weight', f'{ours}down', f'{width} | embed'),
  )


_DENSE_FFN = _swiglu('mlp.', 'mlp/', 'mlp')
_EXPERT = _swiglu('mlp.experts.{}.', 'moe/', 'expert_mlp')
_SHARED_EXPERTS = _swiglu('mlp.shared_experts.', 'moe/shared/', 'shared_mlp')
_ROUTER = _Row('mlp.gate.weight', 'moe/router', 'embed | experts')
_EXPERT_BIAS = _Row('mlp.gate.e_score_correction_bias', 'moe/expert_bias', 'experts')
_FUSED_GATE_UP, _FUSED_DOWN = 'mlp.experts.gate_up_proj', 'mlp.experts.down_proj'

# Multi-token prediction: beside a block, at the layer numbers that follow the last one.
MTP_STACK = 'mtp_layers'
_MTP_BLOCK = f'{MTP_STACK}/block'
_MTP = (
  _Row('enorm.weight', f'params/{MTP_STACK}/embedding_norm/scale', 'embed'),
  _Row('hnorm.weight', f'params/{MTP_STACK}/hidden_norm/scale', 'embed'),
  # Columns of the embedding come first in released files, the reverse of the report's formula.
  _Row('eh_proj.weight', f'params/{MTP_STACK}/projection', 'twice | embed'),
  _Row('shared_head.norm.weight', f'params/{MTP_STACK}/norm/scale', 'embed'),
)
_MTP_COPIES = {_EMBEDDING.hf: 'embed_tokens.weight', _HEAD.hf: 'shared_head.head.weight'}


def entries(cfg: schema.ModelConfig, layout: Layout) -> Iterator[Entry]:
  """Every part of every tensor of a checkpoint, tensor by tensor and in a tensor from its start.

  Pure: it reads the sizes of `cfg` and allocates nothing.
  """
  axes = _axes(cfg)
  yield from _vocabulary(_EMBEDDING, _Place(axes))
  if cfg.tie_embeddings:
    yield from _vocabulary(_REPEATED_HEAD, _Place(axes), COPY) if layout.lm_head else ()
  else:
    yield from (
      _vocabulary(_HEAD, _Place(axes))
      if layout.lm_head
      else _vocabulary(_TIED_HEAD, _Place(axes), TIED)
    )
  yield _entry(_FINAL_NORM, _Place(axes))
  num_dense = cfg.num_layers - cfg.num_moe_layers
  for layer in range(cfg.num_layers):
    is_moe = layer >= num_dense
    stack, number = ('moe_layers', layer - num_dense) if is_moe else ('dense_layers', layer)
    yield from _block(cfg, axes, layout, f'model.layers.{layer}.', stack, number, is_moe)
  for module in range(cfg.num_mtp_layers):
    prefix = mtp_prefix(cfg, module)
    yield from _block(cfg, axes, layout, prefix, _MTP_BLOCK, module, cfg.is_moe)
    for row in _MTP:
      yield _entry(row, _Place(axes, prefix, index=(module,)))
    for row in (_EMBEDDING, _REPEATED_HEAD if cfg.tie_embeddings else _HEAD):
      yield from _vocabulary(row._replace(hf=_MTP_COPIES[row.hf]), _Place(axes, prefix), COPY)


def mtp_prefix(cfg: schema.ModelConfig, module: int) -> str:
  """What the names of a prediction module's tensors begin with."""
  return f'model.layers.{cfg.num_layers + module}.'


def check_covers(entries: Sequence[Entry], leaves: Mapping[str, Any], family: str):
  """Makes sure that the entries hold every element of the leaves once.

  Args:
    entries: what `entries` yields.
    leaves: anything with a shape, by name.
    family: for the message.

  Raises:
    errors.InputError: a leaf has no place in the files.
  """
  sizes = dict.fromkeys(leaves, 0)
  for entry in entries:
    if entry.role != COPY:
      sizes[entry.leaf] = sizes.get(entry.leaf, 0) + entry.size
  for name, size in sizes.items():
    wanted = math.prod(leaves[name].shape) if name in leaves else 0
    errors.require(
      size == wanted,
      f'{name}: {size} of its {wanted} elements have a place in a checkpoint of model_type '
      f'{family!r}; only what the family knows can be converted',
    )


def _axes(cfg: schema.ModelConfig) -> dict[str, int]:
  """Sizes of the axes that the tables name."""
  attention, moe = cfg.attention, cfg.moe
  mla = attention.mla
  return {
    'vocab': cfg.vocab_size,
    'embed': cfg.embed_dim,
    'twice': 2 * cfg.embed_dim,
    'heads': cfg.num_heads,
    'kv_heads': attention.num_kv_heads,
    'head_dim': attention.head_dim,
    'qk': attention.qk_head_dim,
    'v': attention.v_head_dim,
    'q_lora': mla.q_lora_rank,
    'kv_lora': mla.kv_lora_rank,
    'kv_rope': mla.kv_lora_rank + mla.qk_rope_head_dim,
    'kv_v': mla.qk_nope_head_dim + mla.v_head_dim,
    'mlp': cfg.mlp_dim,
    'experts': moe.num_experts,
    'expert_mlp': moe.moe_mlp_dim,
    'shared_mlp': moe.num_shared_experts * moe.moe_mlp_dim,
  }


def _attention_rows(cfg: schema.ModelConfig) -> tuple[_Row, ...]:
  if cfg.attention.kind == 'gqa':
    return _GQA
  return (*(_MLA_LORA_QUERY if cfg.attention.mla.q_lora_rank else _MLA_QUERY), *_MLA)


def _block(
  cfg: schema.ModelConfig,
  axes: dict[str, int],
  layout: Layout,
  prefix: str,
  stack: str,
  number: int,
  is_moe: bool,
) -> Iterator[Entry]:
  """The tensors of one layer, which is row `number` of the stacked leaves of `stack`."""
  place = _Place(axes, prefix, f'params/{stack}/', (number,))
  rows = (*_NORMS, *_attention_rows(cfg), *(() if is_moe else _DENSE_FFN))
  for row in rows:
    yield _entry(row, place)
  if not is_moe:
    return
  yield _entry(_ROUTER, place)
  if cfg.moe.expert_bias.update_rule != 'none':
    yield _entry(_EXPERT_BIAS, place._replace(leaf_prefix=f'router_state/{stack}/'))
  if cfg.moe.num_shared_experts:
    for row in _SHARED_EXPERTS:
      yield _entry(row, place)
  make = _fused_experts if layout.fused_experts else _experts
  yield from make(cfg.moe.num_experts, number, place)


def _experts(num_experts: int, number: int, place: _Place) -> Iterator[Entry]:
  for expert in range(num_experts):
    for row in _EXPERT:
      named = row._replace(hf=row.hf.format(expert))
      yield _entry(named, place._replace(index=(number, expert)))


def _fused_experts(num_experts: int, number: int, place: _Place) -> Iterator[Entry]:
  """gate_up_proj [E, 2 F, D], gates first, and down_proj [E, D, F], expert by expert."""
  gate, up, down = (
    [_entry(row, place._replace(index=(number, e))) for e in range(num_experts)] for row in _EXPERT
  )
  width, embed = gate[0].hf_part
  fused = (
    (_FUSED_GATE_UP, (num_experts, 2 * width, embed), [e for pair in zip(gate, up) for e in pair]),
    (_FUSED_DOWN, (num_experts, embed, width), down),
  )
  for name, shape, parts in fused:
    for i, part in enumerate(parts):
      yield part._replace(hf_name=place.prefix + name, hf_shape=shape, start=i * part.size)


def _vocabulary(row: _Row, place: _Place, role: str = WEIGHT) -> Iterator[Entry]:
  """A matrix with a row per token of the vocabulary, in parts of _PART elements."""
  whole = _entry(row, place, role)
  vocab, width = whole.hf_shape
  rows = max(_PART // width, 1)
  for first in range(0, vocab, rows):
    block = slice(first, min(first + rows, vocab))
    count = block.stop - first
    yield whole._replace(
      start=first * width,
      hf_part=(count, width),
      index=(slice(None), block) if whole.transposed else (block,),
      shape=(width, count) if whole.transposed else (count, width),
    )


def _entry(row: _Row, place: _Place, role: str = WEIGHT) -> Entry:
  read, bar, made = row.axes.partition(' | ')
  sizes = [[place.axes[name] for name in side.split()] for side in (read, made)]
  shape = (*sizes[0], *sizes[1])
  hf_shape = (math.prod(sizes[1]), math.prod(sizes[0])) if bar else shape
  index = place.index if row.pick is None else (*place.index, slice(None), row.pick)
  name, leaf = place.prefix + row.hf, place.leaf_prefix + row.ours
  return Entry(name, hf_shape, 0, hf_shape, leaf, index, shape, bool(bar), role)


def file_axes(cfg: schema.ModelConfig, hf_name: str) -> list[list[str]]:
  """The axes of a tensor in the files, each as the axes of the tables above that it combines.

  [] for a tensor that is not a row of a table, such as experts in one tensor.
  """
  name = re.sub(r'\.experts\.\d+\.', '.experts.{}.', re.sub(r'^model\.layers\.\d+\.', '', hf_name))
  rows = (_EMBEDDING, _FINAL_NORM, _HEAD, *_NORMS, *_attention_rows(cfg), *_DENSE_FFN, _ROUTER)
  rows += (_EXPERT_BIAS, *_SHARED_EXPERTS, *_EXPERT, *_MTP)
  rows += tuple(row._replace(hf=_MTP_COPIES[row.hf]) for row in (_EMBEDDING, _HEAD))
  found = next((row.axes for row in rows if row.hf == name), '')
  read, bar, made = found.partition(' | ')
  return [made.split(), read.split()] if bar else [[axis] for axis in read.split()]
