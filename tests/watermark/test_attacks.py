import numpy as np
import pytest

from moe_jax import errors
from moe_jax.watermark import attacks

IDS = [5, 6, 7, 8, 9, 0, 1, 2, 3, 4]


def rng():
  return np.random.default_rng(0)


def test_substitutes_are_likely_enough_and_as_many_as_asked_for():
  logits = np.full((10, 12), -5.0)
  logits[np.arange(10), IDS] = 0.0
  logits[:, 10] = -0.9  # within the threshold, and 11 is not
  logits[:, 11] = -1.1
  found = attacks.substitute(IDS, logits, 0.3, rng())
  changed = [a for a, b in zip(found.ids, IDS) if a != b]
  assert found.replaced == 3 and changed == [10] * 3
  assert attacks.substitute(IDS, logits, 0.3, rng()) == found
  assert attacks.substitute(IDS, logits, 0.0, rng()) == (IDS, 0)
  # Three places in a row are tried for one that is wanted.
  logits[:, 10] = -2.0
  assert attacks.substitute(IDS, logits, 1.0, rng()) == (IDS, 0)
  logits[4, 10] = 0.0
  assert attacks.substitute(IDS, logits, 1.0, rng()).replaced == 1


def test_pasted_text_is_whole_and_a_cut_one_is_a_piece():
  host = list(range(20, 26))
  found = attacks.paste(IDS, host, rng())
  at = found.index(5)
  assert found[at : at + 10] == IDS and found[:at] + found[at + 10 :] == host
  places = {attacks.paste(IDS, host, np.random.default_rng(n)).index(5) for n in range(60)}
  assert places == set(range(7))
  for share, length in ((0.0, 10), (0.3, 7), (1.0, 0)):
    piece = attacks.cut(IDS, share, rng())
    first = IDS.index(piece[0]) if piece else 0
    assert len(piece) == length and piece == IDS[first : first + length]


def test_encoded_again():
  # Two letters that are one piece come back as that piece.
  text = {1: 'a', 2: 'b', 3: 'ab'}
  found = attacks.encode_again(
    [1, 2, 3], lambda ids: ''.join(text[i] for i in ids), lambda t: [3] * (len(t) // 2)
  )
  assert found == [3, 3]


@pytest.mark.parametrize('share', [-0.1, 1.1])
def test_shares_out_of_range(share):
  with pytest.raises(errors.InputError, match='--share=.* must be between 0 and 1'):
    attacks.cut(IDS, share, rng())
  with pytest.raises(errors.InputError, match='--share='):
    attacks.substitute(IDS, np.zeros((10, 12)), share, rng())
