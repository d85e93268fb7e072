"""Messages come back, and how sure they are is neither more nor less than chance allows."""

import dataclasses
import functools
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from moe_jax import errors
from moe_jax.watermark import decode, partition
from tests import tiny
from tests.watermark import writing

V = writing.V
VANILLA = writing.SCHEMES['vanilla']
FIRST = (np.arange(40) < 10)[:, None]  # the first places of a text: one shape, one program


def look(scheme, ids):
  return decode.look(scheme, writing.known(scheme.kind), ids, V)


@pytest.fixture(scope='module', params=partition.KINDS)
def marked(request):
  """A thousand random messages (200 with a proxy) and their texts, which are read end to end."""
  scheme = writing.SCHEMES[request.param]
  number = 200 if request.param == 'balance' else 1000
  messages = np.random.default_rng(1).integers(2**8, size=number).tolist()
  ids = writing.write(scheme, messages, delta=50.0, length=scheme.num_tokens)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(decode, '_PIECE', 1024)
    hits = look(scheme, ids.ravel())
  places, length = scheme.chunk_tokens, scheme.num_tokens
  parts = [slice(row * length, row * length + places) for row in range(len(messages))]
  return scheme, messages, [decode.Hits(hits.seeds[p], hits.found[p]) for p in parts], ids


def test_a_thousand_messages_come_back(marked):
  scheme, messages, hits, _ = marked
  chunks = [decode.read(scheme, each, 0) for each in hits]
  assert [chunk.value for chunk in chunks] == messages
  # Nothing outweighs delta: every token is available, and no other message has that.
  assert all(chunk.hits == chunk.places == 40 > chunk.runner_up for chunk in chunks)
  assert max(chunk.p_value for chunk in chunks) < 1e-3


def test_wrong_messages_have_about_half_of_the_hits(marked):
  scheme, messages, hits, _ = marked
  counts = [counts_of(scheme, each) for each in hits[:50]]
  wrong = [np.delete(row, message).mean() for row, message in zip(counts, messages)]
  expected = np.mean([each.found.mean() * 40 for each in hits[:50]])
  assert np.mean(wrong) == pytest.approx(expected, abs=0.5)
  assert 20 <= expected < (22 if scheme.kind == 'vanilla' else 28)


@functools.partial(tiny.jit, static_argnums=0)
def divisions_of(scheme, seeds):
  return partition.division_of(scheme, seeds[:, None], jnp.arange(2**8))


def counts_of(scheme, hits):
  """Every message's hits, place by place."""
  divisions = np.asarray(divisions_of(scheme, hits.seeds))
  return hits.found[np.arange(len(divisions))[:, None], divisions].sum(axis=0)


def test_counts_are_those_of_every_message_on_its_own(marked):
  scheme, _, hits, _ = marked
  for text in hits[:5]:
    part = decode.Hits(text.seeds[:10], text.found[:10])  # short: others come close, or are ahead
    counts = counts_of(scheme, decode.Hits(text.seeds, FIRST * text.found))
    found = decode.read(scheme, part, 0)
    assert (found.value, found.hits) == (int(np.argmax(counts)), max(counts))
    assert found.runner_up == sorted(counts)[-2]


def test_another_key_reads_nothing_with_confidence(marked):
  scheme, messages, _, ids = marked
  other = partition.Scheme(**{**vars(scheme), 'key': 6})
  found = [decode.read_all(other, look(other, row))[0] for row in ids[:20]]
  assert min(chunk.p_value for chunk in found) > 0.05 / 20
  assert sum(chunk.value == message for chunk, message in zip(found, messages)) <= 1


def test_text_of_no_message_is_claimed_no_more_often_than_said():
  scheme = partition.Scheme('vanilla', key=3, message_bits=4, chunk_bits=4, window=2)
  rng = np.random.default_rng(0)
  # Texts that repeat themselves, on which a binomial that counts every place would be wrong.
  p_values, naive = [], []
  for _ in range(300):
    words = rng.integers(V, size=6)
    chunk = decode.read_all(scheme, look(scheme, words[rng.integers(6, size=42)]))[0]
    p_values.append(chunk.p_value)
    naive.append(16 * stats.binom.sf(chunk.hits - 1, chunk.places, 0.5))
  for level in (0.01, 0.05, 0.2):
    share = np.mean(np.array(p_values) <= level)
    assert share <= level + 3 * np.sqrt(level / 300)
  assert np.mean(np.array(p_values) <= 0.8) > 0.3  # and no more careful than it has to be
  assert np.mean(np.array(naive) <= 0.05) > 0.2


