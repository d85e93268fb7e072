"""A round as one pure function of state, data, seed and round number; accuracy by class."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import trees
from moe_jax.federated import class_ratios, client, creff, encoders, heads, server
from moe_jax.federated import settings as settings_lib

Array = jax.Array
EVALUATION_ROWS = 500  # at once


class State(NamedTuple):
  """What the server knows between rounds; what a method does not use stays at its start."""

  round: Array  # the next one
  params: (
    trees.Params
  )  # encoder, main; extra, if the method has it: of each client where not shared
  prototypes: heads.Head  # gradients by class, at the last model that was sent
  known: Array  # [classes]
  class_weights: Array  # [classes], of the ratio loss
  duals: Array  # [clients], of CLIMB
  retrained: heads.Head  # of CReFF
  features: Array  # of CReFF, [classes, features of a class, width]


class Data(NamedTuple):
  """The data of one seed on devices, as in `partition.Federation`."""

  clients: client.Samples
  test_x: Array
  test_y: Array
  server_x: Array
  server_y: Array


def init(settings: settings_lib.Settings, seed: Array) -> State:
  """The state before the first round; the same encoder and main head for every method.

  Args:
    settings: of the run.
    seed: a typed key.
  """
  encoder_key, main_key, extra_key, feature_key = jax.random.split(seed, 4)
  encoder, classes = encoders.init(settings, encoder_key), settings.data.classes
  image = jax.ShapeDtypeStruct((1, *settings.data.shape), jnp.uint8)
  width = jax.eval_shape(functools.partial(encoders.encode, settings), encoder, image).shape[1]
  params = {'encoder': encoder, 'main': _head(main_key, width, classes)}
  if settings.rules.extra_head:
    extra = _head(extra_key, width, classes)
    if not settings.shared_extra_head:
      extra = jax.tree.map(lambda w: jnp.repeat(w[None], settings.clients, axis=0), extra)
    params['extra'] = extra
  number = settings.creff_features if settings.rules.server == 'creff' else 0
  return State(
    round=jnp.int32(0),
    params=params,
    prototypes=jax.tree.map(lambda w: jnp.zeros((classes, *w.shape)), params['main']),
    known=jnp.zeros(classes, bool),
    class_weights=jnp.ones(classes),
    duals=jnp.zeros(settings.clients),
    retrained=params['main'],
    features=jax.random.normal(feature_key, (classes, number, width)),
  )


def _head(key: Array, width: int, classes: int) -> heads.Head:
  bound = width**-0.5
  kernel = jax.random.uniform(key, (width, classes), minval=-bound, maxval=bound)
  return {'kernel': kernel, 'bias': jnp.zeros(classes)}


class Sent(NamedTuple):
  """What a round's clients begin with."""

  broadcast: client.Broadcast
  own: trees.Params  # of each chosen client: its second head, where it is not shared
  samples: client.Samples  # of each chosen client
  keys: Array  # [clients_per_round]
  chosen: Array  # [clients_per_round], their numbers
  server_key: Array


def one_round(
  settings: settings_lib.Settings,
  mesh: jax.sharding.Mesh | None,
  state: State,
  data: Data,
  seed: Array,
) -> State:
  """The state after a round; `plain_round` has the same with a loop over clients.

  Args:
    settings: of the run.
    mesh: with the one axis `clients`, over whose devices the clients of a round are split; it has
      to divide their number. None: one device.
    state: before.
    data: of the seed.
    seed: a typed key; all draws come from it and the number of the round.
  """
  sent = send(settings, state, data, seed)
  updates = _clients(settings, mesh)(sent.broadcast, sent.own, sent.samples, sent.keys)
  return served(settings, state, data, sent, updates)


