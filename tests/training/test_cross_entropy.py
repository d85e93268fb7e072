"""The readable loss by hand, and the one that makes its own logits against it, on every mesh."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.devices import partitioning
from moe_jax.training import cross_entropy as cross_entropy_lib
from tests import tiny

LOGITS = jnp.log(jnp.array([[[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [0.6, 0.3, 0.1]]]))


def test_cross_entropy_by_hand():
  cross_entropy, z = cross_entropy_lib.next_token(LOGITS, jnp.array([[1, 2, -1]]))
  # -ln .25 - ln .7 and nothing for the last; the probabilities sum to 1, so log Z = 0.
  np.testing.assert_allclose(cross_entropy, -np.log(0.25) - np.log(0.7), rtol=1e-6)
  np.testing.assert_allclose(z, 0, atol=1e-12)


def test_z_loss_by_hand():
  shifted = LOGITS + jnp.array([[[2.0], [-1.0], [5.0]]])
  cross_entropy, z = cross_entropy_lib.next_token(shifted, jnp.array([[1, 2, -1]]))
  # log Z is the shift: 2^2 + 1^2; the shift does not change the cross-entropy.
  np.testing.assert_allclose(z, 5.0, rtol=1e-6)
  np.testing.assert_allclose(cross_entropy, -np.log(0.25) - np.log(0.7), rtol=1e-6)


def test_uniform_logits_cost_log_v_each():
  cross_entropy, _ = cross_entropy_lib.next_token(
    jnp.zeros((2, 5, 32)), jnp.zeros((2, 5), jnp.int32)
  )
  np.testing.assert_allclose(cross_entropy, 10 * np.log(32), rtol=1e-6)


def test_no_targets_cost_nothing():
  assert cross_entropy_lib.next_token(LOGITS, jnp.full((1, 3), -1)) == (0.0, 0.0)


def test_gradient_is_probability_minus_target_and_0_without_target():
  grad = jax.grad(lambda x: cross_entropy_lib.next_token(x, jnp.array([[1, 2, -1]]))[0])(LOGITS)
  want = [[[0.5, -0.75, 0.25], [0.1, 0.2, -0.3], [0, 0, 0]]]
  np.testing.assert_allclose(grad, want, atol=1e-6)


def test_large_logits_stay_finite():
  cross_entropy, z = cross_entropy_lib.next_token(jnp.array([[[1e4, 0.0]]]), jnp.array([[1]]))
  np.testing.assert_allclose((cross_entropy, z), (1e4, 1e8), rtol=1e-6)


# head_loss

B, L, D, V = 4, 6, 8, 10
Z_WEIGHT = 0.03
MESHES = {
  'one device': {},
  'data x fsdp x tensor': dict(data=2, fsdp=2, tensor=2),
  'sequence': dict(data=2, sequence=2),
  'slices, expert, tensor': dict(dcn_data=2, expert=2, tensor=2),
  'fsdp over slices, sequence': dict(dcn_fsdp=2, fsdp=2, sequence=2),
}


def operands(dtype='float32', length=L):
  """x [B, L, D] of the compute dtype, head [D, V] float32, targets: a third has none."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(B, length, D)), dtype)
  targets = rng.integers(V, size=(B, length))
  targets[rng.random(targets.shape) < 0.3] = -1
  return x, jnp.asarray(rng.normal(size=(D, V)), jnp.float32), jnp.asarray(targets, jnp.int32)


def reference(x, head, targets, **unused):
  """The same by `next_token` on all logits."""
  logits = jnp.einsum('BLD,DV->BLV', x, head.astype(x.dtype), preferred_element_type=jnp.float32)
  cross_entropy, z = cross_entropy_lib.next_token(logits, targets)
  return cross_entropy_lib.HeadLoss(cross_entropy + Z_WEIGHT * z, cross_entropy, z)


@functools.cache
def compiled(loss, chunk=None):
  """(x, head, targets) -> (HeadLoss, (d_x, d_head)), of 0.7 times the total."""

  def run(x, head, targets):
    def total(x, head):
      found = loss(x, head, targets, chunk=chunk, z_weight=Z_WEIGHT)
      return 0.7 * found.total, found

    (_, found), grads = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(x, head)
    return found, grads

  return tiny.jit(run)


def on_mesh(axes, fn, *arrays):
  """fn of arrays that lie as training has them; `axes` = {} is no mesh."""
  program, arrays = compile_on(axes, fn, *arrays)
  return program(*arrays)


def compile_on(axes, fn, *arrays):
  """(the program, its arguments on the mesh)."""
  if not axes:
    return fn.lower(*arrays).compile(), arrays
  mesh = tiny.mesh(**axes)
  names = ('act_batch', 'act_len', 'act_embed'), ('embed', 'vocab'), ('act_batch', 'act_len')
  with partitioning.activate(mesh):
    shardings = [jax.NamedSharding(mesh, partitioning.spec(*n)) for n in names]
    arrays = [jax.device_put(a, s) for a, s in zip(arrays, shardings)]
    return tiny.jit(fn.__wrapped__).lower(*arrays).compile(), arrays


