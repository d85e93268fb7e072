"""Documents tokenised once into arrays on disk, cached by a hash of all that decides them.

The source is read in passes and never held in memory: one to hash it (always), one to train the
tokenizer and one to tokenise (only when the cache has no result). A mixture is one cached corpus
per component, so that new weights cost nothing.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tqdm
from absl import logging

from moe_jax import errors
from moe_jax.config import paths, schema
from moe_jax.data import cache, chat_formats, conversations, fim, hashing, preferences, sources
from moe_jax.data import tokenizer as tokenizer_lib

_VERSION = 1  # of the files below and of the way text becomes ids: raise it when either changes
_BATCH_BYTES = 4_000_000  # text tokenised at a time
_SPLITS = ('train', 'heldout')


@dataclasses.dataclass(frozen=True, eq=False)
class TokenSplit:
  """One split, end to end; document d is tokens[offsets[d]:offsets[d + 1]], BOS to EOS."""

  tokens: np.ndarray  # [num_tokens] uint16 or uint32
  offsets: np.ndarray  # [n + 1] int64
  doc_bytes: np.ndarray  # [n] int64, UTF-8 bytes of the text
  doc_domain: np.ndarray  # [n] int32, index into Corpus.domains
  # [num_tokens] uint8, 1 for the tokens to be learned; None for text, of which all are. Documents
  # that have it are never cut, and their doc_bytes are those of the answers.
  learned: np.ndarray | None = None
  # [n] int64: a document is two answers to one prompt, each with the prompt, end to end, and so
  # many tokens belong to the chosen one; None for all else.
  doc_chosen: np.ndarray | None = None
  # [n, 2] float32, log-probabilities of chosen and rejected answers under the reference, in nats;
  # None until they are known, see `runs.reference_scores`.
  reference: np.ndarray | None = None

  @property
  def num_documents(self) -> int:
    return len(self.doc_bytes)

  @property
  def num_tokens(self) -> int:
    return int(self.offsets[-1])

  @functools.cached_property
  def num_bytes(self) -> int:
    """True size of the text, the denominator of bits per byte."""
    return int(self.doc_bytes.sum())

  def sample(self, num_tokens: int) -> 'TokenSplit':
    """The beginnings of all documents, of one length, with about so many tokens; or all there is.

    The bytes of a document that is cut are taken in proportion to its tokens.
    """
    lengths = np.diff(self.offsets)
    if num_tokens >= self.num_tokens or not len(lengths):
      return self
    # With the shortest i documents whole, what is left is shared by the others.
    ordered = np.sort(lengths)
    before = np.concatenate([[0], np.cumsum(ordered)[:-1]])
    shares = (num_tokens - before) // (len(ordered) - np.arange(len(ordered)))
    most = max(1, int(shares[np.argmax(shares <= ordered)]))
    kept = np.minimum(lengths, most)
    errors.require(
      self.learned is None, 'conversations are never cut: a sample of their beginnings is of no use'
    )
    parts = [self.tokens[start : start + size] for start, size in zip(self.offsets, kept)]
    return TokenSplit(
      np.concatenate(parts),
      np.concatenate([[0], np.cumsum(kept)]),
      np.maximum(self.doc_bytes * kept // np.maximum(lengths, 1), 1),
      self.doc_domain,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
  """Everything that the training loop and the evaluation need to know about the text."""

  tokenizer: tokenizer_lib.Tokenizer
  train: tuple[TokenSplit, ...]  # one per component of a mixture, else one
  weights: tuple[float, ...]  # share of the training rows of each, summing to 1
  heldout: TokenSplit  # all components, end to end
  domains: tuple[str, ...]  # label table; the components' names if it is a mixture
  fingerprint: str  # hash of all that decides the token stream
  directories: tuple[pathlib.Path, ...]  # where each component is cached

  def heldout_bytes(self) -> bytes:
    """The held-out text itself, to measure other compressors on."""
    return b''.join((directory / 'heldout.txt').read_bytes() for directory in self.directories)


@dataclasses.dataclass(frozen=True)
class _Scan:
  """What the first pass over a source learns."""

  digests: tuple[str, str]  # train, heldout: names, domains and contents, in order
  num_documents: tuple[int, int]
  num_bytes: tuple[int, int]


def load_corpus(
  data: schema.DataConfig, vocab_size: int, seed: int, *, progress: bool = True
) -> Corpus:
  """Reads, splits and tokenises the configured text, or opens the cached result of having done so.

  Args:
    data: the config's data section.
    vocab_size: the model's vocabulary; the size to which 'bpe' is trained.
    seed: decides which documents FIM rearranges, and how.
    progress: show bars on a terminal.

  Raises:
    errors.InputError: bad or too little text, an unfitting tokenizer, an unwritable cache.
  """
  specs = sources.specs(data, progress=progress)
  scans = {k: _scan(spec, data.heldout_fraction, progress) for k, spec in specs.items()}
  _warn_of_shared_files(specs)
  tokenizer = _tokenizer(data, vocab_size, specs, scans, progress)
  fim.check(tokenizer, data.fim_rate)
  fim_key = (data.fim_rate, seed) if data.fim_rate > 0 else ()
  chats = {label: _is_chat(spec) for label, spec in specs.items()}
  if any(chats.values()):
    chat_formats.check(data, tokenizer)
  fingerprints, directories = [], []
  for label, spec in specs.items():
    scan = scans[label]
    chat_key = chat_formats.key(data) if chats[label] else ()
    what = (*scan.digests, tokenizer.to_json(), *_ends_key(tokenizer), *fim_key, *chat_key)
    key = hashing.hexdigest(_VERSION, *what)
    build = functools.partial(
      _build, spec=spec, scan=scan, tokenizer=tokenizer, data=data, seed=seed, progress=progress
    )
    target = paths.cache_root(data.cache_dir) / 'corpora' / key
    directories.append(cache.get_or_build(target, build, _is_whole))
    fingerprints.append(key)
  return _assemble(data, tokenizer, list(specs), fingerprints, directories)


def _ends_key(tokenizer: tokenizer_lib.Tokenizer) -> tuple[int, ...]:
  """Begin and end token, if they are not the first two special tokens of the tokenizer."""
  ends = tokenizer.bos_id, tokenizer.eos_id
  added = json.loads(tokenizer.to_json()).get('added_tokens') or []
  special = sorted(token['id'] for token in added if token.get('special'))
  return () if tuple(special[:2]) == ends else ends


def _warn_of_shared_files(specs: Mapping[str, sources.Spec]):
  """Says which files two members of a mixture have under two names, which decide the split."""
  first: dict[pathlib.Path, tuple[str, str]] = {}
  shared: dict[tuple[str, str], list[pathlib.Path]] = {}
  for label, spec in specs.items():
    for file, name in spec.files.items():
      other, known = first.setdefault(file, (label, name))
      if known != name:
        shared.setdefault((other, label), []).append(file)
  for (one, other), files in shared.items():
    logging.warning(
      f'config.data.mixture.{one} and .{other} both have {len(files)} files, such as {files[0]}, '
      'under different names: what is held out of the one may be trained on as the other, and '
      'held-out figures look better than they are; give paths that share no file'
    )


def _assemble(
  data: schema.DataConfig,
  tokenizer: tokenizer_lib.Tokenizer,
  labels: Sequence[str],
  fingerprints: Sequence[str],
  directories: Sequence[pathlib.Path],
) -> Corpus:
  domains = tuple(json.loads((directories[0] / 'meta.json').read_text())['domains'])
  train, heldout = ([_open(d, split) for d in directories] for split in _SPLITS)
  weights, fingerprint = [1.0], fingerprints[0]
  if data.mixture:
    domains = tuple(labels)
    train, heldout = _label(train), _label(heldout)
    weights = [data.mixture[label].weight for label in labels]
    fingerprint = hashing.hexdigest(*fingerprints, *labels, *weights)
  return Corpus(
    tokenizer=tokenizer,
    train=tuple(train),
    weights=tuple(w / sum(weights) for w in weights),
    heldout=_concatenate(heldout),
    domains=domains,
    fingerprint=fingerprint,
    directories=tuple(directories),
  )


def _scan(spec: sources.Spec, heldout_fraction: float, progress: bool) -> _Scan:
  """Reads a source once; both of its splits must come out with text."""
  counter = _Counter(heldout_fraction)
  documents = sources.read(spec)
  for document in tqdm.tqdm(documents, 'read', unit='doc', disable=None if progress else True):
    counter.add(document)
  scan = counter.result()
  total = sum(scan.num_documents)
  if not total:
    raise errors.InputError(
      f'{spec.where} must hold some text, and it holds none; name files that do'
    )
  for split, count in zip(_SPLITS, scan.num_documents):
    if not count:
      other = f'{"lower" if split == "train" else "raise"} it, or ' if total > 1 else ''
      raise errors.InputError(
        f'config.data.heldout_fraction={heldout_fraction} leaves no document for the {split} split '
        f'of {spec.where}, which has {total}; {other}give more documents (a line of a jsonl file '
        'is one, and so are 64 KiB of a text file: cut a shorter one into several files)'
      )
  return scan


class _Counter:
  """Accumulates a `_Scan`."""

  def __init__(self, heldout_fraction: float):
    self._heldout_fraction = heldout_fraction
    self._hashers = [hashing.new(), hashing.new()]
    self._num_documents, self._num_bytes = [0, 0], [0, 0]

  def add(self, document: sources.Document) -> bool:
    """Takes in one document; returns whether it is held out."""
    heldout = sources.is_heldout(document.name, self._heldout_fraction)
    hashing.update(self._hashers[heldout], document.name, document.domain, document.text)
    self._num_documents[heldout] += 1
    self._num_bytes[heldout] += len(document.text)
    return heldout

  def result(self) -> _Scan:
    digests = tuple(hasher.hexdigest() for hasher in self._hashers)
    (train, heldout), (train_bytes, heldout_bytes) = self._num_documents, self._num_bytes
    return _Scan(digests, (train, heldout), (train_bytes, heldout_bytes))


def _tokenizer(
  data: schema.DataConfig,
  vocab_size: int,
  specs: Mapping[str, sources.Spec],
  scans: Mapping[str, _Scan],
  progress: bool,
) -> tokenizer_lib.Tokenizer:
  """The configured tokenizer; 'bpe' is trained on the training split alone, and cached."""
  specials = (data.bos_token, data.eos_token)
  if data.tokenizer == 'bytes':
    tokenizer = tokenizer_lib.byte_tokenizer(*specials)
  elif data.tokenizer == 'bpe':

    def build(temporary: pathlib.Path):
      texts = (
        (document.name, _said(document, spec))
        for spec in specs.values()
        for document in sources.read(spec, quiet=True)
        if not sources.is_heldout(document.name, data.heldout_fraction)
      )
      sample = tokenizer_lib.training_sample(texts, sum(s.num_bytes[0] for s in scans.values()))
      trained = tokenizer_lib.train_bpe(sample, vocab_size, *specials, progress=progress)
      trained.save(temporary / 'tokenizer.json')

    digests = [scan.digests[0] for scan in scans.values()]
    key = hashing.hexdigest(
      _VERSION, tokenizer_lib.BPE_TRAINING_BYTES, vocab_size, *specials, *digests
    )
    target = paths.cache_root(data.cache_dir) / 'tokenizers' / key
    cache.get_or_build(target, build, lambda d: (d / 'tokenizer.json').is_file())
    tokenizer = tokenizer_lib.load(target / 'tokenizer.json', *specials, trusted=True)
  else:
    tokenizer = tokenizer_lib.load(data.tokenizer, *specials)
  tokenizer_lib.check_vocab_size(tokenizer, vocab_size)
  return tokenizer


def _said(document: sources.Document, spec: sources.Spec) -> bytes:
  """The text of a document; of a conversation what is said in it."""
  if not _is_chat(spec):
    return document.text
  turns = [turn for one in _conversations(document, spec) for turn in one]
  return '\n'.join(turn.content for turn in turns).encode('utf-8')


def _is_chat(spec: sources.Spec) -> bool:
  return spec.source in schema.CHAT_SOURCES


def _conversations(
  document: sources.Document, spec: sources.Spec
) -> tuple[conversations.Conversation, ...]:
  """The one or two conversations of a document: (chosen, rejected) of a preference."""
  if spec.source in schema.PREFERENCE_SOURCES:
    return preferences.from_bytes(document.text)
  return (conversations.from_bytes(document.text),)


def _build(
  directory: pathlib.Path,
  *,
  spec: sources.Spec,
  scan: _Scan,
  tokenizer: tokenizer_lib.Tokenizer,
  data: schema.DataConfig,
  seed: int,
  progress: bool,
):
  """Tokenises a source into `directory`."""
  dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
  counter = _Counter(data.heldout_fraction)
  disable = None if progress else True
  bar = tqdm.tqdm(
    desc='tokenise', total=sum(scan.num_bytes), unit='B', unit_scale=True, disable=disable
  )
  with contextlib.ExitStack() as stack:
    stack.enter_context(bar)
    heldout_text = stack.enter_context((directory / 'heldout.txt').open('wb'))
    writers = [stack.enter_context(_SplitWriter(directory, split, dtype)) for split in _SPLITS]
    for batch in _batches(sources.read(spec, quiet=True)):
      heldout = [counter.add(document) for document in batch]
      rates = [0.0 if is_heldout else data.fim_rate for is_heldout in heldout]
      if _is_chat(spec):
        encoded = _encode_chats(
          tokenizer, [_conversations(document, spec) for document in batch], data
        )
      else:
        encoded = _encode(tokenizer, batch, rates, seed)
      for document, is_heldout, one in zip(batch, heldout, encoded):
        writers[is_heldout].add(document.domain, one)
        if is_heldout:
          heldout_text.write(one.text)
      bar.update(sum(len(document.text) for document in batch))
  if counter.result() != scan:
    raise errors.InputError(f'{spec.where} changed while it was being tokenised; run again')
  domains = sorted(set().union(*(writer.domains for writer in writers)))
  for writer in writers:
    writer.write_documents(domains)
  digests = {file.name: _file_digest(file) for file in directory.iterdir()}
  meta = {'domains': domains, 'dtype': dtype.name, 'digests': digests}
  meta['own_digest'] = hashing.hexdigest(json.dumps(meta))
  (directory / 'meta.json').write_text(json.dumps(meta))


def _batches(documents: Iterable[sources.Document]) -> Iterator[list[sources.Document]]:
  """Groups documents into lists of about _BATCH_BYTES of text, in order."""
  batch, size = [], 0
  for document in documents:
    batch.append(document)
    size += len(document.text)
    if size >= _BATCH_BYTES:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch


class _Encoded(NamedTuple):
  """One document as it is written."""

  ids: tokenizer_lib.Ids
  text: bytes  # what is to be learned of it
  learned: np.ndarray | None  # [len(ids)] bool; None: all of it
  num_chosen: int = 0  # of two answers, tokens of the chosen one; 0: it is one text


def _encode_chats(
  tokenizer: tokenizer_lib.Tokenizer,
  batch: Sequence[tuple[conversations.Conversation, ...]],
  data: schema.DataConfig,
) -> Iterator[_Encoded]:
  """Yields each document's ids, those of its conversations end to end, and which are learned."""
  every = [one for ones in batch for one in ones]
  rendered = iter(chat_formats.render(data, every, tokenizer))
  for ones in batch:
    parts = [next(rendered) for _ in ones]
    yield _Encoded(
      np.concatenate([part.ids for part in parts]),
      ''.join(map(conversations.answers, ones)).encode('utf-8'),
      np.concatenate([part.learned for part in parts]),
      num_chosen=len(parts[0].ids) if len(parts) > 1 else 0,
    )


