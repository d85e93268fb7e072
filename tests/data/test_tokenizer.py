import random

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from moe_jax import errors
from moe_jax.data import text_pieces
from moe_jax.data import tokenizer as tokenizer_lib

BOS, EOS = '<｜begin▁of▁sentence｜>', '<｜end▁of▁sentence｜>'
TEXTS = ['def f(x):\n    return x + 1234\n', 'for i in range(10):\n  print(i)\n'] * 20


def make(kind: str) -> tokenizer_lib.Tokenizer:
  if kind == 'bytes':
    return tokenizer_lib.byte_tokenizer(BOS, EOS)
  return tokenizer_lib.train_bpe(TEXTS, 300, BOS, EOS)


def random_texts() -> list[str]:
  """Text from all planes of Unicode, with control characters and literal special tokens."""
  rng = random.Random(0)
  ranges = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
  texts = ['', ' ', '\r\n\t \x00', '１２３ ½ ٣', 'e\u0301 \ufeff\ufffd', BOS + 'x' + EOS]
  for _ in range(100):
    spans = [rng.choice(ranges) for _ in range(rng.randrange(30))]
    texts.append(''.join(chr(rng.randrange(*span)) for span in spans))
  return texts + list(tokenizer_lib.FIM_TOKENS)


@pytest.mark.parametrize('kind', ['bytes', 'bpe'])
def test_any_text_survives(kind, tmp_path):
  tokenizer = make(kind)
  tokenizer.save(tmp_path / 'tokenizer.json')
  loaded = tokenizer_lib.load(tmp_path / 'tokenizer.json', BOS, EOS)
  assert loaded.to_json() == tokenizer.to_json()
  texts = random_texts()
  batch = loaded.encode_batch(texts)
  for text, ids in zip(texts, batch):
    assert tokenizer.encode(text) == ids
    assert loaded.decode(ids) == text
    assert max(ids, default=0) < tokenizer.vocab_size


@pytest.mark.parametrize('kind', ['bytes', 'bpe'])
def test_text_cannot_spell_special_tokens(kind):
  tokenizer = make(kind)
  special = {tokenizer.bos_id, tokenizer.eos_id, *tokenizer.fim_ids}
  assert special == set(range(5))
  for token in (BOS, EOS, *tokenizer_lib.FIM_TOKENS):
    assert not special & set(tokenizer.encode(f'a{token}b'))


@pytest.mark.parametrize(
  'kind, token',
  # Of bytes 'Ċ' is the line break and 'é' a part of 鿿; 'def' is a word that BPE learns.
  [('bytes', 'a'), ('bytes', 'Ċ'), ('bytes', 'é'), ('bpe', 'a'), ('bpe', 'def')],
)
def test_a_special_token_is_nothing_that_text_becomes(kind, token):
  makers = {
    'bytes': tokenizer_lib.byte_tokenizer,
    'bpe': lambda *specials: tokenizer_lib.train_bpe(TEXTS, 300, *specials),
  }
  for field, specials in (('bos_token', (token, EOS)), ('eos_token', (BOS, token))):
    with pytest.raises(errors.InputError, match=f"{field}='{token}' must be a spelling of its"):
      makers[kind](*specials)


def test_a_file_whose_end_token_is_a_word_of_texts_is_warned_of(tmp_path, caplog):
  """A downloaded model may have been trained so."""
  make('bytes').save(tmp_path / 't.json')
  assert tokenizer_lib.load(tmp_path / 't.json', BOS, EOS).eos_id != 0 and not caplog.records
  tokenizer_lib.load(tmp_path / 't.json', BOS, 'a')
  assert "eos_token='a' must be a spelling of its own" in caplog.text


@pytest.mark.parametrize('token', ['<s>', '[BOS]', '\n', '<|end|>'])
def test_other_spellings_are_special_tokens(token):
  for tokenizer in (
    tokenizer_lib.byte_tokenizer(token, EOS),
    tokenizer_lib.train_bpe([*TEXTS, f'a{token}b ' * 50], 300, token, EOS),
  ):
    ids = tokenizer.encode(f'a{token}b')
    assert tokenizer.bos_id not in ids and tokenizer.decode(ids) == f'a{token}b'


def test_an_empty_special_token():
  for build in (tokenizer_lib.byte_tokenizer, lambda *s: tokenizer_lib.train_bpe(TEXTS, 300, *s)):
    with pytest.raises(errors.InputError, match="config.data.eos_token='' must spell a token"):
      build(BOS, '')


