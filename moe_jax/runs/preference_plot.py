"""Picture of a run of preferences: rewards of both answers, accuracy, distance to the reference."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import figure, ticker

from moe_jax.runs import plots


def draw(
  metrics: Sequence[Mapping[str, Any]],
  path: plots.Path,
  title: str,
  heldout: Mapping[str, float] | None = None,
):
  """Three panels over steps; healthy runs raise the margin while the chosen reward does not sink.

  Args:
    metrics: objects of `metrics.jsonl` with `metric_log.PREFERENCE_KEYS`.
    path: PNG to write.
    title: what run this is.
    heldout: the same figures over the held-out pairs at the last step.
  """
  step = np.array([m['step'] for m in metrics])

  def values(key: str) -> np.ndarray:
    return np.array([m[key] for m in metrics], dtype=float)

  with matplotlib.rc_context(plots.STYLE):
    fig = figure.Figure(figsize=(8, 6.4), layout='constrained')
    rewards, accuracy, distance = fig.subplots(3, 1, sharex=True, height_ratios=(3, 2, 2))
    panels = (
      (rewards, 'chosen_reward', plots.BLUE, 'chosen'),
      (rewards, 'rejected_reward', plots.ORANGE, 'rejected'),
      (accuracy, 'preference_accuracy', plots.BLUE, ''),
      (distance, 'reference_kl', plots.BLUE, ''),
    )
    for axes, key, colour, label in panels:
      axes.plot(step, values(key), color=colour, label=label, linewidth=1.6)
      if heldout:
        held = {'color': colour, 'marker': 'o', 'markersize': 6, 'linestyle': 'none'}
        axes.plot(step[-1], heldout[key], **held, label=f'{label} held-out'.strip())
    rewards.axhline(0, color='0.6', linewidth=0.8)
    rewards.set_title(title, loc='left')
    rewards.set_ylabel('reward\nbeta (log p - log q)')
    rewards.legend(frameon=False, ncols=2)
    accuracy.set_ylim(0, 1.03)
    accuracy.set_ylabel('pairs in order')
    distance.axhline(0, color='0.6', linewidth=0.8)
    distance.set_ylabel('log p - log q\n[nats per token]')
    distance.set_xlabel('optimizer step')
    distance.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    for axes in (rewards, accuracy, distance):
      axes.grid(True)
    plots.save(fig, path)
