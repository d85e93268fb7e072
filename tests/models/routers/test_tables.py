import functools

import numpy as np
import pytest

from moe_jax import errors
from moe_jax.config import moe_config
from moe_jax.models.routers import tables
from tests import tiny


@functools.cache
def make(e=4, k=1, **overrides) -> moe_config.MoEConfig:
  """A checked `MoEConfig`."""
  values = {'num_experts': e, 'num_experts_per_tok': k} | overrides
  return tiny.make(**{f'model__moe__{key}': v for key, v in values.items()}).model.moe


# Tables.


def table_of(counts, e, k, seed=0):
  return tables.balanced_table(np.asarray(counts), e, k, np.random.default_rng(seed))


def loads(table, counts, e):
  load = np.zeros(e)
  np.add.at(load, table, np.asarray(counts)[:, None])
  return load


def test_balanced_table_by_hand():
  # The most frequent first, to the emptier of experts a and b: 5 to a, 4 to b, 3 to b (7), 2 to a
  # (7), 1 to either: loads 7 and 8.
  counts = [1, 2, 3, 4, 5]
  table = table_of(counts, 2, 1)
  assert table.shape == (5, 1) and table.dtype == np.int32
  assert sorted(loads(table, counts, 2)) == [7, 8]
  assert table[4] == table[1] != table[3] and table[3] == table[2]


@pytest.mark.parametrize('e, k', [(8, 2), (5, 3), (16, 1), (4, 4)])
def test_balanced_table_is_as_balanced_as_it_can_be(e, k):
  counts = np.random.default_rng(1).zipf(1.5, size=300).clip(max=50)
  table = table_of(counts, e, k)
  assert all(len(set(row)) == k for row in table.tolist())
  load = loads(table, counts, e)
  assert load.sum() == k * counts.sum()
  # The fullest expert was the emptiest when it got its last id, and the last ids occur once.
  assert (counts == 1).sum() > 2 * e and load.max() - load.min() <= 1
  random = loads(np.argsort(np.random.default_rng(2).random((300, e)))[:, :k], counts, e)
  assert k == e or random.max() - random.min() > 50


def test_a_dominant_id_is_left_alone_by_the_others():
  counts = [100, 3, 3, 3, 3]
  table = table_of(counts, 3, 1)
  assert (table[1:] != table[0]).all()
  assert sorted(loads(table, counts, 3)) == [6, 6, 100]


def test_ids_that_never_occur_are_spread_too():
  table = table_of([7] + [0] * 40, 4, 1)
  assert np.bincount(table[1:, 0], minlength=4).max() <= 14  # three experts share 40


def test_tables_are_decided_by_the_seed_and_layers_differ():
  counts = np.full(50, 2)
  np.testing.assert_array_equal(table_of(counts, 8, 2), table_of(counts, 8, 2))
  assert (table_of(counts, 8, 2, seed=1) != table_of(counts, 8, 2)).any()


SHAPE = (2, 3, 4, 2)  # layers, rows, L, K


def assignments(path, **arrays):
  if arrays:
    np.savez(path, **arrays)
  cfg = make(4, 2, router='replay', options__replay_path=str(path), options__replay_rows=3)
  return tables.load_assignments(cfg, SHAPE)


def recorded():
  rng = np.random.default_rng(0)
  return np.argsort(rng.random((*SHAPE[:-1], 4)))[..., :2]


def test_recorded_assignments_are_read_back(tmp_path):
  want = recorded()
  want[0, 0, 0] = (4, 4)  # nowhere, twice
  got = assignments(tmp_path / 'a.npz', expert_idx=want)
  np.testing.assert_array_equal(got, want)
  assert got.dtype == np.int32


def spoilt(value):
  array = recorded()
  array[1, 2, 3] = value
  return array


@pytest.mark.parametrize(
  'arrays, message',
  [
    ({'experts': recorded()}, 'array expert_idx'),
    ({'expert_idx': recorded()[:1]}, r'\[1, 3, 4, 2\].*\[layers, rows, L, K\] = \[2, 3, 4, 2\]'),
    ({'expert_idx': spoilt((0, 5))}, 'different experts between 0 and 3, or 4 for none'),
    ({'expert_idx': spoilt((-1, 2))}, 'different experts between 0 and 3'),
    ({'expert_idx': spoilt((2, 2))}, 'different experts'),
    ({'expert_idx': recorded() + 0.5}, 'type float64, but this model needs integers'),
  ],
)
def test_bad_assignments_name_the_field(tmp_path, arrays, message):
  name = r'config\.model\.moe\.options\.replay_path=.*a\.npz.*'
  with pytest.raises(errors.InputError, match=name + message):
    assignments(tmp_path / 'a.npz', **arrays)


@pytest.mark.parametrize('content', [None, b'', b'text', 'array', 'half', 'damaged'])
def test_unreadable_files_name_the_field(tmp_path, content):
  path = tmp_path / 'a.npz'
  if isinstance(content, bytes):
    path.write_bytes(content)
  elif content == 'array':  # a bare array, without names
    np.save(tmp_path / 'a.npy', recorded())
    (tmp_path / 'a.npy').rename(path)
  elif content:
    np.savez(path, expert_idx=recorded())
    whole = bytearray(path.read_bytes())
    whole[300] ^= 1
    path.write_bytes(whole if content == 'damaged' else whole[: len(whole) // 2])
  message = r'config\.model\.moe\.options\.replay_path=.*a\.npz.* must be an \.npz file'
  with pytest.raises(errors.InputError, match=message):
    assignments(path)