def test_special_tokens_are_shown_only_on_request():
  tokenizer = make('bytes')
  ids = [tokenizer.bos_id, *tokenizer.encode('hi'), tokenizer.eos_id]
  assert tokenizer.decode(ids) == 'hi'
  assert tokenizer.decode(ids, skip_special_tokens=False) == f'{BOS}hi{EOS}'


def test_bytes_are_one_id_each():
  tokenizer = make('bytes')
  assert tokenizer.vocab_size == 256 + 5
  assert len(tokenizer.encode('aé𝄞')) == 1 + 2 + 4


def test_bpe_is_deterministic_bounded_and_splits_digits():
  tokenizer = make('bpe')
  assert tokenizer.to_json() == make('bpe').to_json()
  assert tokenizer.vocab_size <= 300
  assert len(tokenizer.encode('return')) < len('return')
  assert len(tokenizer.encode('1234')) == 4


def test_bpe_needs_room_for_the_bytes():
  with pytest.raises(errors.InputError, match=r'config\.model\.vocab_size=100 .*at least 261'):
    tokenizer_lib.train_bpe(TEXTS, 100, BOS, EOS)


def test_published_files_with_ordinary_sentinels_padding_and_templates(tmp_path):
  inner = tokenizers.Tokenizer.from_str(make('bytes').to_json())
  inner.add_tokens(['<s>', '</s>'])  # not marked special, like FIM tokens in published files
  inner.post_processor = tokenizers.processors.TemplateProcessing('<s> $A', None, [('<s>', 261)])
  inner.enable_truncation(2)
  inner.enable_padding()
  inner.save(str(tmp_path / 't.json'))
  tokenizer = tokenizer_lib.load(str(tmp_path / 't.json'), '<s>', '</s>')
  assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (261, 262, 263)
  assert [len(ids) for ids in tokenizer.encode_batch(['<s>abc', 'x'])] == [6, 1]


def test_a_tokenizer_without_fim_tokens_says_so(tmp_path):
  inner = tokenizers.Tokenizer(tokenizers.models.BPE())
  inner.add_special_tokens([BOS, EOS])
  assert tokenizer_lib.Tokenizer(inner, BOS, EOS).fim_ids is None


def test_bad_files(tmp_path):
  with pytest.raises(errors.InputError, match=r"config\.data\.tokenizer='byte' .*mean 'bytes'"):
    tokenizer_lib.load('byte', BOS, EOS)
  (tmp_path / 't.json').write_text('{}')
  with pytest.raises(errors.InputError, match=r'config\.data\.tokenizer=.*t\.json.*readable'):
    tokenizer_lib.load(tmp_path / 't.json', BOS, EOS)
  make('bytes').save(tmp_path / 't.json')
  with pytest.raises(
    errors.InputError, match=r"config\.data\.bos_token='<s>' .*begin▁of.*name one"
  ):
    tokenizer_lib.load(tmp_path / 't.json', '<s>', EOS)
  with pytest.raises(errors.InputError, match=r"config\.data\.eos_token='</s>'"):
    tokenizer_lib.load(tmp_path / 't.json', BOS, '</s>')


def test_vocabulary_larger_than_the_model():
  tokenizer_lib.check_vocab_size(make('bytes'), 261)
  with pytest.raises(errors.InputError, match=r'vocab_size=260 must be at least 261.*=261'):
    tokenizer_lib.check_vocab_size(make('bytes'), 260)


def test_training_sample_is_bounded_spread_and_independent_of_order(monkeypatch):
  texts = [(f'doc{i}', bytes([97 + i]) * 10_000) for i in range(20)]
  assert [len(t) for t in tokenizer_lib.training_sample(texts, 200_000)] == [10_000] * 20
  monkeypatch.setattr(tokenizer_lib, 'BPE_TRAINING_BYTES', 50_000)
  monkeypatch.setattr(tokenizer_lib, '_SAMPLE_BYTES', 100)
  sample = list(tokenizer_lib.training_sample(texts, 200_000))
  # 2000 pieces taken with probability 1/4: 500 with a standard deviation of 19.
  assert 400 < len(sample) < 600
  assert len({piece[0] for piece in sample}) == 20
  assert sorted(sample) == sorted(tokenizer_lib.training_sample(texts[::-1], 200_000))


