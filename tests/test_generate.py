import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moe_jax import errors, generate
from moe_jax.models import transformer

# One MoE layer after a dense one, and grouped key-value heads: all that a cache can get wrong.
CFG = tiny.make(model__num_layers=2).model
PROMPTS = [[7], [20, 3], [2, 6, 5, 3, 5, 8, 9]]
NEW = 6
EOS = 14  # the greedy continuation of the first prompt has it third, the others do not have it


@functools.cache
def forward():
  apply = transformer.Transformer(CFG).apply
  return tiny.jit(lambda params, *rows: apply({'params': params}, *rows).logits)


def next_logits(ids):
  """Logits after `ids`, a row of its own, without a cache."""
  tokens = np.zeros((1, CFG.max_seq_len), np.int32)
  tokens[0, : len(ids)] = ids
  at = np.arange(CFG.max_seq_len)[None]
  return forward()(tiny.params(CFG), tokens, at, (at < len(ids)).astype(np.int32))[0, len(ids) - 1]


def greedy(prompt, steps=NEW):
  ids = list(prompt)
  for _ in range(steps):
    ids.append(int(np.argmax(next_logits(ids))))
  return ids[len(prompt) :]


def run(prompts, **sampling):
  return generate.generate(
    CFG, {'params': tiny.params(CFG)}, prompts, NEW, EOS, generate.Sampling(**sampling)
  )


@pytest.fixture(scope='module')
def batch():
  """A greedy run of all prompts together."""
  return run(PROMPTS, temperature=0.0)


def test_greedy_is_the_argmax_of_the_full_forward_of_each_prompt_alone(batch):
  assert batch.tokens[1:] == [greedy(prompt) for prompt in PROMPTS[1:]]
  count = sum(len(row) for row in batch.tokens)
  assert batch.tokens_per_second == pytest.approx(count / batch.seconds)


def test_end_token_stops_its_row_only_and_is_left_out(batch):
  want = greedy(PROMPTS[0])
  assert want.index(EOS) == 2
  assert batch.tokens[0] == want[:2]
  assert [len(row) for row in batch.tokens[1:]] == [NEW, NEW]


@pytest.fixture(scope='module')
def sampled():
  return run(PROMPTS, seed=1).tokens


def test_same_seed_same_text_other_seed_other_text(sampled):
  assert run(PROMPTS, seed=1).tokens == sampled
  assert run(PROMPTS, seed=2).tokens != sampled


def test_equal_prompts_of_a_batch_draw_differently():
  first, second, third = run([PROMPTS[1]] * 3, seed=1).tokens
  assert first != second or second != third


def test_draws_follow_the_models_distribution():
  """Frequencies of many draws against the softmax: `_draw` alone, without a model."""
  probs = jnp.array([0.5, 0.3, 0.2])
  draws = generate._draw(
    jnp.broadcast_to(jnp.log(probs), (4000, 3)), generate.Sampling(), jax.random.key(0)
  )
  # Standard error of a share is at most sqrt(.25 / 4000) = .008
  np.testing.assert_allclose(np.bincount(draws) / 4000, probs, atol=0.03)


LOGITS = jnp.log(jnp.array([[0.1, 0.4, 0.15, 0.35], [0.7, 0.1, 0.1, 0.1]]))


def kept(**sampling):
  """Which tokens keep a finite logit."""
  return np.isfinite(generate.filter_logits(LOGITS, generate.Sampling(**sampling))).tolist()


def test_no_filter_keeps_the_logits():
  np.testing.assert_array_equal(generate.filter_logits(LOGITS, generate.Sampling()), LOGITS)


def test_temperature_divides():
  got = generate.filter_logits(LOGITS, generate.Sampling(temperature=0.5))
  np.testing.assert_allclose(got, 2 * LOGITS, rtol=1e-6)


def test_top_k():
  first, _ = kept(top_k=2)
  assert first == [False, True, False, True]
  assert kept(top_k=1) == [[False, True, False, False], [True, False, False, False]]
  assert kept(top_k=4) == kept(top_k=99) == kept() == [[True] * 4] * 2


def test_top_p_keeps_the_fewest_that_reach_it():
  # Sorted .4, .35, .15, .1 add up to .4, .75, .9, 1; the second row is .7 and then ties.
  assert kept(top_p=0.39) == [[False, True, False, False], [True, False, False, False]]
  assert kept(top_p=0.41) == [[False, True, False, True], [True, False, False, False]]
  assert kept(top_p=0.76)[0] == [False, True, True, True]
  assert kept(top_p=0.91)[0] == [True] * 4
  assert kept(top_p=1e-6) == kept(top_k=1)


def test_top_p_works_on_what_top_k_and_temperature_leave():
  # top_k = 2 leaves .4, .35: of .75 the first is .53, which reaches .5.
  assert kept(top_k=2, top_p=0.5)[0] == [False, True, False, False]
  assert kept(top_p=0.5)[0] == [False, True, False, True]
  # Temperature 1/8: .4^8 / (.4^8 + .35^8 + ...) = .74
  assert kept(temperature=0.125, top_p=0.7)[0] == [False, True, False, False]


def test_temperature_0_ignores_the_filters_and_the_key():
  sampling = generate.Sampling(temperature=0.0, top_p=0.1)
  np.testing.assert_array_equal(generate._draw(LOGITS, sampling, jax.random.key(0)), [1, 0])


@pytest.mark.parametrize(
  'field, value, rule',
  [
    ('temperature', -0.1, 'at least 0'),
    ('top_k', -1, 'at least 0'),
    ('top_p', 0.0, 'above 0 and at most 1'),
    ('top_p', 1.5, 'above 0 and at most 1'),
    ('seed', -1, 'at least 0'),
  ],
)
def test_sampling_out_of_range(field, value, rule):
  with pytest.raises(errors.InputError, match=rf'--{field}={value} must be {rule}'):
    generate.Sampling(**{field: value})


@pytest.mark.parametrize(
  'longest, new, message',
  [
    (11, 6, r'--prompt has 11 tokens.*max_new_tokens=6.*max_seq_len=16; shorten .* to 10 tokens'),
    (1, 16, r'max_seq_len=16; shorten the prompt to 0 tokens or ask for fewer'),
    (1, 99, r'max_seq_len=16; shorten the prompt to 0 tokens'),
    (3, 0, r'--max_new_tokens=0 must be at least 1'),
  ],
)
def test_lengths_that_do_not_fit(longest, new, message):
  with pytest.raises(errors.InputError, match=message):
    generate.check_lengths(CFG, longest, new)


def test_lengths_that_just_fit():
  generate.check_lengths(CFG, 10, 6)


@pytest.mark.parametrize('prompts', [[[]], [[1, 2], []], [[1] * 11]])
def test_bad_prompts_are_refused_before_compiling(prompts):
  with pytest.raises(errors.InputError, match='--prompt'):
    run(prompts)
