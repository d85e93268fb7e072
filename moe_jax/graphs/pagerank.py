"""Personalised PageRank P = r (I - (1 - r) A')^-1 with restart probability r (ReNode, 3.1).

A' is `structs.normalized(graph)`, symmetric with eigenvalues in [-1, 1], so P is symmetric too.
Exact: a dense inverse, cubic in the nodes. Two approximations with bounds:

  apply  P times a few columns by power iteration, linear in the edges; after t steps each column is
         off by at most (1 - r)^t of its own length (`error_bound`): the start's error has no
         eigenvalue above 1, and each step multiplies it by (1 - r) A'.
  push   rows of P by pushing residuals (Andersen, Chung and Lang, FOCS 2006, algorithm 3), all
         residuals above the threshold at once; entry (v, x) is too small by at most
         epsilon sqrt(d_v d_x), with degrees d of A + I, and never too large.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse

from moe_jax import errors
from moe_jax.graphs import structs

RESTART = 0.15  # of ReNode
_MAX_SWEEPS = 10_000


def check_restart(restart: float):
  """Requires a probability above 0; at 1, P is the identity."""
  errors.require(
    0 < restart <= 1, f'restart={restart} must be above 0 and at most 1; ReNode has {RESTART}'
  )


def exact(adjacency: structs.Graph, restart: float = RESTART) -> jax.Array:
  """Returns P [nodes, nodes] by a dense inverse.

  Args:
    adjacency: A' of `structs.normalized`.
    restart: probability to start again.
  """
  check_restart(restart)
  identity = jnp.eye(adjacency.num_nodes, dtype=jnp.float32)
  return restart * jnp.linalg.inv(identity - (1 - restart) * structs.dense(adjacency))


def apply(
  adjacency: structs.Operator, x: jax.Array, restart: float = RESTART, steps: int = 100
) -> jax.Array:
  """Returns P x for x [nodes, columns] by power iteration; see `error_bound`."""

  def step(_, z):
    return (1 - restart) * structs.propagate(adjacency, z) + restart * x

  return jax.lax.fori_loop(0, steps, step, x)


def error_bound(restart: float, steps: int) -> float:
  """Largest length of the error of a column of `apply`, over the column's own length."""
  return (1 - restart) ** steps


def steps_for(restart: float, tolerance: float) -> int:
  """Returns the fewest steps of `apply` whose `error_bound` is at most `tolerance`."""
  check_restart(restart)
  errors.require(0 < tolerance < 1, f'tolerance={tolerance} must be between 0 and 1, as in 1e-6')
  return 1 if restart == 1 else math.ceil(math.log(tolerance) / math.log(1 - restart))


def push(
  graph: structs.Graph, sources: np.ndarray, restart: float = RESTART, epsilon: float = 1e-4
) -> sparse.csr_array:
  """Returns approximate rows [sources, nodes] of P, sparse; see the module's bound.

  Args:
    graph: without self-loops; they are added.
    sources: [sources] node numbers.
    restart: probability to start again.
    epsilon: residual per degree that is left where it lies.
  """
  check_restart(restart)
  errors.require(epsilon > 0, f'epsilon={epsilon} must be above 0, as in 1e-4')
  looped = structs.with_self_loops(graph)
  degree = structs.degrees(looped)
  count, num = len(sources), graph.num_nodes
  walk = sparse.csr_array(
    (looped.weights / degree[looped.receivers], (looped.receivers, looped.senders)), (num, num)
  )
  residual = sparse.csr_array((np.ones(count), (np.arange(count), sources)), (count, num))
  settled = sparse.csr_array((count, num))
  for _ in range(_MAX_SWEEPS):
    large = residual.data >= epsilon * degree[residual.indices]
    if not large.any():
      # Of the walk D^-1 (A + I) to the symmetric A': P[v, x] = sqrt(d_v / d_x) walk's P[v, x].
      root = np.sqrt(degree)
      return (sparse.diags_array(root[sources]) @ settled @ sparse.diags_array(1 / root)).tocsr()
    pushed, kept = residual.copy(), residual
    pushed.data, kept.data = residual.data * large, residual.data * ~large
    pushed.eliminate_zeros()
    kept.eliminate_zeros()
    settled = settled + restart * pushed
    residual = (kept + (1 - restart) * (pushed @ walk)).tocsr()
  raise errors.InputError(
    f'PageRank with restart={restart} has not settled after {_MAX_SWEEPS} sweeps; raise restart'
  )


def top_k(rows: Any, k: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns (nodes, weights) [rows, k] of the k largest entries of each row, largest first.

  Rows with fewer entries are filled with node 0 at weight 0.

  Args:
    rows: a csr_array, as of `push`.
    k: how many.
  """
  errors.require(k >= 1, f'k={k} must be at least 1')
  nodes = np.zeros((rows.shape[0], k), np.int32)
  weights = np.zeros((rows.shape[0], k), np.float32)
  for i in range(rows.shape[0]):
    begin, end = rows.indptr[i : i + 2]
    order = np.argsort(-rows.data[begin:end], kind='stable')[:k]
    nodes[i, : len(order)] = rows.indices[begin:end][order]
    weights[i, : len(order)] = rows.data[begin:end][order]
  return nodes, weights
