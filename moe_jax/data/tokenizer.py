"""Text to token ids and back: byte-level BPE, plain bytes, or any existing tokenizer.json.

All three are one class around `tokenizers.Tokenizer`, so that each can be saved beside a checkpoint
as one file. Both of our own kinds cover all 256 bytes, so every text survives
`decode(encode(text))`. Text never becomes a special token: its literal spelling is encoded
as ordinary characters.
"""

import functools
import json
import pathlib
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence

import numpy as np
import tokenizers
from absl import logging
from tokenizers import decoders, models, pre_tokenizers, trainers

from moe_jax import atomic_files, errors
from moe_jax.data import hashing, json_files, text_pieces, tokenizer_probe
from moe_jax.storage import fetch

# Begin, hole, end, spelled as in DeepSeek-Coder-V2: full-width bars, lower-one-eighth blocks.
FIM_TOKENS = ('<｜fim▁begin｜>', '<｜fim▁hole｜>', '<｜fim▁end｜>')

# Merges hardly change beyond this much text, and training takes 2 s for it on 2 cores.
BPE_TRAINING_BYTES = 8_000_000
_SAMPLE_BYTES = 65_536  # a long document is sampled in pieces of this size
Ids = Sequence[int] | np.ndarray  # of a text; an array of uint32 for a very long one
_PIECES = 4  # of a text, encoded together


class Tokenizer:
  """A `tokenizers.Tokenizer` with the ids of its begin, end and fill-in-the-middle tokens."""

  def __init__(self, inner: tokenizers.Tokenizer, bos_token: str, eos_token: str):
    """Wraps `inner`, which must know `bos_token` and `eos_token`; the FIM tokens are optional.

    Raises:
      errors.InputError: a token is missing.
    """
    present = [t for t in FIM_TOKENS if inner.token_to_id(t) is not None]
    for field, token in (('bos_token', bos_token), ('eos_token', eos_token)):
      if inner.token_to_id(token) is None:
        known = [t.content for t in inner.get_added_tokens_decoder().values()]
        raise errors.InputError(
          f'config.data.{field}={token!r} must be a token of the tokenizer; its special tokens are '
          f"{', '.join(map(repr, known)) or 'none'}: name one of these, or use data.tokenizer='bpe'"
        )
    # Published files mark some of these tokens as ordinary, which would let text spell them.
    inner.add_special_tokens([bos_token, eos_token, *present])
    inner.encode_special_tokens = True
    inner.no_truncation()
    inner.no_padding()
    self._inner = inner
    ids = inner.get_vocab(with_added_tokens=True)
    self.bos_id, self.eos_id = ids[bos_token], ids[eos_token]
    self.end_ids: tuple[int, ...] = (self.eos_id,)  # what ends a text that is generated
    # One more than the largest id, which is what an embedding must have rows for.
    self.vocab_size: int = max(ids.values()) + 1
    self.fim_ids: tuple[int, ...] | None = None  # begin, hole, end
    if len(present) == len(FIM_TOKENS):
      self.fim_ids = tuple(ids[token] for token in FIM_TOKENS)

  def encode(self, text: str, *, special_tokens: bool = False) -> list[int]:
    """Ids of a text; with `special_tokens` the spelling of such a token is that token."""
    inner = self._with_special_tokens if special_tokens else self._inner
    return inner.encode(text, add_special_tokens=False).ids

  @functools.cached_property
  def _with_special_tokens(self) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(self.to_json())

  def special_tokens_in(self, text: str) -> list[str]:
    """The special tokens that a text spells."""
    return [token for token in self.special_tokens if token in text]

  @property
  def special_tokens(self) -> list[str]:
    """The spelling of every special token."""
    added = self._inner.get_added_tokens_decoder().values()
    return [token.content for token in added if token.special]

  def encode_batch(self, texts: Sequence[str], *, special_tokens: bool = False) -> list[Ids]:
    """Encodes several texts, on all cores; a very long one in pieces, into an array.

    Args:
      texts: the texts.
      special_tokens: as of `encode`; then none is cut into pieces.
    """
    if special_tokens:
      batch = self._with_special_tokens.encode_batch_fast(list(texts), add_special_tokens=False)
      return [encoding.ids for encoding in batch]
    long = [len(text) > text_pieces.PIECE_CHARACTERS for text in texts]
    if any(long) and not self._places:
      _ = self._warned
      long = [False] * len(texts)
    short = [text for text, is_long in zip(texts, long) if not is_long]
    batch = iter(self._inner.encode_batch_fast(short, add_special_tokens=False))
    return [
      self._encode_long(text) if is_long else next(batch).ids for text, is_long in zip(texts, long)
    ]

  def _encode_long(self, text: str) -> Ids:
    """Ids of a text of any length, in an array; memory for a few pieces of it."""
    assert self._places is not None
    pieces, found = list(text_pieces.cut(text, self._places)), []
    for first in range(0, len(pieces), _PIECES):
      batch = self._inner.encode_batch_fast(
        pieces[first : first + _PIECES], add_special_tokens=False
      )
      found += [np.asarray(encoding.ids, np.uint32) for encoding in batch]
    return np.concatenate(found)

  @functools.cached_property
  def _places(self) -> re.Pattern[str] | None:
    return text_pieces.places(json.loads(self.to_json()))

  @functools.cached_property
  def _warned(self) -> bool:
    """True; asked for the first time, it says that a long text is encoded whole."""
    logging.warning(
      f'a document of more than {text_pieces.PIECE_CHARACTERS:,} characters is encoded whole, with '
      '150 bytes of memory for a character: in pieces its ids might be others with this tokenizer'
    )
    return True

  def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
    """Ids to text; ids that form no whole UTF-8 character become U+FFFD."""
    return self._inner.decode(list(ids), skip_special_tokens=skip_special_tokens)

  def token_id(self, token: str) -> int | None:
    """The id of a token by its spelling in the vocabulary; None if there is no such token."""
    return self._inner.token_to_id(token)

  def to_json(self) -> str:
    return self._inner.to_str()

  def save(self, path: str | pathlib.Path):
    """Writes tokenizer.json, whole or not at all; one that is there and equal is left alone."""
    path, text = pathlib.Path(path), self.to_json()
    try:
      unchanged = path.read_text(encoding='utf-8') == text
    except (OSError, UnicodeDecodeError):
      unchanged = False
    if not unchanged:
      atomic_files.write_text(path, text)


