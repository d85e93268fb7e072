import json

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from moe_jax import errors
from moe_jax.data import tokenizer as tokenizer_lib
from moe_jax.data import tokenizer_probe

WHOLE = tokenizer_lib.byte_tokenizer('<s>', '</s>').to_json()


def changed(**parts) -> str:
  return json.dumps(json.loads(WHOLE) | parts)


def without(letter: str) -> str:
  content = json.loads(WHOLE)
  del content['model']['vocab'][letter]
  return json.dumps(content)


def test_what_covers_all_bytes_gives_everything_back():
  assert tokenizer_probe.try_out(WHOLE) == ('', [])


def test_a_small_vocabulary_is_usable_and_what_it_loses_is_named():
  vocab = {'<s>': 0, '</s>': 1} | {chr(97 + i): i + 2 for i in range(26)}
  inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
  inner.pre_tokenizer = pre_tokenizers.Whitespace()
  problem, lost = tokenizer_probe.try_out(inner.to_str())
  assert not problem and {'digits', 'emoji', 'line breaks and indentation'} <= set(lost)


def test_sentencepiece_like_and_lower_casing_tokenizers_are_usable():
  letters = [(c, -1.0) for c in '▁abcdefghijklmnopqrstuvwxyz0123456789']
  inner = tokenizers.Tokenizer(models.Unigram([('<unk>', -9.0), *letters], 0))
  inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
  inner.normalizer = normalizers.Lowercase()
  problem, lost = tokenizer_probe.try_out(inner.to_str())
  assert not problem and 'capital letters' in lost and 'digits' not in lost


@pytest.mark.parametrize(
  'text, message',
  [
    (changed(decoder=None), 'it loses text'),
    (changed(pre_tokenizer=None), 'it loses text'),
    (without('q'), 'it loses text'),
    (changed(normalizer={'type': 'Strip', 'strip_left': True, 'strip_right': True, 'x': 1}), ''),
    (changed(decoder={'type': 'Strip', 'content': 't', 'start': 3, 'stop': 9}), 'Panic|loses'),
    (changed(pre_tokenizer={'type': 'FixedLength', 'length': 0}), 'Panic'),
    ('{}', 'Exception'),
  ],
)
def test_what_loses_text_or_panics_is_told(text, message, capfd):
  problem, _ = tokenizer_probe.try_out(text)
  assert bool(problem) == bool(message)
  if message:
    assert any(word in problem for word in message.split('|')), problem


def test_the_process_bounds_time_and_says_nothing(capfd):
  assert tokenizer_probe.run(WHOLE) == ('', ())
  problem, _ = tokenizer_probe.run(changed(pre_tokenizer={'type': 'FixedLength', 'length': 0}))
  assert 'Panic' in problem and capfd.readouterr() == ('', '')
  problem, _ = tokenizer_probe.run(WHOLE + ' ', seconds=0.001)
  assert 'after 0.001 s' in problem


def test_load_refuses_in_one_line(tmp_path):
  path = tmp_path / 'tokenizer.json'
  content = json.loads(WHOLE)
  content['model']['dropout'] = 0.1
  for text, message in (
    (without('q'), 'is not usable: it loses text'),
    (json.dumps(content), 'model.dropout=0.1'),
    ('[' * 100_000, 'nested too deeply'),
    ('[1]', 'no section "model"'),
  ):
    path.write_text(text)
    with pytest.raises(errors.InputError, match=message) as found:
      tokenizer_lib.load(path, '<s>', '</s>')
    assert '\n' not in str(found.value)
