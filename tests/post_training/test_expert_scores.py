import jax
import numpy as np
import pytest

from moe_jax import errors
from moe_jax.models import transformer
from moe_jax.post_training import expert_scores
from tests import tiny

CFG = tiny.make(model__moe__balance__expert_level__weight=0.0)


@pytest.fixture(scope='module')
def subject():
  """(variables, batch): ragged rows, one of them all padding."""
  return {'params': tiny.params(CFG.model), 'router_state': {}}, tiny.batch()


@pytest.fixture(scope='module')
def found(subject):
  variables, batch = subject
  halves = [{key: value[part] for key, value in batch.items()} for part in (slice(4), slice(4, 8))]
  return expert_scores.measure(CFG.model, variables, tiny.mesh(data=1), halves)


def test_scores_are_the_formula_token_by_token(subject, found):
  variables, batch = subject
  inputs = [batch[key] for key in ('tokens', 'positions', 'segment_ids')]
  model = transformer.Transformer(CFG.model)
  sown = jax.jit(lambda v, *a: model.apply(v, *a, mutable=['intermediates']))(variables, *inputs)[1]
  routing = sown['intermediates']['moe_layers']['moe']
  experts, gates = (np.asarray(routing[key][0]) for key in ('expert_idx', 'gates'))
  layers, k = len(experts), CFG.model.moe.num_experts_per_tok
  token, gate = np.zeros((2, layers, CFG.model.moe.num_experts))
  real = np.argwhere(batch['segment_ids'] > 0)
  for layer in range(layers):
    for row, place in real:
      for e, g in zip(experts[layer, row, place], gates[layer, row, place]):
        token[layer, e] += (g > 0) / k
        gate[layer, e] += g
  assert found.num_tokens == len(real) and found.first_layer == CFG.model.num_dense_layers == 1
  np.testing.assert_allclose(found.token, token / len(real), atol=1e-6)
  np.testing.assert_allclose(found.gate, gate / len(real), atol=1e-6)


def test_token_scores_add_up_to_one_and_gate_scores_to_the_mass_that_is_kept(found):
  np.testing.assert_allclose(found.token.sum(axis=1), 1, atol=1e-6)
  assert (found.gate.sum(axis=1) < 1).all() and (found.gate.sum(axis=1) > 0.2).all()


def test_a_scaling_factor_does_not_scale_the_scores(subject):
  """A layer of normalised gates adds up to 1 with it too, so p stays a mass."""
  variables, batch = subject
  scaled = {'model__moe__norm_topk_prob': True, 'model__moe__routed_scaling_factor': 2.5}
  model = tiny.make(model__moe__balance__expert_level__weight=0.0, **scaled).model
  found = expert_scores.measure(model, variables, tiny.mesh(data=1), [batch])
  np.testing.assert_allclose(found.gate.sum(axis=1), 1, atol=1e-6)
  np.testing.assert_allclose(found.token.sum(axis=1), 1, atol=1e-6)


@pytest.mark.parametrize(
  'changes, axes',
  [
    ({'capacity__policy': 'score', 'capacity__factor': 0.5, 'capacity__at_eval': True}, {}),
    ({'exchange__kind': 'all_to_all', 'exchange__buffer_factor': 1.0}, {'expert': 4}),
  ],
)
def test_nothing_is_dropped_whatever_the_config_says(subject, found, changes, axes):
  """Choices that a layer left out would change the states, and so the choices, of later ones."""
  variables, batch = subject
  given = {f'model__moe__{key}': value for key, value in changes.items()}
  model = tiny.make(model__moe__balance__expert_level__weight=0.0, **given).model
  scores = expert_scores.measure(model, variables, tiny.mesh(data=1, **axes), [batch])
  np.testing.assert_allclose(scores.token, found.token, atol=1e-6)
  np.testing.assert_allclose(scores.gate, found.gate, atol=1e-5)


def test_who_has_no_choices_has_no_scores(subject):
  dense = tiny.make(model__moe__num_experts=0)
  for model in (dense.model, tiny.make(model__moe__router='ds_moe').model):
    with pytest.raises(errors.InputError, match='ESFT scores the K choices that every token makes'):
      expert_scores.check(model)
  with pytest.raises(errors.InputError, match='there is no token'):
    expert_scores.measure(CFG.model, subject[0], tiny.mesh(data=1), [])
