import pytest

from moe_jax.post_training import token_ends


def text_of(ids):
  return bytes(ids).decode(errors='replace')


def byte_by_byte(ids):
  """As decoders with byte fallback: each byte of an unfinished character is a U+FFFD."""
  try:
    return bytes(ids).decode()
  except UnicodeDecodeError as e:
    return bytes(ids[: e.start]).decode() + '\ufffd' * (len(ids) - e.start)


@pytest.mark.parametrize('decode', [text_of, byte_by_byte])
def test_a_character_is_reached_with_its_last_byte(decode):
  text = 'a一𝄞b。'
  ids = list(text.encode())
  found = [
    token_ends.reaching(lambda n: decode(ids[:n]), len(ids), text[:size]) for size in range(1, 6)
  ]
  assert found == [1, 4, 8, 9, 12]


def test_what_no_beginning_reaches_is_at_the_end():
  assert token_ends.reaching(lambda n: 'abc'[:n], 3, 'abx') == 3
  assert token_ends.reaching(lambda n: 'abc'[:n], 3, '') == 1