@pytest.mark.parametrize('axes', MESHES.values(), ids=MESHES)
@pytest.mark.parametrize('chunk', [2, 5, 100])  # 24 tokens, 3 to 12 per device: 5 does not divide
def test_head_loss_and_its_gradients_are_those_of_the_reference(axes, chunk):
  arrays = operands()
  got, got_grads = on_mesh(axes, compiled(cross_entropy_lib.head_loss, chunk), *arrays)
  want, want_grads = compiled(reference)(*arrays)
  tiny.assert_trees_close(got, want, rtol=1e-5)  # float32 sums of 24 terms in another order
  tiny.assert_trees_close(got_grads, want_grads, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('axes', [{}, dict(data=2, fsdp=2, tensor=2)], ids=['one', 'mesh'])
def test_head_loss_in_bfloat16(axes):
  """Gradients of logits are rounded to bfloat16 (2^-8 each) before sums of 8 to 24 products.

  Logits accumulate in float32 on both sides. The gradient of the head stays float32.
  """
  arrays = operands('bfloat16')
  got, (d_x, d_head) = on_mesh(axes, compiled(cross_entropy_lib.head_loss, 5), *arrays)
  want, want_grads = compiled(reference)(*arrays)
  tiny.assert_trees_close(got, want, rtol=1e-5)
  assert d_x.dtype == jnp.bfloat16 and d_head.dtype == jnp.float32
  tiny.assert_trees_close((d_x, d_head), want_grads, rtol=2**-6, atol=2**-7)


@pytest.mark.parametrize('axes', [{}, dict(data=2, fsdp=2, tensor=2)], ids=['one', 'mesh'])
def test_head_loss_without_targets_is_0_and_has_no_gradient(axes):
  x, head, targets = operands()
  found, grads = on_mesh(
    axes, compiled(cross_entropy_lib.head_loss, 5), x * 1e3, head, jnp.full_like(targets, -1)
  )
  for leaf in jax.tree.leaves((found, grads)):
    assert not np.asarray(leaf).any()


def test_large_logits_of_the_head_stay_finite():
  x, head, targets = operands()
  found, grads = compiled(cross_entropy_lib.head_loss, 5)(x * 1e3, head, targets)
  want, _ = compiled(reference)(x * 1e3, head, targets)
  tiny.assert_trees_close(found, want, rtol=1e-5)
  assert all(np.isfinite(leaf).all() for leaf in grads)


def test_only_the_total_of_the_head_loss_has_a_gradient():
  x, head, targets = operands()
  fn = functools.partial(cross_entropy_lib.head_loss, targets=targets, chunk=5, z_weight=Z_WEIGHT)
  parts = jax.jacrev(lambda x, head: tuple(fn(x, head)), argnums=(0, 1))(x, head)
  assert [any(np.asarray(a).any() for a in part) for part in parts] == [True, False, False]


@pytest.mark.parametrize('axes', MESHES.values(), ids=MESHES)
def test_head_loss_of_evaluation_is_that_of_training(axes):
  evaluated = tiny.jit(functools.partial(cross_entropy_lib.head_loss, chunk=5, z_weight=Z_WEIGHT))
  got = on_mesh(axes, evaluated, *operands())
  tiny.assert_trees_close(got, compiled(reference)(*operands())[0], rtol=1e-5)


def test_evaluation_computes_no_gradient():
  """One product per tile; with gradients three."""
  x, head, targets = operands()

  def loss(x, head):
    return cross_entropy_lib.head_loss(x, head, targets, chunk=5, z_weight=Z_WEIGHT).total

  def products(fn):
    return sum(
      eqn.primitive.name == 'dot_general' for eqn in tiny.equations(jax.make_jaxpr(fn)(x, head))
    )

  assert products(loss) == 1
  assert products(jax.grad(loss, argnums=(0, 1))) == 3


def largest(compiled_program):
  """Elements of the largest float array in a compiled program, as one device sees it."""
  shapes = re.findall(r'\b(?:f32|bf16|f16)\[([\d,]+)\]', compiled_program.as_text())
  return max(int(np.prod([int(n) for n in shape.split(',')])) for shape in shapes)


@pytest.mark.parametrize('axes', [{}, dict(data=2, fsdp=2, tensor=2)], ids=['one', 'mesh'])
def test_no_device_holds_the_logits_of_all_its_tokens(axes):
  """Chunks of 4 of the 64 or 256 tokens: the largest arrays are hidden states and weights."""
  rng = np.random.default_rng(0)
  x, head = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((4, 64, 4), (4, 96)))
  targets = jnp.asarray(rng.integers(96, size=(4, 64)), jnp.int32)
  programs = [
    compile_on(axes, compiled(loss, 4), x, head, targets)[0]
    for loss in (cross_entropy_lib.head_loss, reference)
  ]
  logits = 64 * 4 * 96 // (8 if axes else 1)
  sizes = [largest(program) for program in programs]
  assert sizes[0] < logits / 4 and sizes[1] >= logits
