"""Which experts are chosen by the same tokens."""

from collections.abc import Sequence

import numpy as np
from matplotlib import figure

from moe_jax.analysis.probes import probe_types

LEAST_TOKENS = 20  # of a pair that is named; one that hardly occurs has an extreme lift by chance


def pairs(expert_idx: np.ndarray, num_experts: int) -> np.ndarray:
  """[E, E] int64: tokens that chose both; the diagonal counts those that chose the expert.

  Args:
    expert_idx: [T, K] in 0..E; E = no expert.
    num_experts: E.
  """
  chosen = np.zeros((len(expert_idx), num_experts + 1), np.float32)
  np.put_along_axis(chosen, expert_idx.astype(np.int64), 1.0, axis=1)
  chosen = chosen[:, :num_experts]
  return (chosen.T @ chosen).round().astype(np.int64)


def lift(both: np.ndarray, num_tokens: int) -> np.ndarray:
  """[E, E]: how many times as often a pair is chosen as if its two were chosen independently.

  1 on the diagonal and where one of the two is never chosen. (Exactly K choices per token make
  pairs a little rarer than independence would.)
  """
  single = np.diagonal(both).astype(float)
  expected = np.outer(single, single) / max(num_tokens, 1)
  ratio = np.where(expected > 0, both / np.where(expected > 0, expected, 1.0), 1.0)
  np.fill_diagonal(ratio, 1.0)
  return ratio


def coactivation(context: probe_types.Context) -> probe_types.Finding:
  """Pairs of experts that tokens choose together, against chance."""
  seen = context.observations
  if seen.expert_idx.shape[-1] < 2:
    raise probe_types.NotApplicableError('one routed expert per token: there are no pairs')
  flat = seen.of_tokens(seen.expert_idx)
  both = np.stack([pairs(choices, seen.num_experts) for choices in flat])
  lifts = np.stack([lift(one, flat.shape[1]) for one in both])
  upper = np.triu(np.ones(lifts.shape[1:], bool), 1)
  often = np.where((both >= LEAST_TOKENS) & upper, lifts, 0.0)  # [layers, E, E]

  def draw(fig: figure.Figure):
    panels = probe_types.grid(fig, seen.num_layers)
    for axes, values, name in zip(panels, lifts, context.layer_names()):
      shown = np.log2(np.clip(values, 1 / 8, 8))
      image = axes.imshow(shown, cmap='RdBu_r', vmin=-3, vmax=3)
      axes.set_title(name, fontsize=10)
      axes.set_xlabel('routed expert')
    bar = fig.colorbar(image, ax=panels, shrink=0.8)
    bar.set_ticks([-3, 0, 3], labels=['1/8', '1', '8 x'])
    bar.set_label('chosen together / by chance')

  arrays, size = {'both': both, 'lift': lifts}, probe_types.panel_size(seen.num_layers)
  return probe_types.Finding(arrays, _reading(often, context.layer_names()), draw, size)


def _reading(often: np.ndarray, names: Sequence[str]) -> str:
  """Names the pair of the highest lift in each layer, of up to eight layers.

  Args:
    often: [layers, E, E], lift of the pairs that enough tokens choose; 0 for all others.
    names: of the layers.
  """
  top = often.max(axis=(1, 2))
  known = [i for i in range(len(names)) if top[i] > 0]
  if not known:
    return (
      f'No two experts are chosen together by {LEAST_TOKENS} tokens or more, so that pairs cannot '
      'be told from chance; look at more tokens (--tokens).'
    )
  words = {}
  for i in known:
    first, second = np.unravel_index(often[i].argmax(), often[i].shape)
    words[i] = f'{names[i]}: experts {first} and {second}, {top[i]:.1f} times'
  shown = sorted(sorted(known, key=lambda i: -top[i])[:8])
  few = [name for i, name in enumerate(names) if i not in known]
  return (
    f'Pairs that tokens choose together most often, against chance: '
    f'{"; ".join(words[i] for i in shown)}. Experts that always go together do one job.'
    + (f' Too few tokens to say so of {", ".join(few)}.' if few else '')
  )
