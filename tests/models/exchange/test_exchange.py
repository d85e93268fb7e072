"""Every exchange against one device that has all experts: values, gradients, and what is lost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.devices import partitioning
from moe_jax.models.dispatch import DISPATCHES, dense
from moe_jax.models.exchange import EXCHANGES, buffers, choose, ragged
from moe_jax.models.experts import backends, grouped_kernels, grouped_products
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


@pytest.mark.parametrize('case', ['random', 'one device', 'padding'])
@pytest.mark.parametrize('kind', EXCHANGES)
def test_equals_one_device(kind, case):
  args = choices(case), *operands()
  *got, lost = run(kind)(*args)
  for name, a, b in zip(('out', 'x', 'gates', 'gate_up', 'down'), got, reference(*args)):
    np.testing.assert_allclose(a, b, err_msg=name, **CLOSE)
  assert not np.asarray(lost).any()


def test_any_dispatch_computes_what_arrived():
  args = choices('padding'), *operands()
  for dispatch, room in (('dense', 0), ('capacity', P * T)):
    *got, _ = run('all_to_all', dispatch=dispatch, room=room)(*args)
    for a, b in zip(got, reference(*args)):
      np.testing.assert_allclose(a, b, **CLOSE)


def reached(idx, limited):
  """[T, P] bool by hand: the copies that fit, `limited` copies from each device to each other."""
  wanted = (np.asarray(idx)[..., None] // (E // P) == np.arange(P)).any(1)
  sent = np.zeros_like(wanted)
  for device in range(P):
    part = slice(device * T, (device + 1) * T)
    sent[part] = wanted[part] & (np.cumsum(wanted[part], 0) <= limited)
  return sent


def test_what_does_not_fit_is_counted_and_left_out():
  """A factor of 1 gives each pair T S / P = 6 * 3 / 4 rows, rounded up to 5."""
  idx, *rest = choices('one device'), *operands()
  *got, lost = run('all_to_all', factor=1.0)(idx, *rest)
  sent = reached(idx, 5)
  assert (~sent[:, 1]).sum() == P  # the last token of each device
  left = jnp.where(jnp.asarray(sent[:, 1:2]), idx, E)
  for a, b in zip(got, reference(left, *rest)):
    np.testing.assert_allclose(a, b, **CLOSE)
  np.testing.assert_array_equal(lost, [2] * P)  # two choices each


def test_a_ragged_buffer_is_shared_by_the_senders():
  """A factor of 1 leaves T S = 18 rows on device 1: those of devices 0, 1 and 2."""
  idx, *rest = choices('one device'), *operands()
  *got, lost = run('ragged_all_to_all', factor=1.0)(idx, *rest)
  left = jnp.where(jnp.arange(P * T)[:, None] < 18, idx, E)
  for a, b in zip(got, reference(left, *rest)):
    np.testing.assert_allclose(a, b, **CLOSE)
  np.testing.assert_array_equal(lost, [0, 0, 0, 2 * T])


def test_the_receiver_counts_what_it_has_no_room_for():
  idx, *rest = choices('one device'), *operands()
  *got, lost = run('all_gather', room=30)(idx, *rest)
  # Sorted by expert: all 24 tokens of expert 2, the first 6 of expert 3.
  left = idx.at[6:, 1].set(E)
  for a, b in zip(got, reference(left, *rest)):
    np.testing.assert_allclose(a, b, **CLOSE)
  np.testing.assert_array_equal(lost, [0, 18, 0, 0])


def test_rows_that_no_kernel_writes_do_not_matter(monkeypatch):
  """A grouped kernel leaves anything, here NaN, in the rows behind its last group."""
  clean = grouped_kernels.ragged_dot_products()

  def spoiled(leg):
    def fn(x, w, sizes):
      behind = jnp.arange(len(x))[:, None] >= sizes.sum()
      return jnp.where(behind, jnp.nan, leg(x, w, sizes))

    return fn

  def strict(x, g, sizes):  # multiplies what it must not see, as a masked tile does
    behind = jnp.arange(len(x))[:, None] >= sizes.sum()
    return clean.tgmm(x, g, sizes) + 0 * jnp.where(behind, x.sum() * g.sum(), 0).sum()

  legs = grouped_kernels.Products('spoiled', spoiled(clean.gmm), spoiled(clean.gmm_t), strict)
  monkeypatch.setitem(backends.BACKENDS, 'spoiled', lambda: grouped_products.GroupedExperts(legs))
  idx, *rest = choices('padding'), *operands()
  room = idx.size + 7

  def fn(*args):
    return DISPATCHES['dropless'](*args[:2], idx, *args[2:], 'spoiled', room)

  out, vjp = jax.vjp(fn, *rest[:4])
  for a, b in zip((out, *vjp(rest[4])), reference(idx, *rest)):
    np.testing.assert_allclose(a, b, **CLOSE)


@pytest.mark.parametrize(
  'groups, limit, devices, fan',
  [
    (1, 1, 4, 3),
    (1, 1, 2, 2),
    (4, 2, 4, 2),
    (2, 1, 4, 2),
    (4, 2, 2, 2),
    (4, 2, 8, 3),
    (1, 1, 8, 3),
  ],
)
def test_device_limited_routing_bounds_the_copies(groups, limit, devices, fan):
  """Groups of 8 / 4 = 2 experts: on two of 8 devices; a group of 4 spans two of 4 devices."""
  assert buffers.fan_out(config_of(groups=groups, limit=limit), K, devices) == fan


def rows_of(fn, primitive):
  """How many rows of width D each use of a collective gets in the traced program."""
  with partitioning.activate(MESH()):
    jaxpr = jax.make_jaxpr(fn.traced)(choices('random'), *operands())
  return {
    v.aval.shape[0]
    for eqn in tiny.equations(jaxpr.jaxpr)
    if eqn.primitive.name == primitive
    for v in eqn.invars
    if v.aval.shape[1:] == (D,)
  }


def test_device_limited_routing_shows_in_the_bytes():
  """Two of four groups: two copies of a token travel instead of three; ids as well as states."""
  back = P * T  # the emulation also gathers the buffer that received
  free, limited = run('ragged_all_to_all'), run('ragged_all_to_all', groups=4, limit=2)
  assert rows_of(free, 'all_gather') == {T * 3, back}
  assert rows_of(limited, 'all_gather') == {T * 2, back}
  free, limited = run('all_to_all', factor=1.0), run('all_to_all', factor=1.0, groups=4, limit=2)
  assert rows_of(free, 'all_to_all') == {P * 5}  # 6 * 3 / 4, rounded up, for each device
  assert rows_of(limited, 'all_to_all') == {P * 3}


def test_no_token_is_scattered():
  """With the products of accelerators: states are only ever gathered."""
  for kind in EXCHANGES:
    with partitioning.activate(MESH()):
      jaxpr = jax.make_jaxpr(run(kind, backend='ragged_dot').traced)(choices('random'), *operands())
    for eqn in tiny.equations(jaxpr.jaxpr):
      if eqn.primitive.name.startswith('scatter'):
        assert eqn.outvars[0].aval.dtype == jnp.int32, kind


def test_the_emulated_ragged_all_to_all_by_hand():
  """Device i sends i + 1 rows to device 0 and one to device 1, into buffers of 12 rows."""
  operand = jnp.arange(P * 8.0).reshape(P * 8, 1)
  sent = np.array([[i + 1, 1, 0, 0] for i in range(P)], np.int32)
  lands = np.cumsum(sent, axis=0) - sent

  def part(rows, first, size, offset, comes):
    out = jnp.full((12, 1), -1.0)
    args = (a[0] for a in (first, size, offset, comes))
    return ragged.emulated(rows, out, *args, axis_name='expert')

  first = np.cumsum(sent, axis=1) - sent
  with partitioning.activate(MESH()):
    fn = jax.jit(partitioning.per_shard(part, (ROWS,) * 5, ROWS))
    got = np.asarray(fn(operand, first, sent, lands, sent.T)).reshape(P, 12)
  base = np.arange(P) * 8
  want = np.concatenate([base[i] + np.arange(i + 1) for i in range(P)])
  np.testing.assert_array_equal(got[0], [*want, -1, -1])
  np.testing.assert_array_equal(got[1], [*(base + np.arange(P) + 1), *[-1] * 8])
  assert (got[2:] == -1).all()


def test_auto_takes_what_the_platform_has():
  assert choose('auto') == 'all_to_all'
  assert choose('all_gather') == 'all_gather'
