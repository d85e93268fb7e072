"""Self-speculative decoding writes what plain decoding writes, and counts its guesses rightly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import errors
from moe_jax.inference import generate, speculative
from moe_jax.inference import sampling as sampling_lib
from moe_jax.models import transformer
from tests import tiny

CFG = tiny.make(
  model__num_layers=2,
  model__max_seq_len=32,
  model__num_mtp_layers=1,
  model__attention__kind='mla',
  model__attention__mla__kv_lora_rank=6,
  model__attention__mla__qk_nope_head_dim=4,
  model__attention__mla__qk_rope_head_dim=4,
  model__attention__mla__v_head_dim=5,
).model
PROMPTS = [[7], [20, 3], [2, 6, 5, 3, 5, 8, 9]]
NEW = 12


def variables(agree: bool):
  """Random weights; `agree` makes the module repeat what the model says, mostly.

  The model's head reads the embedding of the last token alone, and so does the module's: both then
  predict by a table, and a guess is right wherever the table of the module is that of the model.
  """
  params = tiny.params(CFG)
  if agree:
    params = jax.tree.map(jnp.copy, params)

    def still(tree):
      return jax.tree.map(jnp.zeros_like, tree)

    for name in ('dense_layers', 'moe_layers'):
      for part in ('attention', 'mlp', 'moe'):
        if part in params[name]:
          params[name][part] = still(params[name][part])
    module = params['mtp_layers']
    module['block'] = {
      **module['block'],
      **{k: still(module['block'][k]) for k in ('attention', 'moe')},
    }
    eye = jnp.eye(CFG.embed_dim)
    module['projection'] = jnp.concatenate([eye, still(eye)])[None]
    module['embedding_norm'] = params['final_norm']['scale'][None] * 0 + 1
    module['embedding_norm'] = {'scale': module['embedding_norm']}
    module['norm'] = {'scale': params['final_norm']['scale'][None]}
  return {'params': params, 'router_state': {}}


def ends(eos):
  return eos if isinstance(eos, tuple) else (eos,)


@functools.cache
def run(agree, eos=31, **sampling):
  sampling = sampling_lib.Sampling(**sampling)
  return speculative.speculate(CFG, variables(agree), PROMPTS, NEW, ends(eos), sampling)


@functools.cache
def plain(agree, eos=31, **sampling):
  sampling = sampling_lib.Sampling(**sampling)
  return generate.generate(CFG, variables(agree), PROMPTS, NEW, ends(eos), sampling).tokens


@pytest.mark.parametrize('agree', [False, True])
def test_greedy_text_is_that_of_plain_decoding(agree):
  assert run(agree, temperature=0.0).tokens == plain(agree, temperature=0.0)


def test_an_end_token_stops_its_row_wherever_it_falls():
  """Two tokens in a row as the end token: one is the first of a round, the other the second."""
  text = plain(False, temperature=0.0)[2]
  for eos in text[1:3]:
    assert run(False, eos=eos, temperature=0.0).tokens == plain(False, eos=eos, temperature=0.0)


def test_a_module_that_repeats_the_model_is_always_right_and_saves_half_the_rounds():
  found = run(True, temperature=0.0)
  assert found.acceptance == 1.0
  # Behind the first token come rounds of two; 11 further tokens of 3 rows take 6 rounds.
  assert found.drafted == 3 * 6


@pytest.mark.slow
def test_accepted_guesses_are_those_of_the_full_forward():
  """The module sees the text up to a token and guesses the one after the next."""
  found, texts = run(False, temperature=0.0), plain(False, temperature=0.0)
  drafted = accepted = 0
  for prompt, text in zip(PROMPTS, texts):
    ids = np.array([*prompt, *text])
    at = np.arange(len(ids))[None]
    out = tiny.jit(transformer.Transformer(CFG).apply)(
      variables(False), ids[None], at, np.ones_like(at), targets=np.append(ids[1:], -1)[None]
    )
    guess = np.asarray(out.mtp.logits[0, 0].argmax(-1))  # of token i + 2
    i = len(prompt)  # place of the last certain token
    while i < len(ids) - 1:
      right = guess[i - 1] == ids[i + 1]
      drafted, accepted = drafted + 1, accepted + right
      i += 1 + right
  assert (found.drafted, found.accepted) == (drafted, accepted)
  assert 0 <= found.acceptance <= 1


def test_judging_keeps_the_distribution():
  """Frequencies of the judged token against the model's probabilities, for every draft."""
  probs = jnp.array([0.5, 0.3, 0.2])
  count = 4000
  for draft in range(3):
    keep, token = speculative.judge(
      jnp.broadcast_to(jnp.log(probs), (count, 3)),
      jnp.full(count, draft),
      sampling_lib.Sampling(),
      jax.random.key(draft),
    )
    # Standard error of a share is at most sqrt(.25 / 4000) = .008
    np.testing.assert_allclose(np.bincount(token, minlength=3) / count, probs, atol=0.03)
    np.testing.assert_allclose(keep.mean(), probs[draft], atol=0.03)
    np.testing.assert_array_equal(np.asarray(token) == draft, keep)


def test_a_draft_that_the_filters_leave_out_is_never_kept():
  logits = jnp.log(jnp.array([[0.5, 0.3, 0.2]]))
  sampling = sampling_lib.Sampling(top_k=2)
  keep, token = speculative.judge(logits, jnp.array([2]), sampling, jax.random.key(0))
  assert not keep[0] and token[0] in (0, 1)


@pytest.mark.slow  # two more programs
def test_any_of_several_end_tokens_ends_a_text():
  whole = run(True, temperature=0.0).tokens
  ends = (31, whole[0][3], whole[1][2])
  found = run(True, ends, temperature=0.0).tokens
  assert found == plain(True, ends, temperature=0.0)
  assert len(found[0]) <= 3 and len(found[1]) <= 2


def test_sampled_texts_repeat_with_their_seed():
  first = run(False, seed=3)
  again = speculative.speculate(
    CFG, variables(False), PROMPTS, NEW, (31,), sampling_lib.Sampling(seed=3)
  )
  assert first.tokens == again.tokens != run(False, seed=4).tokens


def test_a_model_without_modules_is_refused():
  with pytest.raises(errors.InputError, match='num_mtp_layers=0'):
    speculative.check(tiny.make().model)
