import itertools
import math
import time

import jax
import numpy as np
import pytest

from configs import base
from moe_jax import errors
from moe_jax.balance import router_stats
from moe_jax.config import parse
from moe_jax.planning import virtual_devices

# Four experts on two devices, two rows of three tokens; 4 is no expert.
IDX = np.array([[[[0, 1], [0, 2], [4, 4]], [[2, 3], [1, 3], [3, 0]]]])


def settings(e, k, d, groups=1, limit=1, **moe):
  page = base.get_config()
  sizes = {'num_experts': e, 'num_experts_per_tok': k, 'num_virtual_devices': d}
  limits = {'num_expert_groups': groups, 'num_limited_groups': limit}
  page.model.moe.update(sizes | limits | moe)
  return parse.from_dict(page.to_dict()).model.moe


def report(idx=IDX, e=4, d=2, factor=1.0, **kwargs):
  sizes = {'capacity_factor': factor, 'embed_dim': 10, 'bytes_per_number': 2}
  return virtual_devices.report(idx, e, d, **sizes, **kwargs)


def test_report_by_hand():
  found = report()
  assert (found.num_devices, found.num_tokens) == (2, 5)
  np.testing.assert_array_equal(found.device_load, [[5, 5]])  # 3 + 2 and 2 + 3
  # Row 0 is at home on device 0: (0, 1) stays, (0, 2) uses both. Row 1: (2, 3) stays, two use both.
  np.testing.assert_array_equal(found.tokens_sent, [[[2, 1], [2, 3]]])
  np.testing.assert_array_equal(found.devices_per_token, [[0, 2, 3]])
  np.testing.assert_allclose(found.mean_devices, [(2 + 2 * 3) / 5])
  # 1 + 2 tokens leave home: 3 / 5 x 10 numbers x 2 bytes, there and back.
  np.testing.assert_allclose(found.all_to_all_bytes_per_token, [24])
  np.testing.assert_array_equal(found.straggler_factor, [1])
  np.testing.assert_array_equal(found.expert_drop_rate, [0])  # ceil(10 / 4) = 3 and no load is more


@pytest.mark.parametrize('limit, share', [(0, 1.0), (1, 0.6), (2, 0.0)])
def test_over_limit(limit, share):
  np.testing.assert_allclose(report().over_limit(limit), [share])


@pytest.mark.parametrize(
  'factor, per_expert, per_device',
  [
    (0.5, 0.2, 0.4),  # rooms ceil(1.25) = 2 of loads 3, 2, 2, 3; ceil(2.5) = 3 of 5, 5
    (0.2, 0.6, 0.8),  # rooms ceil(0.5) = 1 and ceil(1.0) = 1
    (0.8, 0.2, 0.2),  # rooms ceil(2.0) = 2 and ceil(4.0) = 4
    (1.2, 0.0, 0.0),
  ],
)
def test_drop_rates_by_hand(factor, per_expert, per_device):
  found = report(factor=factor)
  np.testing.assert_allclose(found.expert_drop_rate, [per_expert])
  np.testing.assert_allclose(found.device_drop_rate, [per_device])


def test_capacity_rounds_the_decimal_number_up():
  # 100 assignments, one expert: 0.07 x 100 is 7, though the float product is 7.000000000000001.
  found = report(np.zeros((1, 1, 100, 1), int), e=1, d=1, factor=0.07)
  np.testing.assert_allclose(found.expert_drop_rate, [0.93])


def test_home_follows_the_number_of_the_row():
  found = report(rows=np.array([5, 2]))  # devices 1 and 0
  np.testing.assert_array_equal(found.tokens_sent, [[[2, 3], [2, 1]]])


def test_tokens_that_no_expert_takes():
  """With experts that choose, real tokens may go empty; only the mask tells them from padding."""
  idx = np.array([[[[0, 4], [4, 4], [4, 4]]], [[[4, 4], [4, 4], [3, 1]]]])  # 2 layers, 1 row
  found = report(idx)
  assert found.num_tokens == 2
  np.testing.assert_array_equal(found.devices_per_token, [[1, 1, 0], [1, 0, 1]])
  found = report(idx, mask=np.array([[True, True, True]]))
  assert found.num_tokens == 3
  np.testing.assert_array_equal(found.devices_per_token, [[2, 1, 0], [2, 0, 1]])
  np.testing.assert_allclose(found.over_limit(0), [1 / 3, 1 / 3])