@pytest.mark.parametrize('message_bits, bits', [(4, (4,)), (12, (4, 8)), (16, (8, 8))])
def test_only_what_a_chunk_can_say_is_searched_and_corrected_for(message_bits, bits):
  scheme = dataclasses.replace(VANILLA, message_bits=message_bits)
  for seed in range(20):  # of text without a mark
    text = np.random.default_rng(seed).integers(V, size=scheme.num_tokens)
    hits = look(scheme, text)
    chunks = decode.read_all(scheme, hits)
    assert scheme.message([chunk.value for chunk in chunks]) < 2**message_bits
    for number, (chunk, own) in enumerate(zip(chunks, bits, strict=True)):
      part = slice(number * scheme.chunk_tokens, (number + 1) * scheme.chunk_tokens)
      counts = counts_of(scheme, decode.Hits(hits.seeds[part], hits.found[part]))[: 2**own]
      assert (chunk.value, chunk.hits) == (int(np.argmax(counts)), max(counts))
      assert chunk.runner_up == sorted(counts)[-2]
      seeds, where = np.unique(hits.seeds[part], return_inverse=True)
      sums = np.zeros((len(seeds), scheme.partitions), int)
      np.add.at(sums, where, hits.found[part])
      assert chunk.p_value == pytest.approx(min(1.0, decode.tail(sums, chunk.hits) * 2**own))


def test_tail_is_a_binomial_where_places_differ_and_half_is_hit():
  sums = np.tile([0, 1], (40, 50))
  for count in (0, 20, 33, 40):
    want = stats.binom.sf(count - 1, 40, 0.5)
    assert decode.tail(sums, count) == pytest.approx(want, rel=1e-9)
  assert decode.tail(sums, 41) == 0


def test_tail_by_enumeration():
  sums = np.array([[0, 1, 3], [2, 2, 2], [0, 0, 1]])
  totals = [sum(choice) for choice in itertools.product(*sums)]
  for count in range(8):
    assert decode.tail(sums, count) == pytest.approx(np.mean(np.array(totals) >= count))


def test_messages_inside_another_text_are_found_with_their_places(marked):
  scheme, messages, _, ids = marked
  host = np.random.default_rng(2).integers(V, size=300).tolist()
  text = [*host[:100], *ids[0], *host[100:140], *ids[1], *host[140:]]
  found = decode.scan(scheme, look(scheme, text), stride=4)
  assert [one.message for one in found] == messages[:2]
  length = scheme.num_tokens
  starts = np.array([one.start for one in found])
  assert (abs(starts - [100, 140 + length]) <= 2).all()
  assert decode.scan(scheme, look(scheme, host)) == []


def test_text_shorter_than_a_chunk_and_ids_of_another_vocabulary():
  for length, words in ((5, 'has 5 tokens'), (42, 'has 42 tokens, but a chunk of 8 bits')):
    with pytest.raises(errors.InputError, match=f'{words}.* takes 3 \\+ 40; give a longer text'):
      decode.read_all(VANILLA, look(VANILLA, [1] * length))
  with pytest.raises(errors.InputError, match='fewer tokens than a message of 8 bits, 43'):
    decode.scan(VANILLA, look(VANILLA, [1] * 42))
  assert len(decode.read_all(VANILLA, look(VANILLA, [1] * 43))) == 1
  with pytest.raises(errors.InputError, match='outside of the vocabulary of 32'):
    look(VANILLA, [32])
  with pytest.raises(errors.InputError, match='needs a proxy: give --proxy'):
    decode.look(writing.SCHEMES['balance'], None, [1], V)


def test_a_text_of_one_token_over_and_over_says_nothing():
  (chunk,) = decode.read_all(VANILLA, look(VANILLA, [4] * 43))
  assert chunk.p_value == 1 and chunk.confidence == 0