def test_training_sample_drops_characters_cut_at_a_border(monkeypatch):
  monkeypatch.setattr(tokenizer_lib, 'BPE_TRAINING_BYTES', 999)
  monkeypatch.setattr(tokenizer_lib, '_SAMPLE_BYTES', 3)
  pieces = list(tokenizer_lib.training_sample([('a', 'é'.encode() * 500)], 1000))
  assert set(pieces) <= {'é', ''}  # no U+FFFD


def test_saving_again_writes_nothing_unless_it_differs(tmp_path, monkeypatch):
  tokenizer, path = tokenizer_lib.byte_tokenizer('<b>', '<e>'), tmp_path / 'tokenizer.json'
  tokenizer.save(path)
  whole = path.read_text()
  path.write_text(whole[:100])
  tokenizer.save(path)
  assert path.read_text() == whole
  monkeypatch.setattr(tokenizer_lib.atomic_files, 'write_text', None)
  tokenizer.save(path)


def test_a_special_token_in_a_text_is_that_token_by_a_switch():
  tokenizer = tokenizer_lib.byte_tokenizer(BOS, EOS)
  text = f'a{BOS}b'
  spelled, meant = tokenizer.encode(text), tokenizer.encode(text, special_tokens=True)
  assert tokenizer.bos_id not in spelled and tokenizer.decode(spelled) == text
  assert meant == [*tokenizer.encode('a'), tokenizer.bos_id, *tokenizer.encode('b')]
  assert tokenizer.special_tokens_in(text) == [BOS] and not tokenizer.special_tokens_in('a b')
  assert tokenizer.encode(text) == spelled  # the switch leaves no trace


HARD = 'Ab1 c\n\n  d_e\tf 12\u00a0g\u2028h\r\n i\u3000j 漢 字\n\n\n\nk\'s \'t x-y "z"  \n 9 \n0'


@pytest.mark.parametrize('kind', ['bpe', 'bytes'])
def test_a_long_text_in_pieces_has_the_ids_of_the_whole(kind, monkeypatch):
  """At any length of the pieces, and wherever white space stands."""
  texts = [HARD * 3, 'the cat  sat\n\non the mat 12 34\n' * 8]
  if kind == 'bpe':
    tokenizer = tokenizer_lib.train_bpe(texts, 330, BOS, EOS)
  else:
    tokenizer = tokenizer_lib.byte_tokenizer(BOS, EOS)
  whole = [list(ids) for ids in tokenizer.encode_batch(texts)]
  for length in (1, 2, 3, 5, 8, 13, 100):
    monkeypatch.setattr(text_pieces, 'PIECE_CHARACTERS', length)
    found = tokenizer.encode_batch(texts)
    assert isinstance(found[0], np.ndarray) and [list(ids) for ids in found] == whole


def test_short_texts_beside_a_long_one_are_encoded_together(monkeypatch):
  """One by one they would leave cores idle."""
  monkeypatch.setattr(text_pieces, 'PIECE_CHARACTERS', 40)
  tokenizer = tokenizer_lib.byte_tokenizer(BOS, EOS)
  inner, batches = tokenizer._inner, []

  class Counted:
    def encode_batch_fast(self, texts, **options):
      batches.append(len(texts))
      return inner.encode_batch_fast(texts, **options)

  texts = ['one', 'a word ' * 20, 'two', 'three']
  assert tokenizer._places is not None  # read from the real one
  tokenizer._inner = Counted()
  found = tokenizer.encode_batch(texts)
  assert batches[0] == 3 and [len(ids) for ids in found] == [3, 140, 3, 5]


def test_what_may_not_be_cut_is_read_whole_and_said_once(monkeypatch, caplog):
  """A space that belongs to the letter before it, as a merge or a normaliser may have it."""
  inner = tokenizers.Tokenizer(models.BPE())
  inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  trainer = trainers.BpeTrainer(
    vocab_size=262, special_tokens=[BOS, EOS],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
  )  # fmt: skip
  inner.train_from_iterator(['a b a b a b a b'] * 9, trainer)
  tokenizer = tokenizer_lib.Tokenizer(inner, BOS, EOS)
  (whole,) = tokenizer.encode_batch(['a b a b'])
  monkeypatch.setattr(text_pieces, 'PIECE_CHARACTERS', 1)
  for _ in range(2):
    assert tokenizer.encode_batch(['a b a b']) == [whole]
  assert len(whole) < 4 and caplog.text.count('is encoded whole') == 1
