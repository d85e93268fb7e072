"""Exported tokenizers, read with the library `tokenizers` alone (and transformers, if here)."""

import dataclasses
import json

import pytest
import tokenizers
from tokenizers import decoders, models

from moe_jax.data import tokenizer as tokenizer_lib
from moe_jax.interop import exported_tokenizer
from tests import tiny

DATA = tiny.make().data
SPECIAL = (DATA.bos_token, DATA.eos_token, *tokenizer_lib.FIM_TOKENS)
TEXTS = ['', 'a b', 'def f(x):\n  return 12 + x\n', 'naïve 漢字 🙂', *SPECIAL]
TEXTS += [f'x{a}y {b}{a}' for a in SPECIAL for b in SPECIAL]


def trained():
  texts = ['the cat sat on the mat\n' * 20, 'def f(x): return x\n' * 20]
  return tokenizer_lib.train_bpe(texts, 300, DATA.bos_token, DATA.eos_token)


def added():
  """A tokenizer of others: the special tokens stand outside of the model's vocabulary."""
  inner = tokenizers.Tokenizer.from_str(trained().to_json())
  content = json.loads(inner.to_str())
  num = len(content['added_tokens'])
  vocab = {token: i - num for token, i in content['model']['vocab'].items() if i >= num}
  content['model']['vocab'] = vocab
  for i, token in enumerate(content['added_tokens']):
    token['id'] = len(vocab) + i
  inner = tokenizers.Tokenizer.from_str(json.dumps(content))
  return tokenizer_lib.Tokenizer(inner, DATA.bos_token, DATA.eos_token)


def unigram():
  """A model whose vocabulary is a list, which cannot take a token without a score."""
  letters = [chr(i) for i in range(32, 127)] + list('\nï漢字🙂｜▁')
  inner = tokenizers.Tokenizer(models.Unigram([('<unk>', -9.0), *((c, -1.0) for c in letters)], 0))
  inner.add_special_tokens(list(SPECIAL))
  inner.decoder = decoders.Fuse()
  return tokenizer_lib.Tokenizer(inner, DATA.bos_token, DATA.eos_token)


MAKERS = {
  'bpe': trained,
  'bytes': lambda: tokenizer_lib.byte_tokenizer(DATA.bos_token, DATA.eos_token),
  'added': added,
  'unigram': unigram,
}


@pytest.fixture(scope='module', params=MAKERS)
def exported(request, tmp_path_factory):
  """(kind, ours, directory of the exported one, lines said)."""
  directory, lines = tmp_path_factory.mktemp('tokenizer'), []
  ours = MAKERS[request.param]()
  exported_tokenizer.write(ours, DATA, 64, directory, lines.append)
  return request.param, ours, directory, lines


def test_texts_get_the_ids_that_training_saw(exported):
  kind, ours, directory, lines = exported
  theirs = tokenizers.Tokenizer.from_file(str(directory / 'tokenizer.json'))
  if kind == 'unigram':
    assert len(lines) == 1 and 'encode_special_tokens' in lines[0]
    theirs.encode_special_tokens = True
  else:
    assert not lines
  for text in TEXTS:
    ids = [ours.bos_id, *ours.encode(text)]
    assert theirs.encode(text).ids == ids, text
    assert theirs.decode(ids[1:]) == text == ours.decode(ids)


def test_our_own_reader_takes_it_back(exported):
  _, ours, directory, _ = exported
  again = tokenizer_lib.load(directory / 'tokenizer.json', DATA.bos_token, DATA.eos_token)
  assert [again.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]
  assert (again.bos_id, again.eos_id, again.fim_ids) == (ours.bos_id, ours.eos_id, ours.fim_ids)


def test_transformers_reads_the_same(exported):
  transformers = pytest.importorskip('transformers')
  _, ours, directory, _ = exported
  theirs = transformers.AutoTokenizer.from_pretrained(directory)
  for text in TEXTS:
    ids = [ours.bos_id, *ours.encode(text)]
    assert theirs(text)['input_ids'] == ids, text
    assert theirs.decode(ids, skip_special_tokens=True) == text
  assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)


def test_the_template_that_a_run_was_tuned_with_comes_along(tmp_path):
  data = dataclasses.replace(DATA, chat_template='{{ messages }}')
  for name in ('deepseek_llm', 'template'):
    chosen = dataclasses.replace(data, chat_format=name)
    exported_tokenizer.write(MAKERS['bytes'](), chosen, 64, tmp_path, print)
    settings = json.loads((tmp_path / 'tokenizer_config.json').read_text())
    assert settings.get('chat_template') == ('{{ messages }}' if name == 'template' else None)
