"""Pieces of a long text give the ids of the whole, for every tokenizer that may be cut up."""

import json

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, trainers

from moe_jax.data import text_pieces
from moe_jax.data import tokenizer as tokenizer_lib

TEXT = (
  'Ab1 c\n\n  d_e\tf 12\u00a0g\u2028h\r\n i\u3000j 漢 字a b \n\n\n\nk\'s \'t x-y "z"  \n 9 '
  '\n0é f  ก ข a1234 5b ...c !d\n e~ f[g] h 漢a 字\nA B\tC \n\n D   '
)


def byte_level(**options):
  return pre_tokenizers.ByteLevel(add_prefix_space=False, **options)


def isolated(*patterns):
  """Splits, and the bytes of what they leave."""
  splits = [pre_tokenizers.Split(Regex(pattern), 'isolated') for pattern in patterns]
  return [*splits, byte_level(use_regex=False)]


# The splits of DeepSeek LLM and V2, of Coder, and of V3 and R1, with fewer letters in the first.
V2 = isolated(
  '[\r\n]', r'\s?[A-Za-zµÀ-ÖØ-öø-ƺ]+', r'\s?[!-/:-~！-／：-～‘-‟　-。]+', r'\s+$', '[一-龥]+'
)
V2.insert(-1, pre_tokenizers.Digits(individual_digits=True))
CODER = isolated('[\r\n]', r'\s?\p{L}+', r'\s?\p{P}+', '[一-龥ࠀ-一가-퟿]+', r'\p{N}')
V3 = isolated(r'\p{N}{1,3}', '[一-龥぀-ゟ゠-ヿ]+', text_pieces._WORDS_V3)
V3_AS_WRITTEN = isolated(text_pieces._WORDS_V3.replace(r'\r', '\r').replace(r'\n', '\n'))
GPT2 = [pre_tokenizers.Digits(individual_digits=True), byte_level()]


def trained(steps, added=(), normalizer=None, model=models.BPE):
  inner = tokenizers.Tokenizer(model())
  inner.pre_tokenizer = pre_tokenizers.Sequence(steps)
  if normalizer is not None:
    inner.normalizer = normalizer
  kinds = {models.BPE: trainers.BpeTrainer, models.WordPiece: trainers.WordPieceTrainer}
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  options = dict(special_tokens=['<b>', '<e>'], initial_alphabet=alphabet, show_progress=False)
  inner.train_from_iterator([TEXT] * 9, kinds[model](vocab_size=340, **options))
  inner.add_tokens(list(added))
  return tokenizer_lib.Tokenizer(inner, '<b>', '<e>')


def where(tokenizer):
  return text_pieces.places(json.loads(tokenizer.to_json()))


@pytest.mark.parametrize(
  'steps', [V2, CODER, V3, V3_AS_WRITTEN, GPT2], ids='v2 coder v3 v3n gpt2'.split()
)
def test_ids_in_pieces_are_those_of_the_whole(steps, monkeypatch):
  tokenizer = trained(steps, ['<think>', ' x'], normalizers.Sequence([]))
  (whole,) = tokenizer.encode_batch([TEXT * 3])
  assert len(whole) < 0.9 * len((TEXT * 3).encode())  # there are merges
  for length in (1, 2, 3, 5, 8, 13, 100):
    monkeypatch.setattr(text_pieces, 'PIECE_CHARACTERS', length)
    pieces = list(text_pieces.cut(TEXT * 3, where(tokenizer)))
    assert ''.join(pieces) == TEXT * 3 and len(pieces) > 3
    assert list(tokenizer.encode_batch([TEXT * 3])[0]) == whole


def test_where_nobody_can_be_sure_a_text_is_left_whole():
  assert where(trained(GPT2)) and where(trained(V3))
  metaspace = pre_tokenizers.Metaspace()
  for steps in (
    isolated('[a-z]+ [a-z]+', r'\s?\p{L}+'),  # pairs of words
    isolated(r'(?<=a) b', r'\s?\p{L}+'),
    isolated(r'[\n ]+', r'\s?\p{L}+'),
    isolated('[^a]+', r'\s?\p{L}+'),
    isolated(r'\p{N}+'),  # nothing splits behind a word
    isolated(r'\s?[a-z]+'),  # nor behind a capital letter
    isolated(r'\s?\p{L}'),  # one letter each, and spaces stay with others
    [metaspace, byte_level()],
    [pre_tokenizers.Split(Regex(r'\s?\p{L}+'), 'merged_with_next'), byte_level(use_regex=False)],
    [pre_tokenizers.Split(Regex(r'\s?\p{L}+'), 'isolated', invert=True), byte_level()],
    [pre_tokenizers.ByteLevel(add_prefix_space=True)],
  ):
    assert where(trained(steps)) is None, steps
  assert where(trained(GPT2, normalizer=normalizers.Lowercase())) is None
  assert where(trained(GPT2, model=models.WordPiece)) is None
  for token in ('a b', AddedToken('x', rstrip=True), AddedToken('x', single_word=True)):
    assert where(trained(GPT2, [token])) is None
  content = json.loads(trained(GPT2).to_json())
  assert text_pieces.places(content | {'pre_tokenizer': None}) is None
