import dataclasses

from configs import deepseek_v2_lite
from moe_jax.config import parse
from moe_jax.planning import (
  chips,
  planner,
  planner_search,
)
from tests.planning import requests


def test_the_search_prefers_what_fits_and_is_fast():
  plans, tried = planner_search.search(dataclasses.replace(requests.request(), estimate=True), 3)
  assert len(plans) == 3 and tried > 20
  assert all(plan.fits for plan in plans)
  bounds = [plan.step_seconds_bound for plan in plans]
  assert bounds[0] <= 1.05 * bounds[-1]


def test_a_larger_machine_grows_as_pods_do():
  def doubled(name):
    request = planner.Request(requests.request().cfg, chips.parse(name))
    grown = planner_search._doubled(request)
    return grown.topology.name, grown.cfg.mesh.dcn_fsdp

  assert doubled('v5e:4x4') == ('v5e:4x8', 1) and doubled('v5e:8x16') == ('v5e:16x16', 1)
  assert doubled('v5e:16x16') == ('v5e:16x16*2', 2)
  assert doubled('v5p:4x4x4') == ('v5p:4x4x8', 1) and doubled('h100:8') == ('h100:16', 1)
  for few in range(1, 9):  # whole nodes, which `chips.parse` takes
    (name, _) = doubled(f'h100:{few}')
    assert name == f'h100:{2 * few if few < 5 else 16 if few == 8 else 8}'
    assert chips.parse(name).num_devices > few


def test_what_does_not_fit_says_what_would():
  large = deepseek_v2_lite.get_config()
  large.train.batch_size = large.train.micro_batch_size = 64
  wanted = planner.Request(parse.from_dict(large.to_dict()), chips.parse('h100:8'))
  plan = planner.plan(wanted)
  assert not plan.fits
  # No single change is enough: 15.7B parameters with their moments are 188 GB, on 8 x 80 GB.
  (way,) = planner_search.suggestions(wanted, plan)
  arguments = dict(part.lstrip('-').split('=', 1) for part in way.partition(' (')[0].split())
  mesh = dict(part.split('=') for part in arguments['mesh'].split(','))
  micro = int(arguments['config.train.micro_batch_size'])
  cfg = dataclasses.replace(
    wanted.cfg,
    mesh=dataclasses.replace(wanted.cfg.mesh, data=1, **{a: int(size) for a, size in mesh.items()}),
    model=dataclasses.replace(wanted.cfg.model, remat=arguments['config.model.remat']),
    train=dataclasses.replace(wanted.cfg.train, micro_batch_size=micro),
  )
  assert planner.plan(dataclasses.replace(wanted, cfg=cfg)).fits
  small = dataclasses.replace(wanted, topology=chips.parse('h100:1'))
  (way,) = planner_search.suggestions(small, plan)
  assert way.startswith('--topology=h100:')


def meshes(name: str, **changes) -> set[tuple[int, ...]]:
  """(dcn_data, dcn_fsdp, sequence) of all candidates."""
  cfg = requests.request(**changes).cfg
  found = planner_search.candidates(cfg, chips.parse(name))
  return {(c.mesh.dcn_data, c.mesh.dcn_fsdp, c.mesh.sequence) for c in found}


def test_slices_are_shared_in_every_way():
  assert meshes('v5e:2x2') == {(1, 1, 1)}
  assert meshes('v5e:2x2*4') == {(1, 4, 1), (2, 2, 1), (4, 1, 1)}
  assert meshes('v5e:2x2*4', mesh__dcn_fsdp=4) == {(1, 4, 1)}


def test_long_rows_are_split():
  assert {s for _, _, s in meshes('v5e:4x4', model__max_seq_len=32_768)} == {1, 2, 4, 8, 16}
  assert {s for _, _, s in meshes('v5e:4x4', mesh__sequence=2)} == {2}


def test_micro_batches_are_whole_rows_of_every_device_and_divide_the_batch():
  cfg = requests.request(train__batch_size=120).cfg
  found = {
    c.train.micro_batch_size
    for c in planner_search.candidates(cfg, chips.parse('v5e:2x2'))
    if c.mesh.data == 4
  }
  assert found == {4, 8, 12, 20, 120}  # 4 x 4 does not divide 120
