"""How sure the routers are."""

import numpy as np
from matplotlib import figure

from moe_jax.analysis.probes import probe_types
from moe_jax.config import router_traits


def measures(scores: np.ndarray, expert_idx: np.ndarray) -> dict[str, np.ndarray]:
  """Per token, from scores divided by their sum.

  The chosen experts need not be those of the highest scores: an expert bias or a limit of groups
  chooses by more than the scores.

  Args:
    scores: [..., E], at least 0, not all 0.
    expert_idx: [..., K] in 0..E, the chosen ones; E = no expert.

  Returns:
    best, the highest share; chosen, the sum of those of the chosen; entropy, over ln E: 0 = certain
    of one expert, 1 = all alike; each [...] float64.
  """
  share = scores.astype(np.float64)
  share /= share.sum(axis=-1, keepdims=True)
  with_none = np.concatenate([share, np.zeros_like(share[..., :1])], axis=-1)
  logs = np.log(np.where(share > 0, share, 1.0))
  return {
    'best': share.max(axis=-1),
    'chosen': np.take_along_axis(with_none, expert_idx.astype(np.int64), axis=-1).sum(axis=-1),
    'entropy': -(share * logs).sum(axis=-1) / np.log(max(scores.shape[-1], 2)),
  }


def confidence(context: probe_types.Context) -> probe_types.Finding:
  """The share of the score that the best expert and the chosen K get, and the entropy."""
  moe = context.subject.cfg.model.moe
  traits = router_traits.of(moe)
  if not traits.has_logits:
    raise probe_types.NotApplicableError(f'router {moe.router!r} has no scores to be sure by')
  k = traits.per_token(moe)
  seen = context.observations
  figures = measures(seen.of_tokens(seen.scores), seen.of_tokens(seen.expert_idx))  # [layers, T]
  names = context.layer_names()
  means = {key: values.mean(axis=1) for key, values in figures.items()}
  reading = (
    f'Of the sum of all scores the chosen {k} of {moe.num_experts} experts '
    f'get {probe_types.per_layer(100 * means["chosen"], names, "{:.0f} %")} '
    f'(all alike would be {100 * k / moe.num_experts:.0f} %), the best one '
    f'{probe_types.per_layer(100 * means["best"], names, "{:.0f} %")}. Entropy, as a share of '
    f'that of scores that are all alike: {probe_types.per_layer(means["entropy"], names)}.'
  )

  def draw(fig: figure.Figure):
    left, right = fig.subplots(1, 2)
    edges = np.linspace(0, 1, 51)
    for i, name in enumerate(names):
      colour = f'C{i % 10}'
      for axes, key in ((left, 'best'), (right, 'chosen')):
        share, _ = np.histogram(figures[key][i], edges)
        axes.stairs(share / share.sum(), edges, color=colour, label=name)
    left.set_title('score of the best expert', fontsize=10)
    right.set_title(f'score of the chosen {k} together', fontsize=10)
    for axes in (left, right):
      axes.set_xlabel('share of the sum of scores')
      axes.set_ylabel('share of the tokens')
    if len(names) <= 10:
      right.legend(frameon=False, fontsize=8)

  arrays = {f'mean_{key}': values for key, values in means.items()}
  return probe_types.Finding(arrays, reading, draw)
