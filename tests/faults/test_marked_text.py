"""Byte order marks, UTF-16 and JSON that is nested too deep."""

import codecs

import pytest

from moe_jax import errors
from moe_jax.data import sources
from tests import tiny


def read(source, path):
  data = tiny.make(data__source=source, data__path=str(path)).data
  return [d.text for d in sources.read(sources.specs(data)[''])]


def test_a_byte_order_mark_is_no_text(tmp_path):
  (tmp_path / 'a.txt').write_bytes(codecs.BOM_UTF8 + 'é'.encode())
  (tmp_path / 'a.jsonl').write_bytes(codecs.BOM_UTF8 + b'{"text": "one"}\n{"text": "two"}\n')
  assert read('text', tmp_path / 'a.txt') == ['é'.encode()]
  assert read('jsonl', tmp_path / 'a.jsonl') == [b'one', b'two']


@pytest.mark.parametrize('codec', ['utf-16-le', 'utf-16-be'])
def test_utf_16_is_refused_by_name(tmp_path, codec):
  (tmp_path / 'a.txt').write_bytes('\ufeffhello'.encode(codec))
  with pytest.raises(errors.InputError, match=r'UTF-16 .*iconv'):
    read('text', tmp_path / 'a.txt')


def test_deep_nesting_is_a_bad_line(tmp_path):
  (tmp_path / 'a.jsonl').write_text('{"text": ' + '[' * 100_000 + ']' * 100_000 + '}\n')
  with pytest.raises(errors.InputError, match=r'a\.jsonl:1 must be a JSON object on one line'):
    read('jsonl', tmp_path / 'a.jsonl')