def _encode(
  tokenizer: tokenizer_lib.Tokenizer,
  documents: Sequence[sources.Document],
  fim_rates: Sequence[float],
  seed: int,
) -> Iterator[_Encoded]:
  """Yields each document's ids, BOS to EOS; all parts are encoded in one batch, on all cores."""
  parts = [
    fim.split(document.text.decode('utf-8'), fim.document_rng(seed, document.name), rate)
    for document, rate in zip(documents, fim_rates)
  ]
  encoded = iter(tokenizer.encode_batch([text for texts in parts for text in texts]))
  for document, texts in zip(documents, parts):
    yield _Encoded(fim.assemble(tokenizer, [next(encoded) for _ in texts]), document.text, None)


class _SplitWriter:
  """Appends documents to the files of one split; leaving its context closes them."""

  def __init__(self, directory: pathlib.Path, split: str, dtype: np.dtype):
    self._directory, self._split, self._dtype = directory, split, dtype
    self._tokens = (directory / f'{split}.tokens').open('wb')
    self._learned = None  # the file of what is to be learned, once a document asks for it
    self._lengths, self._doc_bytes, self._doc_domain, self._doc_chosen = [], [], [], []

  def __enter__(self) -> '_SplitWriter':
    return self

  def __exit__(self, *exception):
    self._tokens.close()
    if self._learned is not None:
      self._learned.close()

  @property
  def domains(self) -> set[str]:
    return set(self._doc_domain)

  def add(self, domain: str, one: _Encoded):
    np.asarray(one.ids, self._dtype).tofile(self._tokens)
    if one.learned is not None:
      if self._learned is None:
        self._learned = (self._directory / f'{self._split}.learned').open('wb')
      one.learned.astype(np.uint8).tofile(self._learned)
    self._lengths.append(len(one.ids))
    self._doc_bytes.append(len(one.text))
    self._doc_domain.append(domain)
    self._doc_chosen.append(one.num_chosen)

  def write_documents(self, domains: Sequence[str]):
    """Writes what is known per document; a document's domain becomes its place in `domains`."""
    index = {label: i for i, label in enumerate(domains)}
    arrays = {
      'offsets': np.concatenate([[0], np.cumsum(self._lengths)]).astype(np.int64),
      'doc_bytes': np.asarray(self._doc_bytes, np.int64),
      'doc_domain': np.asarray([index[label] for label in self._doc_domain], np.int32),
    }
    if any(self._doc_chosen):
      arrays['doc_chosen'] = np.asarray(self._doc_chosen, np.int64)
    for name, array in arrays.items():
      np.save(self._directory / f'{self._split}.{name}.npy', array)


