"""Where a long text may be cut so that the ids of its pieces are those of the whole.

A tokenizer splits a text into words before anything else, and most split between a letter and the
white space behind it whatever stands around. What a tokenizer.json says about its splits decides
whether that is sure; where it is not, a text is encoded whole.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

# Longer texts are encoded in pieces of about so many characters: each takes 150 bytes of memory
# while it is encoded.
PIECE_CHARACTERS = 250_000
_ANY_LETTER = re.compile(r'[^\W_](?=[ \n])')  # or digit
_LATIN_LETTER = re.compile(r'[A-Za-z](?=[ \n])')
_RUN = re.compile(r'(?:\\s\?)?(\[[^\\\]]+\]|\\p\{(?:L|N|P)\})(\+|\{1,3\}|)')
# Of DeepSeek-V3: letters with at most one other character before them, no white space behind.
_WORDS_V3 = (
  r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
  r""" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)


def places(tokenizer: Mapping[str, Any]) -> re.Pattern[str] | None:
  """What matches a character behind which a text may be cut; None if there may be no such place.

  The steps before the first that splits behind a word must not look beyond white space, and that
  one must split behind every letter before it. No step comes before them: nothing normalises the
  text, and no added token that is searched for in it reaches over such a place.

  Args:
    tokenizer: a parsed tokenizer.json.
  """
  normalizer = tokenizer['normalizer'] or {'type': 'Sequence', 'normalizers': []}
  plain = normalizer['type'] == 'Sequence' and not normalizer['normalizers']
  model = tokenizer['model']
  if not plain or model.get('type') != 'BPE' or any(map(_reaches_over, tokenizer['added_tokens'])):
    return None
  splits = tokenizer['pre_tokenizer'] or {'pretokenizers': []}
  steps = splits.get('pretokenizers', [splits])
  if steps and all(step['type'] in ('Digits', 'ByteLevel') for step in steps):
    last = steps[-1]  # `ByteLevel` splits text by the pattern of GPT-2
    byte_level = last['type'] == 'ByteLevel' and not last['add_prefix_space']
    regular = byte_level and (last['use_regex'] or not model.get('merges'))
    return _ANY_LETTER if regular and all(s['type'] == 'Digits' for s in steps[:-1]) else None
  for step in steps:
    kind = _kind(step)
    if kind != 'local':
      return _LATIN_LETTER if kind == 'words' else None
  return None


def _kind(step: Mapping[str, Any]) -> str:
  """'words': it splits behind every word; 'local': it may, and sees no further; '': unknown."""
  if step['type'] == 'Digits':
    return 'local'
  if step['type'] == 'ByteLevel' and not step['add_prefix_space']:
    return 'words' if step['use_regex'] else 'local'
  pattern = step.get('pattern', {}).get('Regex', '')
  isolated = step['type'] == 'Split' and step.get('behavior') == 'Isolated' and not step['invert']
  if not isolated:
    return ''
  if pattern.replace('\r', r'\r').replace('\n', r'\n') == _WORDS_V3:
    return 'words'
  if pattern == r'\s+$':  # a letter ends the left piece
    return 'local'
  run = _RUN.fullmatch(pattern)
  if run is None or run[1].startswith('[^'):
    return ''
  if run[1].startswith(r'\p'):
    return 'words' if run[1] == r'\p{L}' and run[2] == '+' else 'local'
  members = re.compile(run[1])
  if members.match(' ') or members.match('\n'):
    return '' if run[2] else 'local'  # single characters
  letters = all(map(members.match, 'abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ'))
  return 'words' if letters and run[2] == '+' else 'local'


def _reaches_over(token: Mapping[str, Any]) -> bool:
  """Whether an added token may stand on both sides of a cut; special ones are not searched for."""
  if token['special']:
    return False
  flags = any(token.get(name) for name in ('lstrip', 'rstrip', 'single_word'))
  return flags or _ANY_LETTER.search(token['content']) is not None


def cut(text: str, at: re.Pattern[str]) -> Iterator[str]:
  """Pieces of a text of about PIECE_CHARACTERS, cut behind characters that `at` matches."""
  begin = 0
  while len(text) - begin > PIECE_CHARACTERS:
    found = at.search(text, begin + PIECE_CHARACTERS)
    if found is None:
      break
    yield text[begin : found.end()]
    begin = found.end()
  yield text[begin:]