@pytest.mark.parametrize('e, k, d', [(7, 3, 4), (6, 2, 6)])
def test_agrees_with_the_books_of_the_model(e, k, d):
  rng = np.random.default_rng(0)
  idx = np.argsort(rng.random((2, 6, 9, e)), axis=-1)[..., :k].astype(np.int32)
  mask = rng.random((6, 9)) < 0.8
  idx = np.where(mask[..., None], idx, e)
  found = report(idx, e, d)
  assert found.num_tokens == mask.sum()
  for layer in range(2):
    scores = np.zeros((6, 9, e), np.float32)
    sums = jax.device_get(
      router_stats.add_up(router_stats.sequence_sums(idx[layer], scores, None, mask, d))
    )
    np.testing.assert_array_equal(found.tokens_sent[layer].sum(axis=0), sums.sent)
    np.testing.assert_array_equal(found.device_load[layer], router_stats.device_load(sums.load, d))
    np.testing.assert_allclose(
      found.straggler_factor[layer], 1 + router_stats.max_vio(found.device_load[layer])
    )
  copies = found.mean_devices * mask.sum()
  np.testing.assert_allclose(found.tokens_sent.sum(axis=(1, 2)), copies, rtol=1e-12)


def test_bad_input_is_refused():
  with pytest.raises(errors.InputError, match='4 virtual devices leave one without.*blocks of 2'):
    report(np.zeros((1, 1, 1, 1), int), e=6, d=4)
  with pytest.raises(errors.InputError, match='no token'):
    report(np.full((1, 1, 2, 2), 4))
  with pytest.raises(ValueError, match='values 0 to 4'):
    report(np.full((1, 1, 2, 2), 5))
  with pytest.raises(ValueError, match='layers, B, L, K'):
    report(IDX[0])


def test_table():
  idx = np.concatenate([IDX, np.array([[[[0, 1], [0, 1], [4, 4]], [[0, 1], [0, 1], [0, 1]]]])])
  lines = str(report(idx, factor=0.5)).splitlines()
  assert lines[0] == '5 tokens on 2 virtual devices, drops at capacity factor 0.5'
  assert lines[1].split('  ')[-2:] == ['expert drops', 'device drops']
  assert '> 1' in lines[1] and '> 2' not in lines[1]
  assert lines[2].split() == ['0', '1.60', '60.0%', '24', '1.000', '20.0%', '40.0%']
  # Layer 1: all on device 0; 3 of 5 tokens travel: 24 bytes; loads 5, 5, 0, 0 and rooms 2 and 3.
  assert lines[3].split() == ['1', '1.00', '0.0%', '24', '2.000', '60.0%', '70.0%']
  assert lines[4].split() == ['mean', '1.30', '30.0%', '24', '1.500', '40.0%', '55.0%']
  assert len({len(line) for line in lines[1:]}) == 1


SETTINGS = [  # E, K, D, G, M
  (6, 2, 3, 1, 1),
  (7, 3, 4, 1, 1),  # devices of 2, 2, 2 and 1 expert
  (8, 2, 4, 4, 2),  # groups are devices
  (8, 3, 2, 4, 2),  # two groups on a device
  (8, 2, 4, 2, 1),  # a group on two devices
  (9, 2, 3, 2, 1),  # groups of 5 and 4 cut through devices of 3
  (7, 3, 2, 4, 3),  # groups of 2, 2, 2 and 1: how many are in reach depends on the choice
  (4, 4, 4, 1, 1),
]


