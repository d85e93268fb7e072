"""How alike the experts' weights are, and how many different ones they amount to."""

import jax
import numpy as np
from matplotlib import figure

from moe_jax.analysis.probes import probe_types
from moe_jax.balance import expert_similarity
from moe_jax.models import model_variables


@jax.jit
def _cosines(gate_up: jax.Array, down: jax.Array) -> jax.Array:
  return expert_similarity.expert_cosines(gate_up, down)


def effective_rank(cosines: np.ndarray) -> float:
  """exp of the entropy of the normalised singular values of the experts, each of length 1.

  Roy and Vetterli (2007): E experts at right angles count as E, copies of one as 1.

  Args:
    cosines: [E, E], their Gram matrix.
  """
  singular = np.sqrt(np.clip(np.linalg.eigvalsh(cosines.astype(np.float64)), 0, None))
  share = singular[singular > 1e-6 * singular.max()] / singular.sum()
  return float(np.exp(-(share * np.log(share)).sum()))


def expert_weights(context: probe_types.Context) -> probe_types.Finding:
  """Cosine of every pair of experts, and their effective rank, per layer."""
  moe = model_variables.moe_params(context.subject.variables['params'])
  layers = context.subject.cfg.model.num_moe_layers  # without multi-token prediction
  cosines = np.asarray(_cosines(moe['gate_up'][:layers], moe['down'][:layers]))
  num = cosines.shape[1]
  if num < 2:
    raise probe_types.NotApplicableError('one routed expert: there are no two to compare')
  ranks = np.array([effective_rank(one) for one in cosines])
  off = np.where(np.eye(num, dtype=bool), -np.inf, cosines)
  layer = int(off.max((1, 2)).argmax())
  first, second = np.unravel_index(int(off[layer].argmax()), (num, num))
  mean = np.where(np.isfinite(off), off, 0).sum((1, 2)) / max(num * (num - 1), 1)
  reading = (
    f'The {num} experts of a layer amount to '
    f'{probe_types.per_layer(ranks, context.layer_names(), "{:.1f}")} different ones (effective '
    f'rank). Mean cosine of two: {probe_types.per_layer(mean, context.layer_names(), "{:.3f}")}. '
    f'The two most alike are {first} and {second} of {context.layer_names()[layer]}, cosine '
    f'{off[layer, first, second]:.2f}.'
  )

  def draw(fig: figure.Figure):
    panels = probe_types.grid(fig, len(cosines))
    limit = max(float(np.abs(np.where(np.isfinite(off), off, 0)).max()), 1e-3)
    for axes, values, name, rank in zip(panels, cosines, context.layer_names(), ranks):
      image = axes.imshow(
        np.where(np.eye(num, dtype=bool), 0, values), cmap='RdBu_r', vmin=-limit, vmax=limit
      )
      axes.set_title(f'{name}, effective rank {rank:.1f}', fontsize=10)
      axes.set_xlabel('routed expert')
    bar = fig.colorbar(image, ax=panels, shrink=0.8)
    bar.set_label('cosine of two experts')

  arrays = {'cosines': cosines, 'effective_rank': ranks, 'mean_cosine': mean}
  return probe_types.Finding(arrays, reading, draw, probe_types.panel_size(len(cosines)))
