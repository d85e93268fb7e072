import numpy as np
import pytest
import tokenizers

from moe_jax import errors
from moe_jax.data import fim
from moe_jax.data import tokenizer as tokenizer_lib

TOKENIZER = tokenizer_lib.byte_tokenizer('<s>', '</s>')
TEXT = 'def f(é):\n  return 𝄞\n'


def transform(text, tokenizer, rng, fim_rate):
  """One document's ids, as the corpus makes them."""
  return fim.assemble(tokenizer, tokenizer.encode_batch(fim.split(text, rng, fim_rate)))


def test_rate_zero_is_plain_text():
  ids = transform(TEXT, TOKENIZER, np.random.default_rng(0), 0.0)
  assert ids == [TOKENIZER.bos_id, *TOKENIZER.encode(TEXT), TOKENIZER.eos_id]


def test_prefix_suffix_middle_hold_the_whole_text():
  begin, hole, end = TOKENIZER.fim_ids
  for seed in range(50):
    ids = transform(TEXT, TOKENIZER, np.random.default_rng(seed), 1.0)
    assert ids[:2] == [TOKENIZER.bos_id, begin] and ids[-1] == TOKENIZER.eos_id
    h, e = ids.index(hole), ids.index(end)
    prefix, suffix, middle = ids[2:h], ids[h + 1 : e], ids[e + 1 : -1]
    assert TOKENIZER.decode(prefix + middle + suffix) == TEXT
    # Cuts fall between characters, never inside one.
    assert '\ufffd' not in TOKENIZER.decode(prefix) + TOKENIZER.decode(middle)


def test_parts_are_tokenised_apart():
  tokenizer = tokenizer_lib.train_bpe(['aaaa'] * 9, 300, '<s>', '</s>')
  whole = tokenizer.encode('aaaa')
  assert len(whole) == 1
  lengths = {len(transform('aaaa', tokenizer, np.random.default_rng(s), 1.0)) for s in range(20)}
  assert max(lengths) > len(whole) + 5


def test_cuts_are_uniform_and_may_leave_parts_empty():
  parts = [fim.split('abc', np.random.default_rng(s), 1.0) for s in range(400)]
  assert {len(p) for p, _, _ in parts} == {0, 1, 2, 3} == {len(m) for _, _, m in parts}
  assert fim.split('', np.random.default_rng(0), 1.0) == ('', '', '')


def test_share_of_documents():
  split = [len(fim.split('abc', fim.document_rng(0, f'doc{i}'), 0.5)) for i in range(1000)]
  # Binomial(1000, 1/2) has standard deviation 16.
  assert 420 < split.count(3) < 580


def test_randomness_belongs_to_seed_and_name():
  def draw(seed, name):
    return fim.document_rng(seed, name).random()

  assert draw(0, 'a') == draw(0, 'a')
  assert len({draw(0, 'a'), draw(0, 'b'), draw(1, 'a')}) == 3


def test_a_tokenizer_without_the_tokens():
  inner = tokenizers.Tokenizer(tokenizers.models.BPE())
  inner.add_special_tokens(['<s>', '</s>'])
  tokenizer = tokenizer_lib.Tokenizer(inner, '<s>', '</s>')
  fim.check(tokenizer, 0.0)
  fim.check(TOKENIZER, 0.5)
  with pytest.raises(errors.InputError, match=r'config\.data\.fim_rate=0\.5 .*set fim_rate=0'):
    fim.check(tokenizer, 0.5)


def test_a_prompt_is_a_document_up_to_its_middle():
  begin, hole, end = TOKENIZER.fim_ids
  encode = TOKENIZER.encode
  want = [TOKENIZER.bos_id, begin, *encode('def f('), hole, *encode('\n'), end]
  assert fim.prompt(TOKENIZER, 'def f(', '\n') == want
  assert fim.prompt(TOKENIZER, '', '') == [TOKENIZER.bos_id, begin, hole, end]


def test_a_prompt_for_a_tokenizer_without_the_tokens_is_refused():
  inner = tokenizers.Tokenizer(tokenizers.models.BPE())
  inner.add_special_tokens(['<s>', '</s>'])
  with pytest.raises(errors.InputError, match="--prefix='def f' and --suffix need the tokens"):
    fim.prompt(tokenizer_lib.Tokenizer(inner, '<s>', '</s>'), 'def f', '')
