"""What the tests of models.exchange share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.devices import partitioning
from moe_jax.models.dispatch import DISPATCHES, dense
from moe_jax.models.exchange import EXCHANGES
from tests import tiny

P, T, K, E, D, F = 4, 6, 3, 8, 5, 4  # T tokens on each of P devices
MESH = functools.cache(lambda: tiny.mesh(expert=P))
# Sums of at most K products of magnitude 1 in another order, float32.
CLOSE = dict(rtol=1e-5, atol=1e-5)
ROWS, EXPERTS = ('act_batch',), ('expert',)


def config_of(kind='all_to_all', factor=0.0, groups=1, limit=1):
  sizes = dict(
    model__moe__num_experts=E,
    model__moe__num_experts_per_tok=K,
    model__moe__num_expert_groups=groups,
    model__moe__num_limited_groups=limit,
    model__moe__exchange__kind=kind,
    model__moe__exchange__buffer_factor=factor,
  )
  return tiny.make(**sizes).model.moe


def operands(seed=0):
  rng = np.random.default_rng(seed)

  def draw(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  gates = jnp.asarray(rng.dirichlet(np.ones(K), size=P * T), jnp.float32)
  return draw(P * T, D), gates, draw(E, D, 2, F), draw(E, F, D), draw(P * T, D)


def choices(case):
  """[P T, K] expert ids, E where a choice is not used."""
  rng = np.random.default_rng(1)
  idx = np.argsort(rng.random((P * T, E)), axis=1)[:, :K]
  if case == 'one device':  # all tokens to experts 2 and 3, which live on device 1
    idx = np.tile([2, 3, E], (P * T, 1))
  elif case == 'padding':
    idx[::3] = E
    idx[T : 2 * T] = E  # a device that sends nothing
    idx[5, 1] = E
  return jnp.asarray(idx, jnp.int32)


def compute(dispatch, room, local, gate_up, down, backend='blocks'):
  out = DISPATCHES[dispatch](*local, gate_up, down, backend, room)
  chosen = (local.expert_idx < len(gate_up)).sum(dtype=jnp.int32)
  return out, jnp.maximum(chosen - room, 0) if room else jnp.int32(0)


@functools.cache
def run(kind, factor=0.0, groups=1, limit=1, dispatch='dropless', room=0, backend='blocks'):
  """Jitted (idx, x, gates, gate_up, down, cotangent) -> (out, four gradients, lost [P])."""
  cfg = config_of(kind, factor, groups, limit)

  def part(idx, x, gates, gate_up, down):
    def local(rows):
      return compute(dispatch, room, rows, gate_up, down, backend)

    out, lost = EXCHANGES[kind](local, cfg, x, gates, idx, T)
    return out, lost[None]

  def fn(idx, x, gates, gate_up, down, cotangent):
    mapped = partitioning.per_shard(part, (ROWS, ROWS, ROWS, EXPERTS, EXPERTS), (ROWS, ROWS))
    out, vjp, lost = jax.vjp(functools.partial(mapped, idx), x, gates, gate_up, down, has_aux=True)
    return out, *vjp(cotangent), lost

  jitted = tiny.jit(fn)

  def call(*args):
    with partitioning.activate(MESH()):
      return jitted(*args)

  call.traced = fn
  return call


@tiny.jit
def reference(idx, x, gates, gate_up, down, cotangent):
  def fn(*args):
    return dense.dispatch(*args[:2], idx, *args[2:], '', 0)

  out, vjp = jax.vjp(fn, x, gates, gate_up, down)
  return out, *vjp(cotangent)
