"""What the tests of balance share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.balance import balance_losses, router_stats
from moe_jax.config import moe_config
from tests import tiny

EXACT = dict(rtol=2e-6)  # a few float32 roundings


@functools.cache
def make(e=4, k=2, d=2, **overrides) -> moe_config.MoEConfig:
  """A checked `MoEConfig` with E experts, K per token and D virtual devices."""
  sizes = {'num_experts': e, 'num_experts_per_tok': k, 'num_virtual_devices': d}
  return tiny.make(**{f'model__moe__{key}': v for key, v in (sizes | overrides).items()}).model.moe


@functools.partial(tiny.jit, static_argnums=4)
def sums_of(expert_idx, scores, logits, mask, num_devices):
  return router_stats.sequence_sums(expert_idx, scores, logits, mask, num_devices)


@functools.partial(tiny.jit, static_argnums=1)
def losses_of(sums, cfg):
  return {name: fn(sums, cfg) for name, fn in balance_losses.LOSSES.items()}


# Case A. One row of three tokens and a padding place; E = 4, K = 2, D = 2 devices of 2 experts;
# softmax scores, logits ln p + c with c = 1, 2, -1.
#   load  (2, 2, 0, 2), first choices (2, 0, 0, 1), sums of scores (1.0, .65, .5, .85)
#   tokens sent: the first to device 0 only, the others to both: (3, 2)
P_A = np.array([[0.4, 0.3, 0.2, 0.1], [0.1, 0.25, 0.15, 0.5], [0.5, 0.1, 0.15, 0.25], [0] * 4])
IDX_A = np.array([[0, 1], [3, 1], [0, 3], [4, 4]], np.int32)
C_A = np.array([1.0, 2.0, -1.0, 0.0])
LOGITS_A = np.log(np.where(P_A > 0, P_A, 1)) + C_A[:, None]
# Case B. Four tokens; E = 5 experts on D = 3 devices: {0, 1}, {2, 3}, {4}; K = 2; sigmoid scores,
# whose sums are 2, 1, 2.5 and 1. The bias has moved choices away from the best scores.
#   load  (2, 1, 2, 1, 2), first choices (by score; a tie goes to the first) (1, 1, 2, 0, 0)
#   sums of scores (1.6, 1.7, 1.1, 1.2, .9), sent: {0, 1}, {0}, {1, 2}, {1, 2}: (2, 3, 2)
S_B = np.array(
  [
    [0.8, 0.4, 0.2, 0.4, 0.2],
    [0.2, 0.6, 0.1, 0.1, 0.0],
    [0.5, 0.5, 0.5, 0.5, 0.5],
    [0.1, 0.2, 0.3, 0.2, 0.2],
  ]
)
IDX_B = np.array([[0, 3], [1, 0], [4, 2], [4, 2]], np.int32)


@functools.cache
def case_a():
  row = (IDX_A, P_A.astype(np.float32), LOGITS_A.astype(np.float32), np.arange(4) < 3)
  return sums_of(*(a[None] for a in row), 2)


@functools.cache
def case_b():
  # Only these logits have these scores, so that router_z is whatever they say.
  logits = np.log(np.maximum(S_B, 1e-6) / (1 - S_B))
  row = (IDX_B, S_B.astype(np.float32), logits.astype(np.float32), np.ones(4, bool))
  return sums_of(*(a[None] for a in row), 3)


# Any batch: 2 layers, 8 ragged rows of 6 places, E = 5, K = 2, D = 3.
B, L, E, LAYERS = 8, 6, 5, 2
REAL = np.arange(L) < np.array([6, 3, 0, 5, 1, 6, 2, 4])[:, None]


def rows_of(logits):
  """Sums of each row and of a mixture of attention heads with these logits, [B, L, E]."""
  scores = jnp.where(REAL[..., None], jax.nn.softmax(logits), 0.0)
  idx = jnp.where(REAL[..., None], jax.lax.top_k(scores, 2)[1], E)
  sums = router_stats.sequence_sums(idx, scores, logits, REAL, 3)
  return sums, router_stats.MixtureSums(sums.num_tokens, sums.prob, sums.entropy, sums.num_tokens)


compiled_rows_of = tiny.jit(rows_of)