def by_enumeration(e, k, d, groups, limit) -> float:
  """Mean number of devices over all choices of groups and, for each, all choices of experts."""
  group, device = (np.arange(e) // -(-e // n) for n in (groups, d))
  means = []
  for allowed in itertools.combinations(range(groups), limit):
    experts = [i for i in range(e) if group[i] in allowed]
    used = [len({device[i] for i in chosen}) for chosen in itertools.combinations(experts, k)]
    means.append(np.mean(used))
  return float(np.mean(means))


@pytest.mark.parametrize('sizes', SETTINGS)
def test_expected_devices_are_exact(sizes):
  found = virtual_devices.expected_devices_per_token(settings(*sizes))
  assert found == pytest.approx(by_enumeration(*sizes), rel=1e-12)


@pytest.mark.parametrize('sizes', [(63, 7, 8, 1, 1), (60, 6, 6, 6, 3), (63, 6, 7, 9, 4)])
def test_expected_bytes_against_simulated_routing(sizes):
  e, k, d, groups, limit = sizes
  rng = np.random.default_rng(0)
  tokens = (2 * d, 20_000 // d)
  group = np.arange(e) // -(-e // groups)
  rank = np.argsort(np.argsort(rng.random((*tokens, groups))))
  scores = np.where(rank[..., group] < limit, rng.random((*tokens, e)), -1.0)
  idx = np.argsort(-scores, axis=-1)[None, ..., :k]
  found = report(idx, e, d)
  moe = settings(*sizes)
  # 40,000 tokens whose number of devices varies by about 1: a standard error of 0.005 devices.
  devices = virtual_devices.expected_devices_per_token(moe)
  np.testing.assert_allclose(found.mean_devices, devices, atol=0.02)
  expected = virtual_devices.expected_bytes_per_token(moe, embed_dim=10, bytes_per_number=2)
  np.testing.assert_allclose(found.all_to_all_bytes_per_token, expected, rtol=0.01)


def test_expected_bytes_of_deepseek_v2_by_hand():
  # 3 devices of 20 experts, each missed when all 6 come from the other 40; 7 of 8 copies travel.
  devices = 3 * (1 - math.comb(40, 6) / math.comb(60, 6))
  moe = settings(160, 6, 8, 8, 3)
  found = virtual_devices.expected_bytes_per_token(moe, 5120, 2)
  assert found == pytest.approx(devices * 7 / 8 * 2 * 5120 * 2, rel=1e-12)
  unlimited = virtual_devices.expected_bytes_per_token(settings(160, 6, 8), 5120, 2)
  assert unlimited > 1.5 * found


def test_one_device_sends_nothing():
  assert virtual_devices.expected_devices_per_token(settings(8, 2, 1)) == 1
  assert virtual_devices.expected_bytes_per_token(settings(8, 2, 1), 10, 2) == 0


def test_routers_that_do_not_draw_k_experts_per_token():
  dense = settings(8, 2, 4, router='ds_moe')
  assert virtual_devices.expected_bytes_per_token(dense, 10, 2) == 3 * 10 * 2 * 2
  # Every one of 8 experts takes a token with probability 2 / 8; two of them are on a device.
  choice = settings(8, 2, 4, router='expert_choice')
  found = virtual_devices.expected_devices_per_token(choice)
  assert found == pytest.approx(4 * (1 - 0.75**2))
  rng = np.random.default_rng(0)
  taken = np.argsort(rng.random((8, 40_000)), axis=1)[:, :10_000]
  columns = np.full((40_000, 8), 8)
  for expert, tokens in enumerate(taken):
    columns[tokens, expert] = expert
  simulated = report(columns.reshape(1, 4, 10_000, 8), 8, 4, mask=np.ones((4, 10_000), bool))
  np.testing.assert_allclose(simulated.mean_devices, found, atol=0.02)


def test_many_groups_are_counted_not_listed():
  start = time.process_time()
  found = virtual_devices.expected_devices_per_token(settings(160, 3, 8, 160, 80))
  # Choosing 80 of 160 single experts, then 3 of these, is choosing 3 of 160.
  assert found == pytest.approx(virtual_devices.expected_devices_per_token(settings(160, 3, 8)))
  assert time.process_time() - start < 5
