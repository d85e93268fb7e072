import re

import jax.numpy as jnp
import pytest

from moe_jax.models.experts import cpu_blocks
from tests.models.dispatch import operands


def test_dropless_on_blocks_holds_no_buffer_of_all_rows():
  """None of [rows, D], which is what would grow; h [rows, 2 F] waits for the backward pass."""
  t, k, e = 21, 3, 7
  args = (*operands.operands(t, k, e), jnp.array(operands.choose(t, k, range(e))))
  text = operands.run('dropless').lower(*args).compile().as_text()
  shapes = {
    tuple(int(n) for n in dims.split(',')) for dims in re.findall(r'(?:f32|bf16)\[([\d,]+)\]', text)
  }
  rows = t * k + cpu_blocks.ladder(t * k, e)[-1]
  assert (e, operands.D, 2 * operands.F) in shapes and (
    rows,
    2 * operands.F,
  ) in shapes  # the pattern does find shapes
  assert not [s for s in shapes if {t * k, rows} & set(s) and operands.D in s]
  assert not [s for s in shapes if e in s and {t, t * k, rows} & set(s)]


@pytest.mark.parametrize('t, tallest', [(150, 64), (21, 32), (4, 32)])
def test_blocks_of_every_height_equal_dense(monkeypatch, t, tallest):
  """Several tall blocks and a low one per expert; one expert without a token."""
  monkeypatch.setattr(cpu_blocks, 'TALLEST', tallest)
  assert cpu_blocks.ladder(t * operands.K, operands.E)[-1] == tallest
  args = (
    *operands.operands(t),
    jnp.array(operands.padded(operands.choose(t, allowed=(0, 2, 3, 4)), every=7)),
  )
  fresh = operands.run.__wrapped__('dropless')
  operands.assert_equal_results(fresh(*args), operands.run('dense')(*args), **operands.CLOSE)


def test_ladder_has_a_height_for_the_mean_and_none_that_nobody_needs():
  assert cpu_blocks.ladder(4096 * 6, 64) == (32, 64, 128, 256, 384, 448, 480, 512)
  assert cpu_blocks.ladder(4096 * 6, 256) == (32, 64, 96, 128, 256, 512)
  assert cpu_blocks.ladder(1 << 20, 8) == (32, 64, 128, 256, 512)
  assert cpu_blocks.ladder(33, 4) == (32, 64)
  assert cpu_blocks.ladder(2, 64) == (32,)
