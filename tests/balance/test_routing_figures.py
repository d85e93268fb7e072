import math

import jax
import numpy as np
import pytest

from configs import base
from moe_jax import errors
from moe_jax.balance import balance_losses, loss_scopes, router_stats, routing_figures
from moe_jax.config import parse


def settings(**moe):
  page = base.get_config()
  page.model.update({'num_layers': 2, 'num_dense_layers': 0})
  page.model.moe.update({'num_experts': 4, 'num_experts_per_tok': 2, 'num_virtual_devices': 2})
  page.model.moe.update(moe)
  return parse.from_dict(page.to_dict()).model.moe


def stats(**replaced) -> router_stats.RouterStats:
  """Two layers of 8 tokens, 4 experts, 2 choices and 2 devices, by hand."""
  sums = router_stats.Sums(
    num_tokens=np.array([8, 8], np.int32),
    load=np.array([[7, 3, 1, 5], [8, 8, 0, 0]], np.int32),
    first_load=np.array([[5, 1, 1, 1], [8, 0, 0, 0]], np.int32),
    sent=np.array([[7, 5], [8, 0]], np.int32),
    score=np.full((2, 4), 2.0, np.float32),
    prob=np.full((2, 4), 2.0, np.float32),
    entropy=np.array([4.0, 10.0], np.float32),
    squared_log_z=np.zeros(2, np.float32),
  )
  fields = {
    'sums': sums,
    'dropped': np.array([[2, 0, 0, 1], [0, 0, 0, 0]], np.int32),
    'tokens_sent': np.array([[[3, 2], [1, 4]], [[4, 0], [4, 0]]], np.int32),
    'margin': np.array([0.8, 2.0], np.float32),
    'losses': {name: np.array([8.0, 4.0], np.float32) for name in balance_losses.LOSSES},
    'attention': None,
    'overflow': np.zeros(2, np.int32),
  }
  return router_stats.RouterStats(**(fields | replaced))


def figures(moe=None, of=None, bias=None, similarity=None):
  return routing_figures.figures(
    moe or settings(),
    of or stats(),
    embed_dim=10,
    bytes_per_number=2,
    expert_bias=bias,
    similarity=similarity,
  )


def test_figures_by_hand():
  found = figures()
  want = {
    'num_tokens': [8, 8],
    'max_vio': [0.75, 1.0],  # (7 - 4) / 4, (8 - 4) / 4
    # Layer 0: shares 7, 3, 1 and 5 of 16. Layer 1: two equal halves, ln 2 / ln 4.
    'load_entropy': [-sum(n / 16 * math.log(n / 16) for n in (7, 3, 1, 5)) / math.log(4), 0.5],
    # Layer 0: the six pairs differ by 2 + 4 + 6 + 2 + 4 + 2 = 20; 2 x 20 / (2 x 16 x 4) = 0.3125.
    # Layer 1: four pairs differ by 8; 2 x 32 / (2 x 16 x 4) = 0.5.
    'load_gini': [0.3125, 0.5],
    'dead_experts': [0, 2],
    'drop_rate': [3 / 16, 0.0],
    'gate_entropy': [0.5, 1.25],
    'top_k_margin': [0.1, 0.25],
    'bias_norm': [0, 0],
    'bias_mean': [0, 0],
    # Kept (5, 3, 1, 4): 8 on device 0, 5 on device 1, mean 6.5.
    'device_load': [[8, 5], [16, 0]],
    'straggler_factor': [8 / 6.5, 2.0],
    # 2 + 1 tokens travel: 3 / 8 x 10 numbers x 2 bytes, there and back; layer 1: 4 / 8.
    'all_to_all_bytes_per_token': [15.0, 20.0],
    'loss_expert_level': [1.0, 0.5],
  }
  for key, value in want.items():
    np.testing.assert_allclose(found[key], value, rtol=1e-6, err_msg=key)
  np.testing.assert_array_equal(found['load'], stats().sums.load)
  np.testing.assert_array_equal(found['dropped'], stats().dropped)
  np.testing.assert_array_equal(found['tokens_sent'], stats().tokens_sent)
  assert np.isnan(found['expert_similarity']).all()


def test_keys_and_shapes_are_the_contract():
  found = figures()
  assert tuple(sorted(found)) == tuple(sorted(routing_figures.KEYS))
  wide = {'load': (2, 4), 'dropped': (2, 4), 'device_load': (2, 2), 'tokens_sent': (2, 2, 2)}
  counts = {'num_tokens', 'dead_experts', *wide}
  for key, value in found.items():
    assert value.shape == wide.get(key, (2,)), key
    assert value.dtype == (np.int64 if key in counts else np.float64), key
  documented = routing_figures.__doc__
  for key in (*routing_figures.KEYS, *routing_figures.ATTENTION_KEYS):
    name = '| loss_<name> ' if key.startswith('loss_') and 'attention' not in key else f'| {key} '
    assert name in documented, key


