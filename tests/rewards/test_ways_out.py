import pytest

from moe_jax.rewards import ways_out


@pytest.mark.parametrize('error', [OSError, MemoryError, PermissionError])
def test_an_attempt_that_is_refused_is_no_way_out(monkeypatch, error):
  def refused():
    raise error

  attempts = [refused, lambda: 1, lambda: []]
  monkeypatch.setattr(ways_out, 'ATTEMPTS', ('a', 'b', 'c'))
  monkeypatch.setattr(ways_out, '_attempts', lambda given: attempts)
  assert ways_out.ways_out({}) == {'a': False, 'b': True, 'c': False}


def test_every_attempt_has_a_name():
  assert len(ways_out._attempts({'file_bytes': 1})) == len(set(ways_out.ATTEMPTS))
