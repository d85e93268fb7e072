"""A layer with its gradients on a mesh, for tests that hold it against one device."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.devices import partitioning
from moe_jax.planning.hlo import collectives
from tests import tiny


def compile_on(axes: dict[str, int], apply: Callable[..., jax.Array], boxed: Any, *arrays: Any):
  """Compiles (params, *arrays) -> (apply(params, *arrays), gradients of params and first array).

  Args:
    axes: sizes of the mesh; {'data': 1} is one device.
    apply: the layer, [B, L, D] out.
    boxed: shapes of the parameters with the names of their axes; values are drawn.
    *arrays: [B, L, ...].

  Returns:
    (the program; its arguments, laid out as training has them).
  """
  mesh, rng = tiny.mesh(**axes), np.random.default_rng(1)

  def draw(a):
    return rng.normal(size=a.shape).astype(np.float32) / 2

  params = jax.tree.map(draw, partitioning.unbox(boxed))

  def run(params, x, *rest):
    out, pullback = jax.vjp(lambda params, x: apply(params, x, *rest), params, x)
    return out, pullback(jnp.cos(out))

  with partitioning.activate(mesh):
    batch = jax.NamedSharding(mesh, partitioning.BATCH_SPEC)
    arrays = [jax.device_put(a, batch) for a in arrays]
    params = jax.tree.map(jax.device_put, params, partitioning.shardings(boxed, mesh))
    return tiny.jit(run).lower(params, *arrays).compile(), (params, *arrays)


def travelling(program: Any, axes: dict[str, int]) -> dict[str, dict[str, float]]:
  """Bytes on the wire per device, {mesh axes: {kind: bytes}}, see `collectives.collectives`."""
  return collectives.bytes_by_axes(collectives.collectives(program.as_text(), tiny.mesh(**axes)))
