"""What a pipeline refuses, and how many parts it makes."""

import pytest

from moe_jax import errors
from moe_jax.config import stage_rules
from moe_jax.devices import partitioning
from tests import tiny

MOE = 'model__moe__'
GROUPS = {f'{MOE}capacity__policy': 'score', f'{MOE}capacity__group_rows': 2}


@pytest.mark.parametrize(
  'overrides, rows, stages, ways, parts',
  [
    ({}, 64, 2, 1, 8),  # four for each stage
    ({}, 12, 2, 1, 6),  # 8 does not divide 12
    ({}, 32, 2, 4, 8),  # 8 rows on each of 4 devices
    ({}, 8, 2, 4, 2),  # 2 rows on each
    (GROUPS, 16, 2, 1, 8),
    (GROUPS, 8, 2, 1, 4),  # pairs of rows
    (GROUPS, 16, 2, 2, 4),
  ],
)
def test_as_many_parts_as_the_rows_allow(overrides, rows, stages, ways, parts):
  model = tiny.make(**overrides).model
  assert stage_rules.micro_batches(model, 0, rows, stages, ways, train=True) == parts
  assert stage_rules.micro_batches(model, parts, rows, stages, ways, train=True) == parts


def test_drops_in_training_alone_bind_no_evaluation():
  model = tiny.make(**GROUPS).model
  assert stage_rules.micro_batches(model, 0, 2, 2, 1, train=False) == 2
  with pytest.raises(errors.InputError, match='a multiple of 4'):
    stage_rules.micro_batches(model, 0, 2, 2, 1, train=True)


@pytest.mark.parametrize(
  'axes, overrides, message',
  [
    (
      dict(stage=3),
      {'train__batch_size': 6},
      r'mesh\.stage=3 must be at most the number of MoE layers, 2',
    ),
    (dict(stage=2), {'mesh__stage_micro_batches': 3}, r'=3 must be a multiple of .*=2; choose 4'),
    (dict(stage=2), {'mesh__stage_micro_batches': 6}, r'cannot cut 8 rows .*choose 2 or 4 or 8'),
    (dict(stage=2, data=3), {'train__batch_size': 8}, r'batch_size=8 must be divisible by 6'),
    (dict(stage=2), GROUPS | {f'{MOE}capacity__group_rows': 8}, r'groups of 8 .*multiple of 16'),
    (
      dict(stage=2),
      {f'{MOE}capacity__policy': 'score', f'{MOE}capacity__group_rows': 0},
      r'group_rows=0 lets all rows',
    ),
    (
      dict(stage=2),
      {f'{MOE}router': 'expert_choice', f'{MOE}options__shuffle_chunks': True},
      r'shuffle_chunks=False',
    ),
    (
      dict(stage=2),
      {f'{MOE}router': 'expert_choice', f'{MOE}options__chunk_tokens': 128},
      r'groups of 8',
    ),
    (
      dict(stage=2),
      {
        f'{MOE}router': 'ds_moe',
        f'{MOE}dispatch': 'dense',
        f'{MOE}options__inference': 'threshold_topk',
      },
      r'threshold_topk.*choose another rule',
    ),
    (dict(stage=2), {'model__remat': 'offload'}, r"remat='offload' .*choose 'full'"),
    (
      dict(stage=2),
      {'trainable__kind': 'lora', 'init_from': 'run'},
      r"trainable\.kind='lora' .*mesh\.stage=1",
    ),
  ],
)
def test_what_a_pipeline_refuses(axes, overrides, message):
  cfg = tiny.make(**overrides)
  with pytest.raises(errors.InputError, match=message):
    partitioning.check(cfg, tiny.mesh(**axes))
  partitioning.check(cfg, tiny.mesh(1))


def test_the_number_of_parts_is_no_axis():
  with pytest.raises(errors.InputError, match=r'mesh\.stage_micro_batches=-1 must be at least 0'):
    tiny.make(mesh__stage_micro_batches=-1)


def test_which_axis_the_stages_share():
  assert stage_rules.shared_axis((4, 3, 8), 2) == 0
  assert stage_rules.shared_axis((3, 4, 8), 4) == 2  # the longest
  assert stage_rules.shared_axis((3, 4, 6), 4) == 1  # 4 does not divide 6
  assert stage_rules.shared_axis((3, 5), 2) == stage_rules.WHOLE
  assert [stage_rules.layers_of_a_stage(58, p) for p in (2, 16)] == [29, 4]
