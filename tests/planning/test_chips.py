import pytest

from moe_jax import errors
from moe_jax.planning import (
  chips,
)


@pytest.mark.parametrize(
  'text, words',
  [
    ('v9:8', 'must be CHIP:SHAPE'),
    ('v5p:8x8', '3 dimension'),
    ('h100:12', 'whole nodes of 8'),
    ('v5p', 'must be CHIP:SHAPE'),
  ],
)
def test_topologies_that_do_not_exist(text, words):
  with pytest.raises(errors.InputError, match=words):
    chips.parse(text)


def test_topologies():
  slices = chips.parse('v5e:16x16*2')
  assert (slices.num_devices, slices.libtpu_name, slices.name) == (512, 'v5e:16x16', 'v5e:16x16*2')
  assert chips.parse('tpu7x:2x2x1').num_devices == 8  # two devices to a chip
