import dataclasses

import pytest

from moe_jax import errors
from moe_jax.planning import chips, estimate, pipeline, planner
from tests.planning import requests

# F = 1, B = 2, W = 1 second: nothing is recomputed.
CHUNK = pipeline.Chunk(1.0, 2.0, 1.0)


@pytest.mark.parametrize(
  'schedule, seconds',
  [
    ('gpipe', 7 * 3),
    ('1f1b', 7 * 3),
    ('zb1p', 7 * (3 - 2)),
    ('dualpipe', 3 * (3 + 2 - 3)),
    ('zero_bubble', 0),
  ],
)
def test_bubbles_of_8_stages_by_hand(schedule, seconds):
  assert pipeline.SCHEDULES[schedule].bubble(8, CHUNK) == seconds


@pytest.mark.parametrize('p, m', [(2, 2), (4, 12), (16, 240)])
def test_1f1b_waits_for_the_published_share(p, m):
  bubble = pipeline.SCHEDULES['1f1b'].bubble(p, CHUNK)
  assert bubble / (bubble + m * CHUNK.both) == pytest.approx((p - 1) / (m + p - 1))


def test_chunks_hold_what_is_recomputed():
  # A third of the model's 6 is the forward pass; with full remat the backward pass repeats it.
  kept, full = estimate.Work(6, 0, 0, 0, 0), estimate.Work(6, 0, 2, 0, 0)
  assert pipeline.chunk(3.0, kept) == CHUNK
  assert pipeline.chunk(4.0, full) == pipeline.Chunk(1.0, 3.0, 1.0)


def test_stages_are_slices_then_parts_of_one():
  def stage(name, stages):
    return pipeline.stage_topology(chips.parse(name), stages).name

  assert stage('v5p:8x8x8*4', 2) == 'v5p:8x8x8*2' and stage('v5p:8x8x8*4', 4) == 'v5p:8x8x8'
  assert stage('v5p:8x8x8*4', 8) == 'v5p:4x8x8' and stage('h200:2048', 16) == 'h200:128'
  with pytest.raises(errors.InputError, match='--pipeline=3 must be a power of two'):
    stage('v5p:8x8x8', 3)


@pytest.mark.parametrize('topology, link', [('h200:8', 'nvlink'), ('h200:16', 'dcn')])
def test_stages_send_over_the_slowest_link(topology, link):
  assert pipeline._link(chips.parse(topology))[0] == link


def test_the_best_of_a_tiny_model():
  request = requests.request(train__batch_size=16)
  found = {one.schedule: one for one in pipeline.best(request, 2)}
  assert found.keys() == pipeline.SCHEDULES.keys()
  layers = request.cfg.model.num_layers + request.cfg.model.num_mtp_layers
  for one in found.values():
    assert one.micro_batches * one.micro_batch_size == 16
    assert one.hbm_bytes <= one.hbm_capacity_bytes
    assert one.bubble_share == pytest.approx(one.bubble_seconds / one.step_seconds_bound)
    # 4 of 8 devices: 16 rows of L tokens of D numbers of 4 bytes, onwards and back.
    model = request.cfg.model
    sent = 2 * 16 * model.max_seq_len * model.embed_dim * 4 / 4
    assert one.sent_bytes == sent * (2 if one.schedule == 'gpipe' else 1)  # a queue moves too
  assert found['zero_bubble'].step_seconds_bound <= found['zb1p'].step_seconds_bound
  assert found['zb1p'].step_seconds_bound <= found['1f1b'].step_seconds_bound
  with pytest.raises(errors.InputError, match=f'at most the number of layers, {layers}'):
    pipeline.best(dataclasses.replace(request, topology=chips.parse('h200:64')), 16)


def test_schedules_keep_micro_batches_and_copies():
  request = requests.request(train__batch_size=32, train__micro_batch_size=4)
  cfg = pipeline.stage_config(request.cfg, 2)
  mesh = dataclasses.replace(cfg.mesh, data=2, fsdp=1, expert=2)
  topology = pipeline.stage_topology(request.topology, 2)
  stage = pipeline._Stage(
    request, request.cfg, dataclasses.replace(cfg, mesh=mesh), topology, stages=2
  )
  found = {one.schedule: one for one in stage.pipelined() if one.passes in (1, 2)}
  shape = estimate.abstract_mesh(mesh, 4)
  way = planner.exchange_kind(cfg, topology)
  counted = estimate.estimate(stage.cfg, shape, 0.0, way)
  one = counted.temporaries['activations kept for the backward pass']
  # Of 8 micro-batches: 2 with 1F1B, 3 with DualPipe and ZB-H2; of two passes of 4, whose ticks are
  # 5, all of them.
  kept = {name: plan.activation_bytes / one for name, plan in found.items()}
  assert kept == {'gpipe': 5, '1f1b': 2, 'zb1p': 2, 'dualpipe': 3, 'zero_bubble': 3}
  weights = counted.arguments['parameters'] + counted.temporaries['gradients']
  weights += counted.temporaries['weights in the compute dtype']
  assert found['dualpipe'].hbm_bytes - found['zero_bubble'].hbm_bytes == weights
  # All within a node; gradients are summed over the copies of a stage once, not 8 times.
  total = pipeline.sent_bytes(stage.cfg, dict(shape.shape))
  for each in counted.collectives:
    once = (each.kind, each.op_name) == ('all-reduce', 'gradients')
    total += each.bytes * (1 if once else each.count)
  assert found['1f1b'].seconds['nvlink'] == pytest.approx(total / 450e9)
  assert any(c.axes == ('data',) and c.count == 8 for c in counted.collectives)


def test_gpipe_is_counted_as_it_is_built():
  settings = dict(train__batch_size=64, train__micro_batch_size=4, model__remat='full')
  request = requests.request(**settings)
  cfg, topology = pipeline.stage_config(request.cfg, 2), chips.parse('h100:4')
  mesh = dataclasses.replace(cfg.mesh, data=4, fsdp=1, expert=1)
  one = pipeline._Stage(request, request.cfg, dataclasses.replace(cfg, mesh=mesh), topology, 2)
  found = {plan.passes: plan for plan in one.pipelined() if plan.schedule == 'gpipe'}
  # 16 micro-batches: passes of 16, 8, 4 and 2, which wait for (2 - 1) (F + B) each.
  assert found.keys() == {1, 2, 4, 8}
  assert found[8].bubble_seconds == pytest.approx(8 * found[1].bubble_seconds)
  # All that takes longest is repeated in 1 of 17 ticks.
  assert found[1].bubble_seconds == pytest.approx(max(found[1].seconds.values()) / 16)
  # With full remat the inputs of a stage are kept, one row of L D numbers of 4 bytes per tick, and
  # one stage's activations while it is recomputed.
  model = request.cfg.model
  row = model.max_seq_len * model.embed_dim * 4
  assert found[1].activation_bytes - found[4].activation_bytes == (17 - 5) * row
  # 3 MoE layers in 2 stages: a second copy of the weights, and they and their gradients travel.
  deeper = dataclasses.replace(request.cfg, model=dataclasses.replace(model, num_layers=4))
  other = next(plan for plan in dataclasses.replace(one, whole=deeper).pipelined())
  weights = estimate.state_bytes(one.cfg, estimate.abstract_mesh(mesh, 4))['parameters']
  assert other.passes == 1 and other.hbm_bytes - found[1].hbm_bytes == weights
  sent = other.seconds['nvlink'] - found[1].seconds['nvlink']
  assert sent == pytest.approx(2 * weights / 450e9)
