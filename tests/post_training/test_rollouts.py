"""Answers in groups: the same whatever stands beside them, and scored as a trainer would."""

import jax
import numpy as np
import pytest

from moe_jax.models import transformer
from moe_jax.post_training import rollouts
from tests import tiny
from tests.training.test_policy_loss import RUN

PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
SIZE = 3
EOS = 11


def sample(*, greedy=False, draw=0, prompts=PROMPTS, mesh=None, on_answer=None, **changes):
  small = {
    'objective__policy__group_size': SIZE,
    'objective__policy__max_new_tokens': 7,
    'model__moe__router': 'topk',
    'model__max_seq_len': 16,
  }
  cfg = tiny.make(**(RUN | small | changes))
  mesh = mesh or tiny.mesh(1)
  variables = {'params': tiny.params(cfg.model), 'router_state': {}}
  found = rollouts.Sampler(cfg, (EOS,), mesh).sample(
    variables, prompts, draw, greedy=greedy, on_answer=on_answer
  )
  return cfg, found.answers


@pytest.mark.slow
def test_answers_do_not_depend_on_how_many_are_written_at_once():
  cfg, whole = sample()
  _, refilled = sample(objective__policy__rows=2)
  assert len(whole) == len(PROMPTS) * SIZE
  assert len({tuple(one.tokens) for one in whole}) > len(PROMPTS)
  for a, b in zip(whole, refilled):
    assert (a.question, a.prompt, a.tokens, a.ended) == (b.question, b.prompt, b.tokens, b.ended)
    np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-5)
    np.testing.assert_array_equal(a.experts, b.experts)
  for one in whole:
    assert one.ended == (one.tokens[-1] == EOS) and EOS not in one.tokens[:-1]
    assert 1 <= len(one.tokens) <= 7 and (one.ended or len(one.tokens) == 7)
  # Told of as they end: two rows are written at a time, and whoever listens need not wait for all.
  events, write = [], rollouts._write
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(rollouts, '_write', lambda *a, **k: events.append('write') or write(*a, **k))
    _, told = sample(
      objective__policy__rows=2, on_answer=lambda number, one: events.append((number, one.tokens))
    )
  heard = [event for event in events if event != 'write']
  assert sorted(heard) == [(number, one.tokens) for number, one in enumerate(told)]
  assert [one.tokens for one in told] == [one.tokens for one in whole]
  # The first is heard of behind the next piece's start, and pieces start behind it still.
  first = events.index(heard[0])
  assert events[:first] == ['write', 'write'] and 'write' in events[first:]
  _, again = sample(draw=1)
  assert [one.tokens for one in again] != [one.tokens for one in whole]
  _check_scores(cfg, whole)


def _check_scores(cfg, answers):
  """Log-probabilities, entropy and experts are those of a whole forward pass of the trainer."""
  model, temperature = transformer.Transformer(cfg.model, train=True), 0.7
  variables = {'params': tiny.params(cfg.model)}

  @tiny.jit
  def run(tokens, segments):
    positions = np.arange(16)[None]
    return model.apply(variables, tokens, positions, segments, mutable=['intermediates'])

  for one in answers:
    ids = [*one.prompt, *one.tokens]
    tokens, segments = np.zeros((1, 16), np.int32), np.zeros((1, 16), np.int32)
    tokens[0, : len(ids)], segments[0, : len(ids)] = ids, 1
    out, sown = run(tokens, segments)
    first = len(one.prompt) - 1
    logits = out.logits[0, first : first + len(one.tokens)]
    tempered = jax.nn.log_softmax(logits / temperature)
    at = np.arange(len(one.tokens)), np.array(one.tokens)
    np.testing.assert_allclose(one.log_probs, tempered[at], atol=2e-5)
    np.testing.assert_allclose(one.model_log_probs, jax.nn.log_softmax(logits)[at], atol=2e-5)
    entropy = -(np.exp(tempered) * tempered).sum(-1)
    np.testing.assert_allclose(one.entropy, entropy, atol=2e-5)
    experts = sown['intermediates']['moe_layers']['moe']['expert_idx'][0][:, 0]
    np.testing.assert_array_equal(np.sort(one.experts), np.sort(experts[:, : len(ids) - 1]))


@pytest.mark.slow
def test_a_greedy_answer_is_the_likeliest_and_one_per_question():
  cfg, found = sample(greedy=True)
  assert [one.question for one in found] == [0, 1, 2]
  _check_likeliest(cfg, found[0])


def _check_likeliest(cfg, one):
  ids = [*one.prompt, *one.tokens]
  tokens = np.array([ids])
  out = transformer.apply(
    cfg.model,
    {'params': tiny.params(cfg.model)},
    tokens,
    np.arange(len(ids))[None],
    np.ones_like(tokens),
  )
  first = len(one.prompt) - 1
  np.testing.assert_array_equal(
    np.argmax(out.logits[0, first : first + len(one.tokens)], -1), one.tokens
  )


@pytest.mark.slow
def test_devices_that_share_the_rows_write_the_same_answers():
  _, alone = sample()
  _, shared = sample(mesh=tiny.mesh(data=4))
  assert [one.tokens for one in shared] == [one.tokens for one in alone]


def test_the_draws_of_an_answer_hang_on_seed_draw_and_number():
  keys = {rollouts._key(s, d, n) for s in range(3) for d in range(3) for n in range(3)}
  assert len(keys) == 27
