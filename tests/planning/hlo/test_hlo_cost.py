"""FLOPs, bytes and temporaries of small programs, by hand and against XLA's own counts."""

import jax
import jax.numpy as jnp
import pytest

from moe_jax.planning.hlo import hlo_cost

F32 = {0: '', 1: '{0}', 2: '{1,0}', 3: '{2,1,0}'}


def program(shapes: dict[str, tuple[int, ...]], result: tuple[int, ...], line: str) -> str:
  """A program of one instruction `line` that returns float32 numbers."""

  def text(dims):
    return f'f32[{",".join(map(str, dims))}]{F32[len(dims)]}'

  parameters = '\n'.join(
    f'  %{name} = {text(dims)} parameter({i})' for i, (name, dims) in enumerate(shapes.items())
  )
  return f"""HloModule test, num_partitions=1

ENTRY %main () -> {text(result)} {{
{parameters}
  ROOT %y = {text(result)} {line}
}}
"""


@pytest.mark.parametrize(
  'x, w, result, line, wanted',
  [
    ((8, 16), (16, 32), (8, 32), 'dim_labels=bf_io->bf', 2 * 8 * 16 * 32),
    # Both axes of x, 4 and 16, are added up.
    ((8, 4, 16), (32, 4, 16), (8, 32, 1), 'window={size=4}, dim_labels=b0f_o0i->bf0', 32768),
    # The second axis of w becomes one of the result: of each window one place is no padding.
    (
      *((8, 16, 1), (16, 4, 32), (8, 4, 32)),
      *('window={size=4 pad=3_3 rhs_reversal=1}, dim_labels=bf0_i0o->b0f', 2 * 8 * 4 * 32 * 16),
    ),
    # A batch of 4 products [8, 16] x [16, 32].
    (
      *((4, 16, 8), (4, 16, 32), (4, 8, 32)),
      *('window={size=4 stride=3 lhs_dilate=4}, dim_labels=0fb_0io->0bf', 2 * 4 * 8 * 16 * 32),
    ),
  ],
)
def test_products_that_became_convolutions(x, w, result, line, wanted):
  text = program({'x': x, 'w': w}, result, f'convolution(%x, %w), {line}')
  assert hlo_cost.cost(text).dot_flops == wanted


def test_a_loop_of_products():
  """5 products [8, 16] x [16, 16]; XLA itself counts the body of a loop once."""

  def step(x, w):
    return (jnp.tanh(x @ w), None)

  run = jax.jit(lambda x, w: jax.lax.scan(step, x, w)[0])
  compiled = run.lower(jnp.zeros((8, 16)), jnp.zeros((5, 16, 16))).compile()
  assert hlo_cost.cost(compiled.as_text()).dot_flops == 5 * 2 * 8 * 16 * 16


def test_bytes_of_a_product():
  text = program({'x': (8, 16), 'w': (16, 32)}, (8, 32), 'dot(%x, %w), lhs_contracting_dims={1}')
  assert hlo_cost.cost(text).hbm_bytes == 4 * (8 * 16 + 16 * 32 + 8 * 32)


SLICED = """HloModule test

%inner (p.0: f32[100,8], p.1: s32[]) -> f32[1,8] {
  %p.0 = f32[100,8]{1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  ROOT %cut = f32[1,8]{1,0} dynamic-slice(%p.0, %p.1, %p.1), dynamic_slice_sizes={1,8}
}

%fused (p.2: f32[100,8], p.3: s32[]) -> f32[1,8] {
  %p.2 = f32[100,8]{1,0} parameter(0)
  %p.3 = s32[] parameter(1)
  %nested = f32[1,8]{1,0} fusion(%p.2, %p.3), kind=kLoop, calls=%inner
  ROOT %twice = f32[1,8]{1,0} add(%nested, %nested)
}

ENTRY %main (x: f32[100,8], i: s32[]) -> f32[1,8] {
  %x = f32[100,8]{1,0} parameter(0)
  %i = s32[]{:S(2)} parameter(1)
  ROOT %y = f32[1,8]{1,0} fusion(%x, %i), kind=kLoop, calls=%fused
}
"""


def test_of_a_stack_only_the_layer_in_use_is_read():
  assert hlo_cost.cost(SLICED).hbm_bytes == 4 * (8 + 8)  # the row read, the row written
