"""Names, shapes and places of tensors, against names that are written out a second time."""

import dataclasses

import numpy as np
import pytest

from moe_jax import errors
from moe_jax.config import parse, schema
from moe_jax.interop import float8, hf_config, mapping, source
from tests import tiny
from tests.interop import checkpoints, published

WEIGHTS = mapping.Layout()
FUSED = mapping.Layout(fused_experts=True)
LAYOUTS = [
  *((family, layout) for family in checkpoints.HF for layout in (WEIGHTS, FUSED)),
  ('llama', mapping.Layout(lm_head=False)),
]


def is_fp8(entry: mapping.Entry) -> bool:
  """Whether V3's files hold it in float8: the projections, not embedding, head, norms, router."""
  return '_proj' in entry.hf_name and 'eh_proj' not in entry.hf_name


def model(family: str, **changes) -> schema.ModelConfig:
  hf = checkpoints.config(family, **changes)
  modules = hf_config.declared_mtp_layers(hf)
  return parse.from_dict(hf_config.to_values(hf, tiny.values(), modules)).model


@pytest.mark.parametrize('family, layout', LAYOUTS)
def test_every_element_of_every_leaf_is_covered_once(family, layout):
  cfg = model(family)
  leaves = source.by_name(source.abstract_leaves(cfg))
  seen = {name: np.zeros(leaf.shape, int) for name, leaf in leaves.items()}
  for entry in mapping.entries(cfg, layout):
    if entry.role != mapping.COPY:
      assert seen[entry.leaf][entry.index].shape == entry.shape
      seen[entry.leaf][entry.index] += 1
  assert all((count == 1).all() for count in seen.values())
  mapping.check_covers(list(mapping.entries(cfg, layout)), leaves, family)


@pytest.mark.parametrize('family, layout', LAYOUTS)
def test_names_and_shapes_are_the_published_ones(family, layout):
  hf = checkpoints.config(family, tie_word_embeddings=not layout.lm_head)
  want = checkpoints.shapes(hf, fused=layout.fused_experts)
  got = {}
  for entry in mapping.entries(model(family), layout):
    if entry.role != mapping.TIED:
      assert got.setdefault(entry.hf_name, entry.hf_shape) == entry.hf_shape
  assert got == want


@pytest.mark.parametrize('part', [mapping._PART, 3 * checkpoints.D])
@pytest.mark.parametrize('layout', [WEIGHTS, FUSED])
def test_parts_follow_each_other_and_come_back(layout, part, monkeypatch):
  """The bytes of a tensor's parts, one after the other, are those of the tensor."""
  monkeypatch.setattr(mapping, '_PART', part)
  rng, at = np.random.default_rng(0), {}
  for entry in mapping.entries(model('deepseek_v3'), layout):
    assert entry.start == at.get(entry.hf_name, 0)
    at[entry.hf_name] = entry.start + entry.size
    x = rng.normal(size=entry.hf_part).astype(np.float32)
    ours = entry.to_ours(x)
    assert ours.shape == entry.shape
    np.testing.assert_array_equal(entry.to_hf(ours), x)
  shapes = checkpoints.shapes(checkpoints.config('deepseek_v3'), fused=layout.fused_experts)
  assert at == {name: np.prod(shape) for name, shape in shapes.items()}


def entry_of(family: str, name: str, layout=WEIGHTS, **index) -> mapping.Entry:
  found = [e for e in mapping.entries(model(family), layout) if e.hf_name == name]
  return found[index.get('part', 0)]


def numbered(entry: mapping.Entry) -> tuple[np.ndarray, np.ndarray]:
  x = np.arange(entry.size, dtype=np.float32).reshape(entry.hf_part)
  return x, entry.to_ours(x)


def test_rows_are_head_major():
  """Row of the file = head * width + place within the head; column = place in the input."""
  x, q = numbered(entry_of('deepseek_v2', 'model.layers.1.self_attn.q_b_proj.weight'))
  width = checkpoints.NOPE + checkpoints.ROPE
  assert q[5, 1, 9] == x[1 * width + 9, 5]  # [q_lora, head, nope then rope]
  x, kv = numbered(entry_of('deepseek_v2', 'model.layers.1.self_attn.kv_b_proj.weight'))
  width = checkpoints.NOPE + checkpoints.V_DIM
  assert kv[3, 1, 8] == x[1 * width + 8, 3]  # the first value of head 1, after 8 of its key
  x, o = numbered(entry_of('deepseek_v2', 'model.layers.1.self_attn.o_proj.weight'))
  assert o[1, 4, 7] == x[7, 1 * checkpoints.V_DIM + 4]
  x, k = numbered(entry_of('llama', 'model.layers.0.self_attn.k_proj.weight'))
  assert k[6, 0, 2] == x[2, 6]


