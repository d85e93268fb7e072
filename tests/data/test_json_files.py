import pytest

from moe_jax import errors
from moe_jax.data import json_files


def test_what_is_no_json_is_a_value_error():
  assert json_files.parse(b'{"a": [1, "\xc3\xa9"]}') == {'a': [1, '\u00e9']}
  deep = 100_000
  for text in (b'[' * deep + b']' * deep, b'{"a":' * deep, b'1' * 10_000, b'\xff', '', '{"a"'):
    with pytest.raises(ValueError):
      json_files.parse(text)


def test_a_file_is_an_object_of_bounded_size(tmp_path, monkeypatch):
  path = tmp_path / 'a.json'
  path.write_text('{"a": 1}')
  assert json_files.read_object(path, 'mend it') == {'a': 1}
  monkeypatch.setattr(json_files, 'LARGEST', 4)
  with pytest.raises(errors.InputError, match='more than 4 bytes.*mend it'):
    json_files.read_object(path, 'mend it')
  path.write_text('[1]')
  with pytest.raises(errors.InputError, match='not an object'):
    json_files.read_object(path, 'mend it')


def test_lines_end_with_line_feeds_alone_and_begin_behind_a_byte_order_mark(tmp_path):
  path = tmp_path / 'lines.txt'
  path.write_bytes('\ufeffa\u2028b\r\n"c\x0cd"\n\n'.encode())
  assert json_files.lines(path) == ['a\u2028b', '"c\x0cd"', '', '']
  path.write_bytes(b'\xff')
  with pytest.raises(ValueError):
    json_files.lines(path)