def send(settings: settings_lib.Settings, state: State, data: Data, seed: Array) -> Sent:
  """Chooses the clients of a round, and what they begin with; arguments as of `one_round`."""
  keys = jax.random.split(jax.random.fold_in(seed, state.round), 3)
  chosen = server.sampled_clients(settings, keys[0])
  params, own = dict(state.params), {}
  if 'extra' in params and not settings.shared_extra_head:
    own = {'extra': jax.tree.map(lambda w: w[chosen], params.pop('extra'))}
  is_creff = settings.rules.server == 'creff'
  broadcast = client.Broadcast(
    params=params,
    gradient_head=state.retrained if is_creff else params['main'],
    prototypes=state.prototypes,
    known=state.known,
    class_weights=state.class_weights,
  )
  samples = data.clients
  if settings.clients_per_round < settings.clients:
    samples = jax.tree.map(lambda x: x[chosen], samples)
  each = jax.vmap(functools.partial(jax.random.fold_in, keys[1]))(chosen)
  return Sent(broadcast, own, samples, each, chosen, keys[2])


def _clients(
  settings: settings_lib.Settings, mesh: jax.sharding.Mesh | None
) -> Callable[..., client.Update]:
  """`client.update` of many clients at once, split over the devices of the mesh."""
  update = functools.partial(client.update, settings)
  many = jax.vmap(update, in_axes=(None, 0, 0, 0))
  if mesh is None:
    return many
  split = jax.P('clients')
  # Nothing is exchanged inside, and the check would need every carry cast to its device by hand.
  return jax.shard_map(
    many, mesh=mesh, in_specs=(jax.P(), split, split, split), out_specs=split, check_vma=False
  )


def served(
  settings: settings_lib.Settings, state: State, data: Data, sent: Sent, updates: client.Update
) -> State:
  """The state after the server's part of a round.

  Args:
    settings: of the run.
    state: before.
    data: of the seed.
    sent: what the clients began with.
    updates: what they sent back, [clients_per_round, ...].
  """
  kind = settings.rules.server
  shares = updates.samples / updates.samples.sum()
  weights, duals = shares, state.duals
  if kind == 'climb':
    weights, duals = server.climb(settings, duals, sent.chosen, shares, updates.loss)
  received = sent.broadcast.params
  trained = {name: updates.params[name] for name in received}
  params = server.averaged(received, trained, weights)
  if sent.own:
    params['extra'] = jax.tree.map(
      lambda old, new: old.at[sent.chosen].set(new), state.params['extra'], updates.params['extra']
    )
  prototypes, known = server.gathered_prototypes(
    state.prototypes, state.known, updates.gradients, updates.present
  )
  after = state._replace(
    round=state.round + 1, params=params, prototypes=prototypes, known=known, duals=duals
  )
  if kind == 'ratio':  # at the model that this round's clients received
    found = class_ratios.class_weights(settings, received, data.server_x, data.server_y)
    after = after._replace(class_weights=found)
  if kind == 'creff':
    made = creff.refined(settings, state.retrained, state.features, prototypes, known)
    after = after._replace(
      features=made, retrained=creff.retrained(settings, made, sent.server_key)
    )
  return after


def right_by_class(settings: settings_lib.Settings, state: State, data: Data) -> Array:
  """How many test images of each class the main head (of CReFF its own) names, [classes]."""
  is_creff = settings.rules.server == 'creff'
  head = state.retrained if is_creff else state.params['main']

  def name(image: Array) -> Array:
    features = encoders.encode(settings, state.params['encoder'], image[None])
    return heads.logits(head, features)[0].argmax()

  named = jax.lax.map(name, data.test_x, batch_size=EVALUATION_ROWS)
  return jnp.zeros(settings.data.classes, jnp.int32).at[data.test_y].add(named == data.test_y)


@functools.lru_cache(maxsize=4)
def advance(
  settings: settings_lib.Settings, mesh: jax.sharding.Mesh | None, number: int
) -> Callable[[State, Data, Array], tuple[State, Array]]:
  """A compiled function (states, data, seeds) -> (states `number` rounds on, right by class).

  All with an axis [seeds] before them, but for a published test set.
  """

  def run(state: State, data: Data, seed: Array) -> tuple[State, Array]:
    def step(state: State, _: None) -> tuple[State, None]:
      return one_round(settings, mesh, state, data, seed), None

    state, _ = jax.lax.scan(step, state, None, length=number)
    return state, right_by_class(settings, state, data)

  test = 0 if settings.data.test_is_drawn else None
  axes: list[Any] = [0, test, test, 0, 0]
  return jax.jit(jax.vmap(run, in_axes=(0, Data(*axes), 0)))