def test_gate_and_up_and_numbers_of_layers():
  gate = entry_of('deepseek', 'model.layers.2.mlp.experts.5.gate_proj.weight')
  up = entry_of('deepseek', 'model.layers.2.mlp.experts.5.up_proj.weight')
  assert gate.leaf == up.leaf == 'params/moe_layers/moe/gate_up'
  assert gate.index == (1, 5, slice(None), 0)  # layer 2 is the second MoE layer
  assert up.index == (1, 5, slice(None), 1)
  dense = entry_of('deepseek', 'model.layers.0.mlp.down_proj.weight')
  assert (dense.leaf, dense.index) == ('params/dense_layers/mlp/down', (0,))


def test_fused_experts_have_gates_first():
  name = 'model.layers.1.mlp.experts.gate_up_proj'
  whole = np.arange(checkpoints.EXPERTS * 2 * checkpoints.EXPERT * checkpoints.D)
  whole = whole.reshape(checkpoints.EXPERTS, 2 * checkpoints.EXPERT, checkpoints.D)
  up = entry_of('deepseek', name, FUSED, part=2 * 3 + 1)  # of expert 3
  assert up.index == (0, 3, slice(None), 1)
  x = whole.reshape(-1)[up.start : up.start + up.size].reshape(up.hf_part)
  np.testing.assert_array_equal(up.to_ours(x), whole[3, checkpoints.EXPERT :].T)


def test_the_embedding_comes_first_in_eh_proj():
  x, ours = numbered(entry_of('deepseek_v3', 'model.layers.3.eh_proj.weight'))
  np.testing.assert_array_equal(ours[: checkpoints.D], x[:, : checkpoints.D].T)


def test_a_leaf_without_a_place_is_named():
  cfg = model('deepseek')
  leaves = source.by_name(source.abstract_leaves(cfg))
  extra = leaves | {'params/moe_layers/attention/router': leaves['params/head']}
  with pytest.raises(errors.InputError, match=r'params/moe_layers/attention/router: 0 of its 512'):
    mapping.check_covers(list(mapping.entries(cfg, WEIGHTS)), extra, 'deepseek')


# Derived in the papers' own sizes; V3's sum is without its prediction module and its biases.
COUNTS = {
  '7b': (None, 6_910_365_696),
  '67b': (None, 67_425_001_472),
  'moe-16b': (5_466, 16_375_728_128),
  'v2-lite': (5_291, 15_706_484_224),
  'v2': (29_102, 235_741_434_880),
  'v3': (46_183, 671_026_404_352),
}


@pytest.mark.parametrize('name', COUNTS)
def test_published_counts(name):
  hf = published.CONFIGS[name]
  values = hf_config.to_values(hf, tiny.values(), hf_config.declared_mtp_layers(hf))
  cfg = parse.from_dict(values).model
  entries = list(mapping.entries(cfg, WEIGHTS))
  tensors, parameters = COUNTS[name]
  sizes = {e.hf_name: e.hf_shape for e in entries}
  assert tensors in (None, len(sizes))
  without = dataclasses.replace(cfg, num_mtp_layers=0)
  params = [e for e in mapping.entries(without, WEIGHTS) if e.leaf.startswith('params/')]
  assert sum(e.size for e in params) == parameters
  if name == 'v3':
    # A public listing of the index has 91,991 tensors and 688,574,839,360 bytes: float8 weights
    # with float32 scales, float32 biases, and bfloat16 for the rest.
    fp8 = {e.hf_name: e.hf_shape for e in entries if is_fp8(e)}
    assert len(fp8) == 45_808
    scales = sum(np.prod(float8.scale_shape(shape, (128, 128))) for shape in fp8.values())
    in_fp8 = sum(np.prod(shape) for shape in fp8.values())
    biases = sum(np.prod(s) for k, s in sizes.items() if k.endswith('correction_bias'))
    rest = sum(np.prod(shape) for shape in sizes.values()) - in_fp8 - biases
    assert in_fp8 + 4 * scales + 4 * biases + 2 * rest == 688_574_839_360
