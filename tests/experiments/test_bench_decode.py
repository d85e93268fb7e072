"""The decode suite at toy size: what it measures, and the bytes it divides by."""

import dataclasses
import importlib.util

import jax
import numpy as np
import pytest

from experiments.bench import decode
from experiments.common import harness
from moe_jax.models import model_variables

TOY = decode.SMALL | dict(
  vocab_size=32,
  hidden_size=16,
  intermediate_size=24,
  moe_intermediate_size=8,
  num_hidden_layers=2,
  num_attention_heads=2,
  num_key_value_heads=2,
  kv_lora_rank=8,
  qk_nope_head_dim=8,
  qk_rope_head_dim=4,
  v_head_dim=8,
  n_routed_experts=8,
  num_experts_per_tok=2,
)
SIZES = decode.Sizes(
  shapes={'toy': TOY},
  dtype='float32',
  points=((2, 8),),
  batches=(2,),
  prompt=4,
  new=5,
  steps=3,
  prefill_tokens=16,
)
PEAKS = harness.Peaks(1e9, 1e9)


@pytest.mark.slow
def test_steps_and_prefill_of_both_kinds_of_attention():
  results = decode.run(harness.Options(repeats=1, transformers=False), PEAKS, SIZES)
  found = {(r.name.split()[0], r.variant): r for r in results}
  kinds = [(k, v) for k in ('prefill', 'step') for v in ('mla', 'mha', 'dense twin')]
  assert list(found) == [*kinds, ('generation', 'moe_jax')]
  for (kind, _), r in found.items():
    assert r.detail['tokens_per_second'] > 0
    assert (r.ratio_to_dense is None) == (kind == 'generation')
  step = found['step', 'mla']
  # 2 layers of 8 + 4 numbers of 4 bytes; MHA has 2 heads of 8, keys and values.
  assert step.detail['cache_bytes_per_token'] == 2 * 12 * 4
  assert found['step', 'mha'].detail['cache_bytes_per_token'] == 2 * 32 * 4
  bound = 3 * step.detail['bytes_per_step'] / PEAKS.bytes
  np.testing.assert_allclose(step.ratio_to_peak, bound / step.seconds_median)


def test_only_what_was_asked_for_is_built():
  only = harness.Options(only=('step', 'mha'), repeats=1, transformers=False)
  found = [r.variant for r in decode.run(only, PEAKS, SIZES)]
  assert found == ['mha', 'dense twin']
  assert not decode.run(dataclasses.replace(only, only=('nothing',)), PEAKS, SIZES)


def test_bytes_of_a_step_by_hand():
  cfg = decode.page(TOY, 'mla', 'float32', 64).model
  params = model_variables.abstract_params(cfg)
  total = sum(leaf.size for leaf in jax.tree.leaves(params)) - params['embedding'].size
  moe = params['moe_layers']['moe']
  experts = moe['gate_up'].size + moe['down'].size
  # Of 8 experts a token visits 2: one token misses 3/4 of them, two tokens 9/16.
  for batch, missed in ((1, 3 / 4), (2, 9 / 16)):
    want = 4 * (total - missed * experts) + batch * 10 * 2 * 12 * 4
    assert decode.step_bytes(cfg, batch, 10) == round(want)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec('transformers'), reason='needs the extra hf')
def test_transformers_writes_the_same_text():
  only = harness.Options(only=('generation',), repeats=1)
  ours, theirs = decode.run(only, PEAKS, SIZES)
  assert (ours.variant, theirs.variant) == ('moe_jax', 'transformers')
  assert ours.detail['same_tokens'] == 1.0
  assert ours.ratio_to_transformers > 0