def test_bias_is_measured_from_where_it_changes_nothing():
  bias = np.array([[3, 0, 0, 4], [-1, 1, -1, 1]], np.float32)
  found = figures(bias=bias)
  np.testing.assert_allclose(found['bias_norm'], [5, 2])
  np.testing.assert_allclose(found['bias_mean'], [7 / 4, 0])
  multiplicative = settings(expert_bias={'form': 'multiplicative', 'update_rule': 'sign'})
  found = figures(multiplicative, bias=bias + 1)
  np.testing.assert_allclose(found['bias_norm'], [5, 2])
  np.testing.assert_allclose(found['bias_mean'], [7 / 4, 0])


def test_similarity_is_passed_on():
  found = figures(similarity=np.array([0.25, -0.5], np.float32))
  np.testing.assert_array_equal(found['expert_similarity'], [0.25, -0.5])


def test_mixture_of_attention_heads():
  mixture = router_stats.MixtureSums(
    num_tokens=np.array([8, 8], np.int32),
    prob=np.zeros((2, 4), np.float32),
    entropy=np.zeros(2, np.float32),
    active=np.array([20, 32], np.int32),
  )
  losses = stats().losses | {'attention_mutual_information': np.array([-4.0, -8.0], np.float32)}
  found = figures(of=stats(attention=mixture, losses=losses))
  np.testing.assert_allclose(found['attention_active_experts'], [2.5, 4.0])
  np.testing.assert_allclose(found['loss_attention_mutual_information'], [-0.5, -1.0])
  assert set(found) == {*routing_figures.KEYS, *routing_figures.ATTENTION_KEYS}


def test_no_token_reads_as_balanced_and_never_as_nan():
  empty = jax.tree.map(np.zeros_like, stats())
  with np.errstate(all='raise'):
    found = figures(of=empty)
  want = {'load_entropy': 1, 'straggler_factor': 1, 'dead_experts': 4}
  for key, value in found.items():
    if key != 'expert_similarity':
      np.testing.assert_allclose(value, want.get(key, 0), err_msg=key)


def test_a_single_expert_is_balanced():
  one = settings(num_experts=1, num_experts_per_tok=1, num_virtual_devices=1)
  sums = stats().sums._replace(load=np.array([[8], [8]], np.int32))
  of = stats(sums=sums, dropped=np.zeros((2, 1), np.int32), tokens_sent=np.full((2, 1, 1), 8))
  found = figures(one, of)
  np.testing.assert_array_equal(found['load_entropy'], [1, 1])
  np.testing.assert_array_equal(found['load_gini'], [0, 0])
  np.testing.assert_array_equal(found['all_to_all_bytes_per_token'], [0, 0])


def test_gini_of_a_hot_expert_and_order():
  # All load on one of E experts: 1 - 1 / E, whichever it is.
  hot = np.array([[0, 12, 0, 0], [12, 0, 0, 0], [3, 3, 3, 3]])
  np.testing.assert_allclose(routing_figures._gini(hot), [0.75, 0.75, 0])


def test_sums_beyond_32_bits():
  sums = stats().sums._replace(load=np.full((2, 4), 2**30, np.int32))
  found = figures(of=stats(sums=sums))
  np.testing.assert_allclose(found['max_vio'], [0, 0], atol=1e-9)
  assert (found['device_load'] > 2**31 - 10).all()


