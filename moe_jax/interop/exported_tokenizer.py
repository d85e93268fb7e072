"""The tokenizer files of a model that was trained here, for other people's libraries.

Training reads a document as the begin token and the ids of its text, in which the spelling of a
special token is ordinary text. The exported tokenizer.json does the same in `tokenizers` by itself:
its post-processor puts the begin token in front, and special tokens are entries of the vocabulary
alone, not "added tokens", which every reader cuts out of a text first. In transformers
tokenizer_config.json names them again, so that decoding can leave them out, with
`split_special_tokens`.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import tokenizers

from moe_jax.config import schema
from moe_jax.data import tokenizer as tokenizer_lib

_PROBE = 'Is 1 < 2?\n  {}x{} yes {}\n'


def write(
  tokenizer: tokenizer_lib.Tokenizer,
  data: schema.DataConfig,
  max_seq_len: int,
  directory: pathlib.Path,
  say: Callable[[str], object],
):
  """Writes tokenizer.json and tokenizer_config.json.

  Args:
    tokenizer: of the run.
    data: of the run; names begin and end token, and may have a chat template.
    max_seq_len: of the model.
    directory: where.
    say: is told if special tokens must stay added tokens.
  """
  content = json.loads(tokenizer.to_json())
  special = {item['content']: item['id'] for item in content['added_tokens'] if item['special']}
  content['post_processor'] = _begin_token_first(data.bos_token, tokenizer.bos_id)
  bare = content | {'added_tokens': [t for t in content['added_tokens'] if not t['special']]}
  vocab = content['model'].get('vocab')
  if isinstance(vocab, dict):
    bare['model'] = content['model'] | {'vocab': special | vocab}
  if reads_as_trained(json.dumps(bare), tokenizer, special):
    content = bare
  else:
    say(
      'tokenizer.json: the vocabulary lacks the special tokens, so they stay added tokens; to read '
      'their spelling in a text as training did, set encode_special_tokens=True in tokenizers '
      '(transformers does so by tokenizer_config.json)'
    )
  _write(directory / 'tokenizer.json', content)
  own = (data.bos_token, data.eos_token)
  settings = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'bos_token': data.bos_token,
    'eos_token': data.eos_token,
    'additional_special_tokens': [token for token in special if token not in own],
    'split_special_tokens': True,
    'clean_up_tokenization_spaces': False,
    'model_max_length': max_seq_len,
  }
  if data.chat_format == 'template':
    settings['chat_template'] = data.chat_template
  _write(directory / 'tokenizer_config.json', settings)


def reads_as_trained(
  text: str, tokenizer: tokenizer_lib.Tokenizer, special: dict[str, int]
) -> bool:
  """Whether a tokenizer.json has special tokens, and the ids of training for their spelling."""
  try:
    exported = tokenizers.Tokenizer.from_str(text)
  except Exception:  # what `tokenizers` raises where a token is nowhere
    return False
  if any(exported.token_to_id(token) != number for token, number in special.items()):
    return False
  probes = [_PROBE.format(token, token, token) for token in special]
  return all(
    exported.encode(probe).ids == [tokenizer.bos_id, *tokenizer.encode(probe)] for probe in probes
  )


def _begin_token_first(token: str, token_id: int) -> dict[str, Any]:
  """A post-processor that puts a token in front of a text, or of the first of two."""
  first = {'SpecialToken': {'id': token, 'type_id': 0}}
  texts = [{'Sequence': {'id': name, 'type_id': i}} for i, name in enumerate('AB')]
  return {
    'type': 'TemplateProcessing',
    'single': [first, texts[0]],
    'pair': [first, *texts],
    'special_tokens': {token: {'id': token, 'ids': [token_id], 'tokens': [token]}},
  }


def _write(path: pathlib.Path, content: dict[str, Any]):
  path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