def _is_whole(directory: pathlib.Path) -> bool:
  """Whether every file of a cached corpus holds what was written; says so if one does not."""
  if not directory.exists():
    return False
  try:
    meta = json.loads((directory / 'meta.json').read_text())
    if 'sizes' in meta:  # written before files had digests
      return False
    digest = meta.pop('own_digest')
    wrong = [] if digest == hashing.hexdigest(json.dumps(meta)) else ['meta.json']
    wrong += [n for n, d in meta['digests'].items() if _file_digest(directory / n) != d]
    problem = f'{wrong[0]} is not what was written' if wrong else ''
  except (OSError, ValueError, KeyError, AttributeError, TypeError) as e:
    problem = f'{type(e).__name__}: {e}'
  if problem:
    logging.warning('The cached text in %s is damaged (%s); tokenising anew', directory, problem)
  return not problem


def _file_digest(path: pathlib.Path) -> str:
  """Hash of a file's content."""
  with path.open('rb') as file:
    return hashlib.file_digest(file, hashlib.blake2b).hexdigest()[:32]


def _open(directory: pathlib.Path, split: str) -> TokenSplit:
  """Maps one split's tokens into memory; the small per-document arrays are read."""
  meta = json.loads((directory / 'meta.json').read_text())
  arrays: dict[str, Any] = {
    name: np.load(directory / f'{split}.{name}.npy')
    for name in ('offsets', 'doc_bytes', 'doc_domain')
  }
  tokens = np.memmap(directory / f'{split}.tokens', np.dtype(meta['dtype']), mode='r')
  learned = directory / f'{split}.learned'
  if learned.exists():
    arrays['learned'] = np.memmap(learned, np.uint8, mode='r')
  chosen = directory / f'{split}.doc_chosen.npy'
  if chosen.exists():
    arrays['doc_chosen'] = np.load(chosen)
  return TokenSplit(tokens=tokens, **arrays)


def _label(splits: Sequence[TokenSplit]) -> list[TokenSplit]:
  """Gives every document of the i-th split the domain i."""
  return [
    dataclasses.replace(split, doc_domain=np.full_like(split.doc_domain, i))
    for i, split in enumerate(splits)
  ]


def _concatenate(splits: Sequence[TokenSplit]) -> TokenSplit:
  if len(splits) == 1:
    return splits[0]
  starts = np.cumsum([0] + [split.num_tokens for split in splits[:-1]])
  # Of all splits or of none.
  learned = [split.learned for split in splits if split.learned is not None]
  chosen = [split.doc_chosen for split in splits if split.doc_chosen is not None]
  offsets = [split.offsets[:-1] + start for split, start in zip(splits, starts)]
  total = sum(split.num_tokens for split in splits)
  return TokenSplit(
    tokens=np.concatenate([split.tokens for split in splits]),
    offsets=np.concatenate([*offsets, [total]]),
    doc_bytes=np.concatenate([split.doc_bytes for split in splits]),
    doc_domain=np.concatenate([split.doc_domain for split in splits]),
    learned=np.concatenate(learned) if learned else None,
    doc_chosen=np.concatenate(chosen) if chosen else None,
  )
