import pytest

from moe_jax.planning import (
  chips,
  roofline,
)
from moe_jax.planning.hlo import collectives


def one(kind: str, axes: tuple[str, ...], size: float) -> collectives.Collective:
  return collectives.Collective(kind, axes, size, 1, '')


@pytest.mark.parametrize(
  'topology, extents, collective, wanted',
  [
    # A ring of 8 chips: 2 links of 100 GB/s.
    ('v5p:8x8x8', {'fsdp': {'0': 8}}, one('all-gather', ('fsdp',), 2e11), 1.0),
    # Two rings: 4 links.
    ('v5p:8x8x8', {'fsdp': {'0': 8, '1': 8}}, one('all-gather', ('fsdp',), 4e11), 1.0),
    # Half of a ring is a line: 1 link.
    ('v5p:8x8x8', {'fsdp': {'0': 4}}, one('all-gather', ('fsdp',), 1e11), 1.0),
    # v5e closes its rings at 16 only; links of 50 GB/s.
    ('v5e:8x8', {'fsdp': {'0': 8}}, one('all-gather', ('fsdp',), 5e10), 1.0),
    ('v5e:16x16', {'fsdp': {'0': 16}}, one('all-gather', ('fsdp',), 1e11), 1.0),
    # 7/8 of 800 GB leave a device; each crosses 8 / 4 of 2 links on average.
    ('v5p:8x8x8', {'fsdp': {'0': 8}}, one('all-to-all', ('fsdp',), 7e11), 8.0),
  ],
)
def test_links(topology, extents, collective, wanted):
  line = roofline.roofline(chips.parse(topology), 0, 0, [collective], {'fsdp': 8}, extents)
  assert line.seconds['ici'] == pytest.approx(wanted)
  assert line.bound_by == 'ici'


def test_collectives_that_share_a_dimension_add_up_and_others_do_not():
  topology = chips.parse('v5p:8x8x8')
  extents = {'data': {'0': 8}, 'fsdp': {'1': 8}, 'expert': {'1': 8}}
  mesh = {'data': 8, 'fsdp': 8, 'expert': 8}
  several = [one('all-gather', (axis,), 2e11) for axis in ('data', 'fsdp', 'expert')]
  line = roofline.roofline(topology, 0, 0, several, mesh, extents)
  assert line.seconds['ici'] == pytest.approx(2.0)
  assert line.by_axes == pytest.approx({'data': 1.0, 'expert': 1.0, 'fsdp': 1.0})


def test_the_slow_network_is_its_own_resource():
  mesh = {'dcn_data': 2, 'fsdp': 8}
  several = [one('all-reduce', ('dcn_data',), 6.25e9)]
  line = roofline.roofline(chips.parse('v5p:2x2x2*2'), 0, 0, several, mesh, {})
  assert line.seconds['dcn'] == pytest.approx(1.0) and not line.seconds['ici']


def test_gpus_share_what_crosses_between_nodes():
  topology, mesh = chips.parse('h100:16'), {'fsdp': 16}
  # 15/16 of 16 GB travel; half of the result comes from the other node, over 8 cards' networks.
  line = roofline.roofline(topology, 0, 0, [one('all-gather', ('fsdp',), 15e9)], mesh, {})
  assert line.seconds['nvlink'] == pytest.approx(15e9 / 450e9)
  assert line.seconds['dcn'] == pytest.approx(8e9 / 8 / 50e9)
  swap = roofline.roofline(topology, 0, 0, [one('all-to-all', ('fsdp',), 15e9)], mesh, {})
  assert swap.seconds['dcn'] == pytest.approx(8e9 / 50e9)
