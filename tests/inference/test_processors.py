"""Logits processors inside cached decoding, beside a loop that applies them to full forwards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.inference import cached_model, generate, processors
from moe_jax.inference import sampling as sampling_lib
from tests import tiny

CFG = tiny.make(
  model__num_layers=1, model__moe__num_experts=0, model__moe__num_shared_experts=0
).model
V = CFG.vocab_size
PROMPTS = [[7], [20, 3], [2, 6, 5, 3]]
NEW = 6
EOS = 11  # the greedy continuation of the first prompt has it third


def shift(constants, logits, written, state):
  """Prefers the token that lies a row's own constant and a count behind the last but one."""
  before = jnp.take(written.ids, jnp.maximum(written.count - 2, 0), axis=1)
  wanted = (jnp.where(written.count >= 2, before, 0) + constants['own'] + state) % V
  return logits.at[jnp.arange(len(logits)), wanted].add(4.0), state + 1


def shifted(own):
  return processors.Processor(shift, {'own': jnp.array(own)}, jnp.zeros((), jnp.int32))


@pytest.fixture(scope='module')
def generator():
  return generate.Generator(CFG, {'params': tiny.params(CFG)}, (EOS,))


@pytest.fixture(scope='module')
def greedy(generator):
  def run(prompts, own, **options):
    made = [shifted(own), processors.forbid_before(4, (EOS,))]
    how = sampling_lib.Sampling(temperature=0.0)
    return generator.generate(prompts, NEW, how, processors=made, **options)

  return run


OWN = [9, 4, 30]


def by_hand(prompt, own, weights):
  """Greedy tokens, with a prefill for each of them and the processors' rule in numpy."""
  new = []
  while len(new) < NEW:
    row = np.zeros((1, 16), np.int32)
    ids = [*prompt, *new]
    row[0, : len(ids)] = ids
    hidden = prefill(weights, row, np.array([len(ids)]))
    logits = np.array(hidden[len(ids) - 1])
    before = new[-2] if len(new) >= 2 else 0
    logits[(before + own + len(new)) % V] += 4.0
    if len(new) < 4:
      logits[EOS] = -np.inf
    token = int(logits.argmax())
    if token == EOS:
      break
    new.append(token)
  return new


@tiny.jit
def prefill(weights, row, length):
  hidden = cached_model.prefill(CFG, weights, row, length, 16).hidden
  return cached_model.logits_of(CFG, weights, hidden)[0]


def test_rows_have_their_own_constants_ids_and_a_state_that_goes_on(generator, greedy):
  found = greedy(PROMPTS, OWN).tokens
  assert found == [by_hand(p, own, generator._weights) for p, own in zip(PROMPTS, OWN)]
  # It did something, and the end token that was third may come from the fifth on.
  plain = generator.generate(PROMPTS, NEW, sampling_lib.Sampling(temperature=0.0)).tokens
  assert len(plain[0]) == 2 and all(len(row) >= 4 for row in found)
  assert found[1:] != plain[1:]


def test_streaming_and_stop_strings_see_the_same_tokens(greedy, monkeypatch):
  whole = greedy(PROMPTS, OWN).tokens
  monkeypatch.setattr(generate, 'PIECE', 2)
  streamed = ['', '', '']

  def text(ids):
    return ''.join(chr(ord('a') + i) for i in ids)

  def on_text(row, more):
    streamed[row] += more

  found = greedy(PROMPTS, OWN, decode_text=text, on_text=on_text)
  assert found.tokens == whole and streamed == found.texts == [text(row) for row in whole]
  cut = text(whole[1])[3]
  found = greedy(PROMPTS, OWN, decode_text=text, stop=[cut])
  assert found.texts[1] == text(whole[1]).split(cut)[0]
  assert greedy(PROMPTS, OWN, timed=True).tokens == whole  # a state may be used again


def test_a_processor_comes_before_every_filter(generator):
  # It leaves one token only, which is then drawn whatever the temperature or the filters are.
  def only(constants, logits, written, state):
    kept = jnp.full_like(logits, -jnp.inf).at[:, constants].set(0.0)
    return kept, state

  made = processors.Processor(only, jnp.int32(12))
  how = sampling_lib.Sampling(2.0, top_k=3, top_p=0.9, seed=1, min_p=0.1, repetition_penalty=1.5)
  assert generator.generate([[7]], NEW, how, processors=[made]).tokens == [[12] * NEW]


def program(functions):
  """What is compiled for a piece of decoding."""
  how = dict(cfg=CFG, sampling=sampling_lib.Sampling(repetition_penalty=1.1))
  weights = jax.eval_shape(lambda p: cached_model.unstack(CFG, {'params': p}), tiny.params(CFG))
  prompt, length = jnp.zeros((2, 64), jnp.int32), jnp.ones((2,), jnp.int32)
  args = (weights, prompt, length, jnp.uint32(0), ((),) * len(functions), ((),) * len(functions))
  state = jax.eval_shape(
    lambda *a: generate._start(*a, num_new=64, functions=functions, **how), *args
  )
  assert len(jax.tree.leaves(state.processed)) == 0
  lowered = generate._advance.lower(
    weights,
    state,
    jnp.int32(5),
    jnp.uint32(0),
    args[-2],
    eos_ids=(EOS,),
    functions=functions,
    **how,
  )
  return lowered.as_text()


def test_without_processors_nothing_is_compiled_for_them():
  def nothing(constants, logits, written, state):
    return logits, state

  assert program(()) == program((nothing,))

  def something(constants, logits, written, state):
    return logits + written.count, state

  assert program(()) != program((something,))
