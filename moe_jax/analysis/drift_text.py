"""Routing drift for people: a table over checkpoints, one over layers, a picture, and JSON."""

import pathlib
from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib import figure

from moe_jax.analysis import routing_drift
from moe_jax.runs import plots

_NAMED = 3  # experts that a line names


def arrays(found: Mapping[int, routing_drift.Drift]) -> dict[str, np.ndarray]:
  """Fields of `routing_drift.Drift` with a leading axis of checkpoints, and `steps`."""
  fields = routing_drift.Drift._fields
  joined = {key: np.stack([getattr(one, key) for one in found.values()]) for key in fields}
  return {'steps': np.array(list(found), np.int64), **joined}


def record(found: Mapping[int, routing_drift.Drift]) -> dict[str, Any]:
  """{step: {field: lists}}; null for a router without weights."""

  def plain(values: np.ndarray) -> list[Any]:
    rows = [plain(one) for one in values] if values.ndim > 1 else values.tolist()
    return [None if isinstance(one, float) and np.isnan(one) else one for one in rows]

  return {
    str(step): {key: plain(value) for key, value in one._asdict().items()}
    for step, one in found.items()
  }


def table(found: Mapping[int, routing_drift.Drift]) -> str:
  """A line per checkpoint, means over the layers."""
  lines = [
    f'{"step":>8} {"experts kept":>13} {"same set":>9} {"load shift":>11} {"KL, nats":>9} '
    f'{"MaxVio":>14} {"experts moved":>14} {"router moved":>13}'
  ]
  for step, one in found.items():
    balance = f'{one.max_vio_before.mean():.2f} -> {one.max_vio_after.mean():.2f}'
    lines.append(
      f'{step:>8} {one.kept_share.mean():>13.1%} {one.same_experts.mean():>9.1%} '
      f'{one.load_shift.mean():>11.1%} {one.divergence.mean():>9.4f} {balance:>14} '
      f'{one.experts_moved.mean():>14.2%} {_share(one.router_moved.mean()):>13}'
    )
  return '\n'.join(lines)


def _share(value: float) -> str:
  return 'no weights' if np.isnan(value) else f'{value:.2%}'


def layers(drift: routing_drift.Drift, first_layer: int, step: int) -> str:
  """Two lines per layer: its figures, and the experts whose weights and load moved most."""
  lines = [f'\nstep {step}, layer by layer']
  for i, kept in enumerate(drift.kept_share):
    lines.append(
      f'layer {first_layer + i}: experts kept {kept:.1%}, load shift {drift.load_shift[i]:.1%}, '
      f'MaxVio {drift.max_vio_before[i]:.2f} -> {drift.max_vio_after[i]:.2f}, '
      f'router moved {_share(drift.router_moved[i])}'
    )
    lines.append(
      f'  weights moved most: {_top(drift.experts_moved[i])}; load gained or lost most: '
      f'{_top(drift.load_after[i] - drift.load_before[i], signed=True)}'
    )
  return '\n'.join(lines)


def _top(values: np.ndarray, *, signed: bool = False) -> str:
  """'expert 3 (1.20 %), ...' of the largest, by size."""
  order = np.argsort(-np.abs(values), kind='stable')[:_NAMED]
  form = '{:+.2%}' if signed else '{:.2%}'
  return ', '.join(f'expert {e} ({form.format(values[e])})' for e in order)


def draw(found: Mapping[int, routing_drift.Drift], first_layer: int, path: pathlib.Path):
  """Writes a PNG: kept experts over steps, and per expert how weights and load moved at the end."""
  last = list(found)[-1]
  with matplotlib.rc_context(plots.STYLE):
    fig = figure.Figure(figsize=(12, 3.6), layout='constrained')
    axes = fig.subplots(1, 3)
    steps = np.array([0, *found])
    kept = np.stack([one.kept_share for one in found.values()])
    for i in range(kept.shape[1]):
      values = 100 * np.concatenate([[1.0], kept[:, i]])
      axes[0].plot(steps, values, 'o-', ms=3, color=f'C{i % 10}', label=f'layer {first_layer + i}')
    axes[0].set(xlabel='step of the tuned run', ylabel='experts of the start kept, %')
    axes[0].set_ylim(0, 105)
    if kept.shape[1] <= 8:
      axes[0].legend(frameon=False, fontsize=8)
    _map(fig, axes[1], 100 * found[last].experts_moved, first_layer, 'weights moved, %', 'viridis')
    shift = 100 * (found[last].load_after - found[last].load_before)
    _map(fig, axes[2], shift, first_layer, 'share of assignments gained, points', 'RdBu_r')
    plots.save(fig, path)


def _map(fig: Any, axes: Any, values: np.ndarray, first_layer: int, label: str, colours: str):
  """A heat map, layers downwards and experts to the right; around 0 where colours diverge."""
  limit = max(float(np.abs(values).max()), 1e-9)
  low = -limit if colours == 'RdBu_r' else 0.0
  image = axes.imshow(
    values, aspect='auto', cmap=colours, vmin=low, vmax=limit, interpolation='nearest'
  )
  axes.set_yticks(range(len(values)), [str(first_layer + i) for i in range(len(values))])
  axes.set(xlabel='routed expert', ylabel='layer')
  fig.colorbar(image, ax=axes).set_label(label)