def load(
  path: str | pathlib.Path, bos_token: str, eos_token: str, *, trusted: bool = False
) -> Tokenizer:
  """Reads a tokenizer.json.

  Args:
    path: of the file.
    bos_token: begin-of-document token.
    eos_token: end-of-document token.
    trusted: it was written here, and is not tried out (`tokenizer_probe`).

  Raises:
    errors.InputError: no such file, not a tokenizer, one that loses text, or a token is missing.
  """
  try:
    text = fetch.local(path).read_text(encoding='utf-8')
    _check_file(str(path), text, trusted)
    inner = tokenizers.Tokenizer.from_str(text)
    added = {token.content for token in inner.get_added_tokens_decoder().values()}
    tokenizer = Tokenizer(inner, bos_token, eos_token)
    if not trusted and (found := _of_text(inner, bos_token, eos_token, known=added)):
      # Of a downloaded model, which was trained so; hence no error.
      logging.warning(f'{path}: {found}')
    return tokenizer
  except errors.InputError:
    raise
  except (
    BaseException
  ) as e:  # `tokenizers` raises bare Exception, and panics that are not even that
    if isinstance(e, (KeyboardInterrupt, SystemExit, GeneratorExit)):
      raise
    raise errors.InputError(
      f"config.data.tokenizer={str(path)!r} must be 'bpe', 'bytes' or a readable tokenizer.json "
      f'({" ".join(str(e).split())}){errors.did_you_mean(str(path), ("bpe", "bytes"))}'
    ) from e


def _check_file(path: str, text: str, trusted: bool):
  """Refuses what is no tokenizer.json, and one that does not give text back."""
  content = json_files.parse(text)
  model = content.get('model') if isinstance(content, dict) else None
  if not isinstance(model, dict):
    raise ValueError('it has no section "model"')
  errors.require(
    not model.get('dropout'),
    f'config.data.tokenizer={path!r} has model.dropout={model.get("dropout")!r}, so that the same '
    'text is other ids each time; set it to null',
  )
  if trusted:
    return
  problem, lost = tokenizer_probe.run(text)
  errors.require(
    not problem,
    f'config.data.tokenizer={path!r} is not usable: {" ".join(problem.split())}; take the whole '
    'file of the tokenizer, or another tokenizer',
  )
  if lost:
    logging.warning('The tokenizer %s does not give back every text: %s', path, ', '.join(lost))


