"""Picture of a run of rewards: reward, held-out answers, length, entropy, distance."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import figure, ticker

from moe_jax import errors
from moe_jax.runs import plots

HELDOUT_FILE = 'answers.jsonl'  # of a workdir: {step, right, total} of held-out questions


def read_heldout(workdir: pathlib.Path) -> list[dict[str, int]]:
  """Lines {step, right, total} of held-out questions asked so far; empty without any.

  Raises:
    errors.InputError: the file is damaged.
  """
  path = workdir / HELDOUT_FILE
  if not path.exists():
    return []
  try:
    lines = [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]
    return [{key: int(line[key]) for key in ('step', 'right', 'total')} for line in lines]
  except (ValueError, KeyError, TypeError) as e:
    raise errors.InputError(
      f'{path} must hold lines with step, right and total ({e}); remove it, and the run goes on '
      'without its earlier answers to held-out questions'
    ) from e


def draw(
  metrics: Sequence[Mapping[str, Any]],
  path: plots.Path,
  title: str,
  heldout: Sequence[Mapping[str, int]],
):
  """Panels over steps; a healthy run wins reward while entropy and distance move slowly.

  A run without a reference does not know its distance, and has no panel of it.

  Args:
    metrics: objects of `metrics.jsonl` with `metric_log.POLICY_KEYS`.
    path: PNG to write.
    title: what run this is.
    heldout: see `read_heldout`.
  """
  step = np.array([m['step'] for m in metrics])
  with matplotlib.rc_context(plots.STYLE):
    lines = [
      ('reward', 'reward, mean of answers', plots.BLUE),
      ('answer_tokens', 'tokens\nof an answer', plots.BLUE),
      ('entropy', 'entropy\n[nats per token]', plots.BLUE),
      ('reference_kl', 'KL to reference\n[nats per token]', plots.BLUE),
    ]
    if not any(m['reference_kl'] for m in metrics):
      lines.pop()
    heights = (3, *[2] * (len(lines) - 1))
    fig = figure.Figure(figsize=(8, sum(heights) * 8 / 9), layout='constrained')
    panels = fig.subplots(len(lines), 1, sharex=True, height_ratios=heights)
    for axes, (key, label, colour) in zip(panels, lines):
      axes.plot(step, np.array([m[key] for m in metrics], float), color=colour, linewidth=1.4)
      axes.set_ylabel(label)
      axes.grid(True)
    if heldout:
      at = [line['step'] for line in heldout]
      share = [line['right'] / line['total'] for line in heldout]
      panels[0].plot(
        at, share, color=plots.ORANGE, marker='o', label='held-out questions right, greedy'
      )
      panels[0].legend(frameon=False)
    panels[0].set_title(title, loc='left')
    panels[-1].set_xlabel('optimizer step')
    panels[-1].xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    plots.save(fig, path)
