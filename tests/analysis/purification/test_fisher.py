"""The diagonal against a loop of jax.grad, in micro-batches, and what it has seen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import errors
from moe_jax.analysis.purification import fisher
from moe_jax.models import transformer
from tests import tiny
from tests.analysis.purification import planted


def close(one, other):
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-9)


def test_it_is_a_loop_of_gradients_per_example():
  model, batch = planted.model(), planted.batch()
  variables = planted.variables(model)

  def loss(params, row):
    out = transformer.apply(
      model,
      {**variables, 'params': params},
      *(row[key] for key in ('tokens', 'positions', 'segment_ids')),
    )
    log_probs = jax.nn.log_softmax(out.logits)
    learned = row['targets'] >= 0
    picked = jnp.take_along_axis(log_probs, jnp.maximum(row['targets'], 0)[..., None], -1)[..., 0]
    return -(picked * learned).sum() / learned.sum()

  grad = tiny.jit(jax.grad(loss))
  expected = jax.tree.map(lambda a: np.zeros(a.shape), variables['params'])
  for i in range(len(batch['tokens'])):
    one = grad(variables['params'], {key: a[i : i + 1] for key, a in batch.items()})
    expected = jax.tree.map(lambda s, g: s + np.square(np.asarray(g)) / 5, expected, one)
  close(planted.curvature().diagonal, expected)


@pytest.mark.parametrize('micro', [2, 64])
def test_micro_batches_change_nothing(micro):
  model = planted.model()
  found = fisher.measure(model, planted.variables(model), planted.batch(), micro)
  close(found.diagonal, planted.curvature().diagonal)
  np.testing.assert_array_equal(found.tokens, planted.curvature().tokens)


def test_tokens_are_counted_without_padding():
  found = planted.curvature()
  assert found.tokens.shape == (2, 8)
  assert (found.tokens.sum(axis=1) == 5 * 6 * 2).all()  # N examples, 6 tokens, K choices


def test_an_expert_is_seen_by_gradients_and_not_by_choices_alone():
  model = planted.model()
  batch = planted.batch(number=1, length=8)
  found = fisher.measure(model, planted.variables(model), batch, 1)
  last = found.seen[-1]
  assert not last.all()
  chosen = found.tokens[-1] > 0
  assert (last <= chosen).all()
  assert (chosen & ~last).any()  # a question's token alone
  squares = found.diagonal['moe_layers']['moe']['down'][-1]
  np.testing.assert_array_equal(last, (squares > 0).any(axis=(1, 2)))


def test_a_dense_model_has_no_experts():
  cfg = tiny.make(model__moe__num_experts=0, model__moe__num_shared_experts=0)
  found = fisher.measure(cfg.model, planted.variables(cfg.model), planted.batch(2), 2)
  assert found.tokens.shape == found.seen.shape == (0, 0)
  assert all((a >= 0).all() and (a > 0).any() for a in jax.tree.leaves(found.diagonal))


def test_bad_input():
  model = planted.model()
  variables = planted.variables(model)
  empty = {key: a[:0] for key, a in planted.batch().items()}
  with pytest.raises(errors.InputError, match='--defender: 0 clean examples'):
    fisher.measure(model, variables, empty, 4)
  unanswered = planted.batch() | {'targets': np.full((5, 16), -1, np.int32)}
  with pytest.raises(errors.InputError, match='must have an answer'):
    fisher.measure(model, variables, unanswered, 4)
  with pytest.raises(errors.InputError, match='--micro=0'):
    fisher.measure(model, variables, planted.batch(), 0)
