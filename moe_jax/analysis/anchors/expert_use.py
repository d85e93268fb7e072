"""Which routed experts see label words, and what is lost without them.

The choices of label words, formatting tokens and texts are counted apart, per MoE layer. Then
experts are silenced, their output being set to 0 for all tokens: those that label words choose most
in excess of texts, those that texts choose most in excess of label words, or random ones.

Axis letters: X MoE layers, Y kinds of token.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import trees
from moe_jax.analysis.anchors import observed_model, prompts
from moe_jax.config import schema

ARMS = ('label', 'text', 'random')


@functools.partial(jax.jit, static_argnums=0)
def _counts(cfg: schema.ModelConfig, variables: trees.Variables, batch: prompts.Batch):
  found = observed_model.apply(cfg, variables, batch.tokens, batch.mask)
  assert found.expert_idx is not None
  chosen = jax.nn.one_hot(found.expert_idx, cfg.moe.num_experts).sum(axis=3)  # [X, B, L, E]
  before = jnp.arange(batch.tokens.shape[1]) < batch.start[:, None]  # demonstrations alone
  of_kind = jnp.stack([(batch.kinds == k) & before for k in range(len(prompts.KINDS))])
  return jnp.einsum('XBLE,YBL->YXE', chosen, of_kind.astype(jnp.float32))


def shares(
  cfg: schema.ModelConfig, variables: trees.Variables, batch: prompts.Batch, *, size: int
) -> np.ndarray:
  """Share of each expert in the choices of a kind of token of the demonstrations: [Y, X, E]."""
  total = 0.0
  for begin in range(0, len(batch.tokens), size):
    total += np.asarray(_counts(cfg, variables, batch.take(slice(begin, begin + size))))
  total = np.asarray(total)
  return total / total.sum(axis=-1, keepdims=True)


def separation(shares: np.ndarray, other: int = prompts.TEXT) -> np.ndarray:
  """Total variation between the choices of label words and of another kind: [Y, X, E] -> [X].

  0: they choose alike; 1: no expert is chosen by both.
  """
  return 0.5 * np.abs(shares[prompts.LABEL] - shares[other]).sum(axis=-1)


def chosen(shares: np.ndarray, arm: str, count: int, rng: np.random.Generator) -> list[np.ndarray]:
  """`count` experts of each layer for an arm of `ARMS`: arrays [count] int."""
  excess = shares[prompts.LABEL] - shares[prompts.TEXT]
  if arm == 'random':
    return [rng.permutation(excess.shape[1])[:count] for _ in excess]
  return [np.argsort(-row if arm == 'label' else row)[:count] for row in excess]


def silenced(variables: trees.Variables, experts: Sequence[np.ndarray]) -> trees.Variables:
  """The variables with a zero output matrix for these experts of each MoE layer."""
  params = variables['params']
  down = params['moe_layers']['moe']['down']  # [X, E, F, D]
  for layer, ids in enumerate(experts):
    down = down.at[layer, jnp.asarray(ids)].set(0.0)
  moe = {**params['moe_layers']['moe'], 'down': down}
  layers = {**params['moe_layers'], 'moe': moe}
  return {**variables, 'params': {**params, 'moe_layers': layers}}
