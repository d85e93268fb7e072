"""Training from the same files is that of transformers with torch's AdamW, step by step."""

import os

import numpy as np
import pytest

os.environ['HF_HUB_OFFLINE'] = '1'
pytest.importorskip('torch')
pytest.importorskip('transformers', minversion='5.23')  # see test_parity.py

from experiments.parity import hf_models, hf_training, hf_tuning

hf_models.one_thread()


@pytest.fixture(scope='module', params=hf_training.CASES)
def case(request, tmp_path_factory):
  """(weights before, our training, theirs)."""
  name, changes = hf_training.CASES[request.param]
  return hf_training.measure(name, tmp_path_factory.mktemp(request.param), **changes)


def test_losses_and_gradient_norms(case):
  _, ours, theirs = case
  # Sums in another order; later steps inherit the differences of the earlier ones' weights.
  np.testing.assert_allclose(ours.loss, theirs.loss, rtol=1e-5)
  np.testing.assert_allclose(ours.aux_loss, theirs.aux_loss, rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(ours.grad_norm, theirs.grad_norm, rtol=1e-4)
  assert min(theirs.grad_norm) > hf_training.CLIP  # or clipping would not be compared
  assert theirs.loss[-1] < theirs.loss[0]


def test_weights_after_three_steps(case):
  before, ours, theirs = case
  assert ours.weights.keys() == theirs.weights.keys() == before.keys()
  moved = {name: np.abs(theirs.weights[name] - before[name]).max() for name in before}
  for name, start in before.items():
    step = moved[name] / hf_training.LR
    if name.endswith('e_score_correction_bias'):
      np.testing.assert_array_equal(ours.weights[name], start)
      assert step == 0
      continue
    # Everything moves: what is trained by about three steps, an expert without tokens by its decay.
    assert step > 0.1, name
    # A thousandth of a step; decay alone moves a weight of 0.25 by 0.025 of one, so that a matrix
    # without it, or a scale with it, would be seen.
    np.testing.assert_allclose(
      ours.weights[name], theirs.weights[name], rtol=0, atol=1e-3 * hf_training.LR, err_msg=name
    )


@pytest.mark.parametrize('name', ['llama_gqa', 'v2_no_yarn'])
@pytest.mark.parametrize('kind', hf_tuning.KINDS)
def test_gradients_of_tuning(kind, name, tmp_path):
  """SFT and DPO (label smoothing, SFT term) on answers that begin at different places."""
  ours, theirs = hf_tuning.measure(kind, name, tmp_path)
  np.testing.assert_allclose(ours.loss, theirs.loss, rtol=1e-5)
  names = set(theirs.gradients) & set(ours.gradients)
  assert len(names) > 10 and 'lm_head.weight' in names
  # The margin is a difference of sums of some 50 nats, each rounded to 4e-6 in float32.
  tolerance = {'sft': 1e-5, 'dpo': 3e-5}[kind]
  for key in names:
    want = theirs.gradients[key]
    atol = tolerance * max(np.abs(want).max(), 1.0)
    np.testing.assert_allclose(ours.gradients[key], want, rtol=0, atol=atol, err_msg=key)
