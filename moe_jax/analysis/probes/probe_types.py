"""What a probe is given and what it returns.

A probe is a function of a `Context` that returns a `Finding`: arrays, one figure, one paragraph for
people. It raises `NotApplicableError` where a model has nothing of what it looks at.

Axis letters are those of `moe_jax.models`, T being real tokens; `layers` are the MoE layers.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import figure, ticker

from moe_jax.analysis import interventions
from moe_jax.analysis import observations as observations_lib


class NotApplicableError(Exception):
  """Why a probe says nothing about this model."""


@dataclasses.dataclass(frozen=True)
class Finding:
  """The result of one probe."""

  arrays: Mapping[str, np.ndarray]
  reading: str  # a paragraph, computed from the arrays
  draw: Callable[[figure.Figure], None]
  size: tuple[float, float] = (8.0, 4.0)  # inches, of the figure


@dataclasses.dataclass(frozen=True)
class Context:
  """A trained model, the text it is looked at on, and what was asked for."""

  subject: interventions.Subject
  num_tokens: int  # held-out tokens that are looked at; 0 = all
  others: Mapping[int, Any] = dataclasses.field(default_factory=dict)  # step -> variables
  step: int = 0

  @functools.cached_property
  def observations(self) -> observations_lib.Observations:
    """Routing of the held-out tokens, collected when a probe first asks."""
    return observations_lib.collect(self.subject, self.num_tokens)

  @functools.cached_property
  def sample(self) -> interventions.Subject:
    """The model on as much text as is asked for, to measure losses on."""
    return interventions.on_sample(self.subject, self.num_tokens)

  @functools.cached_property
  def bits_per_byte(self) -> float:
    """Of the model as it is, on `sample`."""
    return interventions.measure(self.sample).bits_per_byte

  @property
  def first_layer(self) -> int:
    """Number of the first MoE layer."""
    return self.subject.cfg.model.num_dense_layers

  def layer_names(self) -> list[str]:
    """Labels of the MoE layers."""
    model = self.subject.cfg.model
    return [f'layer {self.first_layer + i}' for i in range(model.num_moe_layers)]


def grid(fig: figure.Figure, number: int, columns: int = 3) -> list[Any]:
  """Axes for `number` panels about experts, in rows of up to `columns`."""
  columns = min(number, columns)
  rows = -(-number // columns)
  axes = fig.subplots(rows, columns, squeeze=False).ravel()
  for unused in axes[number:]:
    unused.set_visible(False)
  for one in axes[:number]:
    one.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
    one.yaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
  return list(axes[:number])


def panel_size(number: int, height: float = 3.1, columns: int = 3) -> tuple[float, float]:
  """Inches of a figure with `number` panels; see `grid`."""
  return 3.3 * min(number, columns) + 1.0, height * -(-number // columns) + 0.5


def per_layer(
  values: Sequence[float] | np.ndarray, names: Sequence[str], form: str = '{:.2f}'
) -> str:
  """'layer 1: 0.20, layer 2: 0.31' for a reading; the extremes only of more than eight layers."""
  pairs = list(zip(names, values))
  if len(pairs) > 8:
    low, high = min(pairs, key=lambda p: p[1]), max(pairs, key=lambda p: p[1])
    pairs = [low, high]
    start = 'least and most: '
  else:
    start = ''
  return start + ', '.join(f'{name}: {form.format(value)}' for name, value in pairs)