@pytest.mark.parametrize('masked', [False, True])
def test_figures_of_the_real_books(masked):
  """From routing through `balance`: loads add up to tokens x K, losses are means per token."""
  moe = settings(num_experts=7, num_virtual_devices=4)  # blocks of 2, 2, 2 and 1
  rng = np.random.default_rng(0)
  mask = rng.random((3, 5)) < 0.7 if masked else np.ones((3, 5), bool)
  layers, indices = [], []
  for _ in range(2):
    scores = rng.dirichlet(np.ones(7), size=(3, 5)).astype(np.float32) * mask[..., None]
    idx = np.where(mask[..., None], np.argsort(-scores, axis=-1)[..., :2], 7).astype(np.int32)
    indices.append(idx)
    rows = router_stats.sequence_sums(idx, scores, None, mask, 4)
    sums = router_stats.add_up(rows)
    used = np.asarray(router_stats.by_device(router_stats.chosen(idx, 7), 4, False).any(-1))
    sent = np.stack([used[np.arange(3) % 4 == d].sum(axis=(0, 1)) for d in range(4)])
    losses = loss_scopes.layer_losses(moe, rows, {})
    none = np.zeros(7, np.int32)
    layers.append(
      router_stats.RouterStats(sums, none, sent, np.float32(0), losses, None, np.int32(0))
    )
  found = figures(moe, jax.tree.map(lambda *a: np.stack(a), *layers))
  np.testing.assert_array_equal(found['load'].sum(axis=1), 2 * mask.sum())
  np.testing.assert_array_equal(found['num_tokens'], mask.sum())
  np.testing.assert_array_equal(found['device_load'].sum(axis=1), 2 * mask.sum())
  np.testing.assert_array_equal(found['tokens_sent'].sum(axis=1), [s.sums.sent for s in layers])
  count = np.stack([np.bincount(i.ravel(), minlength=8)[:7] for i in indices])
  np.testing.assert_array_equal(found['load'], count)
  # switch has scope micro_batch: the loss of all tokens at once, per token.
  want = [float(balance_losses.switch(s.sums, moe)) for s in layers]
  np.testing.assert_allclose(found['loss_switch'], want, rtol=1e-5)


def test_stats_of_another_shape_are_refused():
  with pytest.raises(ValueError, match=r'stats.sums.load \(2, 4\).*\[layers, 5\]'):
    figures(settings(num_experts=5))
  with pytest.raises(ValueError, match=r'tokens_sent \(2, 2, 2\)'):
    figures(settings(num_virtual_devices=4))
  with pytest.raises(ValueError, match=r'\(4,\)'):
    figures(of=jax.tree.map(lambda a: a[0], stats()))


def test_summary_is_the_mean_over_layers():
  found = figures()
  summary = routing_figures.summary(found)
  assert summary['load_gini'] == pytest.approx((0.3125 + 0.5) / 2)
  assert summary['expert_similarity'] is None
  assert set(summary) == set(found) - {'load', 'dropped', 'device_load', 'tokens_sent'}
  assert all(type(value) in (float, type(None)) for value in summary.values())


def test_write_and_read(tmp_path):
  found = figures()
  path = tmp_path / 'routing/100.npz'
  routing_figures.write(path, figures(bias=np.ones((2, 4))))
  routing_figures.write(path, found)
  assert [p.name for p in path.parent.iterdir()] == ['100.npz']
  again = routing_figures.read(path)
  assert set(again) == set(found)
  for key, value in found.items():
    np.testing.assert_array_equal(again[key], value, strict=True)


def test_history_is_sorted_by_number_and_sees_steps_only(tmp_path):
  assert routing_figures.read_history(tmp_path / 'none') == []
  for step in (100, 9, 10):
    routing_figures.write(tmp_path / f'{step}.npz', {'max_vio': np.full(2, float(step))})
  routing_figures.write(tmp_path / 'heldout.npz', {'max_vio': np.zeros(2)})
  (tmp_path / '.11.npz.123.tmp').write_bytes(b'torn')
  history = routing_figures.read_history(tmp_path)
  assert [(step, figures['max_vio'][0]) for step, figures in history] == [
    (9, 9),
    (10, 10),
    (100, 100),
  ]


def test_damaged_files_are_named(tmp_path):
  path = tmp_path / '7.npz'
  routing_figures.write(path, {'load': np.arange(6).reshape(2, 3)})
  whole = path.read_bytes()
  torn = [whole[:n] for n in range(0, len(whole), 7)]
  # A wrong bit anywhere: what still reads must read as it was.
  flipped = [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in range(0, len(whole), 3)]
  refused = 0
  for data in [*torn, *flipped]:
    path.write_bytes(data)
    try:
      found = routing_figures.read_history(tmp_path)[0][1]
      np.testing.assert_array_equal(found['load'], np.arange(6).reshape(2, 3))
    except errors.InputError as e:
      assert '7.npz' in str(e) and 'delete it' in str(e)
      refused += 1
  assert refused > len(torn) + len(flipped) // 3


def test_missing_file_and_a_plain_array(tmp_path):
  with pytest.raises(errors.InputError, match='1.npz'):
    routing_figures.read(tmp_path / '1.npz')
  np.save(tmp_path / '2.npy', np.zeros(3))
  with pytest.raises(errors.InputError, match='not a zip file'):
    routing_figures.read(tmp_path / '2.npy')