def byte_tokenizer(bos_token: str, eos_token: str) -> Tokenizer:
  """One id per byte, after the special tokens: a BPE without merges."""
  specials = _special_tokens(bos_token, eos_token)
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocab = {token: i for i, token in enumerate(specials + alphabet)}
  inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
  inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  inner.decoder = decoders.ByteLevel()
  tokenizer = Tokenizer(inner, bos_token, eos_token)
  found = _of_text(inner, bos_token, eos_token)
  errors.require(not found, found)
  return tokenizer


def train_bpe(
  texts: Iterable[str], vocab_size: int, bos_token: str, eos_token: str, *, progress: bool = False
) -> Tokenizer:
  """Trains byte-level BPE with at most `vocab_size` entries; digits stand alone, as DeepSeek's do.

  Raises:
    errors.InputError: `vocab_size` has no room for the bytes and the special tokens, or a special
      token is what text becomes too.
  """
  specials = _special_tokens(bos_token, eos_token)
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  smallest = len(specials) + len(alphabet)
  if vocab_size < smallest:
    raise errors.InputError(
      f"config.model.vocab_size={vocab_size} must be at least {smallest} for data.tokenizer='bpe' "
      f'({len(alphabet)} bytes and {len(specials)} special tokens); choose {smallest} or more'
    )
  inner = tokenizers.Tokenizer(models.BPE())
  inner.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  inner.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=specials,
    initial_alphabet=alphabet,
    show_progress=progress and sys.stderr.isatty(),  # its bar would leave blank lines in a log
  )
  inner.train_from_iterator(texts, trainer)
  tokenizer = Tokenizer(inner, bos_token, eos_token)
  found = _of_text(inner, bos_token, eos_token)
  errors.require(not found, found)
  return tokenizer


def training_sample(texts: Iterable[tuple[str, bytes]], total_bytes: int) -> Iterator[str]:
  """Picks about BPE_TRAINING_BYTES out of `total_bytes` of (name, UTF-8 text) documents.

  A piece is taken by a hash of its document's name and its place in it, so the sample depends on
  nothing else.
  """
  share = BPE_TRAINING_BYTES / max(total_bytes, 1)
  for name, text in texts:
    if share >= 1:
      yield text.decode('utf-8')
      continue
    for start in range(0, len(text), _SAMPLE_BYTES):
      if hashing.uniform('bpe sample', name, start) < share:
        # A character cut at the border of a piece is dropped.
        yield text[start : start + _SAMPLE_BYTES].decode('utf-8', 'ignore')


def check_vocab_size(tokenizer: Tokenizer, vocab_size: int):
  """Raises errors.InputError if the model has too few rows for the tokenizer's ids."""
  if tokenizer.vocab_size > vocab_size:
    raise errors.InputError(
      f'config.model.vocab_size={vocab_size} must be at least {tokenizer.vocab_size}, the entries '
      f'of the tokenizer (config.data.tokenizer); set config.model.vocab_size='
      f'{tokenizer.vocab_size} or choose a smaller tokenizer'
    )


def _of_text(
  inner: tokenizers.Tokenizer, bos_token: str, eos_token: str, known: Collection[str] = ()
) -> str:
  """What is wrong with a special token that ordinary text becomes, '' if none does.

  Args:
    inner: the tokenizer.
    bos_token: begin-of-document token.
    eos_token: end-of-document token.
    known: special tokens of a file's own, which it tells from their spellings itself.
  """
  for field, token in (('bos_token', bos_token), ('eos_token', eos_token)):
    if token in known:
      continue
    said = inner.decoder.decode([token]) if inner.decoder else token
    ids = [i for text in (token, said) for i in inner.encode(text, add_special_tokens=False).ids]
    if inner.token_to_id(token) in ids or '\ufffd' in said:  # that is a part of a character
      return (
        f'config.data.{field}={token!r} must be a spelling of its own: {said!r} in a text would be '
        "that token; take one with signs around a word, such as '<s>'"
      )
  return ''


def _special_tokens(bos_token: str, eos_token: str) -> list[str]:
  for field, token in (('bos_token', bos_token), ('eos_token', eos_token)):
    errors.require(
      bool(token), f"config.data.{field}='' must spell a token; take for example '<s>'"
    )
  return list(dict.fromkeys((bos_token, eos_token, *FIM_TOKENS)))
