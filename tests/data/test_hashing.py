from moe_jax.data import hashing


def test_values_are_the_same_on_every_machine():
  # Written down once: a change would move documents between the splits of existing runs.
  assert hashing.hexdigest('a', 1, b'\x00') == '9966dfaf53e0ae35302d1d5b0790725f'
  assert hashing.integer('heldout', 'os.py') == 12614211520546106884


def test_parts_are_framed():
  assert hashing.hexdigest('ab', 'c') != hashing.hexdigest('a', 'bc')
  assert hashing.hexdigest('ab') != hashing.hexdigest('ab', '')


def test_text_and_bytes_hash_alike_and_names_need_not_be_utf8():
  assert hashing.hexdigest('é') == hashing.hexdigest('é'.encode())
  assert hashing.hexdigest('a\udcff') == hashing.hexdigest(b'a\xff')


def test_uniform_fills_the_unit_interval_evenly():
  values = [hashing.uniform('x', i) for i in range(4000)]
  assert min(values) >= 0 and max(values) < 1
  # The mean of 4000 uniforms has standard deviation 0.0046.
  assert abs(sum(values) / len(values) - 0.5) < 0.02
