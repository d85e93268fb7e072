"""How much is lost without the best experts, the shared ones, or with fewer per token.

The experiments of DeepSeekMoE (arXiv 2401.06066, section 4.5, Figures 4 and 5), in all layers at
once and layer by layer. The rise is of held-out bits per byte over the model as it is.
"""

import numpy as np
from matplotlib import figure

from moe_jax import errors
from moe_jax.analysis import interventions
from moe_jax.analysis.probes import probe_types
from moe_jax.config import router_traits
from moe_jax.runs import plots

SHARES = (1 / 16, 2 / 16, 3 / 16, 4 / 16)  # of the routed experts, Figure 4


def disable_top(context: probe_types.Context) -> probe_types.Finding:
  """Figure 4: the routed experts of highest score disabled; per layer 1/16 of them."""
  subject, base = context.sample, context.bits_per_byte
  cfg = subject.cfg
  per_token = router_traits.of(cfg.model.moe).per_token(cfg.model.moe)
  room = cfg.model.moe.num_experts - per_token
  numbers = [interventions.num_disabled(cfg, share) for share in SHARES]
  numbers = sorted({number for number in numbers if 0 < number <= room})
  if not numbers:
    raise probe_types.NotApplicableError(
      f'{cfg.model.moe.num_experts} experts, {per_token} of them active, leave none to disable'
    )
  layers = range(cfg.model.num_moe_layers)
  try:
    rises = [_rise(subject, base, [number] * len(layers)) for number in numbers]
  except errors.InputError as error:
    raise probe_types.NotApplicableError(str(error)) from error
  alone = [
    _rise(subject, base, interventions.of_layer(cfg.model, i, numbers[0], 0)) for i in layers
  ]
  shares = np.asarray(numbers) / cfg.model.moe.num_experts
  worst = int(np.argmax(alone))
  reading = (
    f'Without the best {numbers[0]} of {cfg.model.moe.num_experts} routed experts of every token '
    f'held-out bits per byte rise by {rises[0]:.3f} from {base:.3f}, without the best '
    f'{numbers[-1]} by {rises[-1]:.3f}. The more they rise, the less can other experts stand in '
    f'for them. Of the layers alone, {context.layer_names()[worst]} misses its best most: '
    f'{alone[worst]:+.3f}.'
  )

  def draw(fig: figure.Figure):
    left, right = fig.subplots(1, 2)
    left.plot([0, *shares], [0, *rises], 'o-', color=plots.BLUE)
    left.set_xlabel('share of the routed experts disabled, best first')
    left.set_ylabel('rise of bits per byte')
    _bars(right, alone, context, f'{numbers[0]} disabled in one layer alone')

  arrays = {
    'disabled': np.asarray(numbers),
    'rise': np.asarray(rises),
    'rise_of_layer': np.asarray(alone),
    'bits_per_byte': np.asarray(base),
  }
  return probe_types.Finding(arrays, reading, draw)


def _rise(subject: interventions.Subject, base: float, disabled: list[int]) -> float:
  return interventions.measure(subject, disabled=disabled).bits_per_byte - base


def _bars(axes, values, context: probe_types.Context, title: str):
  """A bar per layer."""
  axes.bar(range(len(values)), values, color=plots.ORANGE)
  first, step = context.first_layer, max(1, len(values) // 12)
  axes.set_xticks(
    range(0, len(values), step), [str(first + i) for i in range(0, len(values), step)]
  )
  axes.set_xlabel('layer')
  axes.set_ylabel('rise of bits per byte')
  axes.set_title(title, fontsize=10)


def drop_shared(context: probe_types.Context) -> probe_types.Finding:
  """The shared experts dropped, and routed ones in their place; per layer without a stand-in."""
  subject, base = context.sample, context.bits_per_byte
  model = subject.cfg.model
  if not model.moe.num_shared_experts:
    raise probe_types.NotApplicableError('the model has no shared expert')
  dropped = interventions.without_shared(subject, stand_in=False).bits_per_byte - base
  replaced = None
  if model.moe.num_experts_per_tok + model.moe.num_shared_experts <= model.moe.num_experts:
    replaced = interventions.without_shared(subject, stand_in=True).bits_per_byte - base
  alone = [
    interventions.measure(
      subject, shared_scale=interventions.of_layer(model, i, 0.0, 1.0)
    ).bits_per_byte
    - base
    for i in range(model.num_moe_layers)
  ]
  stand_in = 'no routed experts are left to stand in'
  if replaced is not None:
    stand_in = (
      f'with {model.moe.num_shared_experts} more routed expert(s) per token in their place by '
      f'{replaced:.3f}'
    )
  worst = int(np.argmax(alone))
  reading = (
    f'Without the shared experts held-out bits per byte rise by {dropped:.3f} from {base:.3f}, '
    f'{stand_in}: what is left of the rise is what only the shared experts know. '
    f'{context.layer_names()[worst].capitalize()} alone loses most, {alone[worst]:+.3f}.'
  )

  def draw(fig: figure.Figure):
    left, right = fig.subplots(1, 2)
    names, values = ['dropped'], [dropped]
    if replaced is not None:
      names, values = [*names, 'routed in its place'], [*values, replaced]
    left.bar(names, values, color=plots.BLUE, width=0.5)
    left.set_ylabel('rise of bits per byte')
    left.set_title('shared experts of all layers', fontsize=10)
    _bars(right, alone, context, 'dropped in one layer alone')

  arrays = {
    'rise': np.asarray(dropped),
    'rise_with_stand_in': np.asarray(np.nan if replaced is None else replaced),
    'rise_of_layer': np.asarray(alone),
  }
  return probe_types.Finding(arrays, reading, draw)


def fewer_experts(context: probe_types.Context) -> probe_types.Finding:
  """Figure 5: every K from 1 to that of training."""
  subject, base = context.sample, context.bits_per_byte
  moe = subject.cfg.model.moe
  if moe.num_experts_per_tok < 2:
    raise probe_types.NotApplicableError('one routed expert per token: there are no fewer')
  if not router_traits.of(moe).uses_selection:
    raise probe_types.NotApplicableError(
      f'router {moe.router!r} does not take the best K of a token, so K cannot be lowered'
    )
  counts = list(range(1, moe.num_experts_per_tok + 1))
  bits = [interventions.with_fewer(subject, k).bits_per_byte for k in counts[:-1]] + [base]
  behind = [k for k, value in zip(counts, bits) if value > base + 0.01]
  enough = max(behind, default=0) + 1
  reading = (
    f'With half of the routed experts, {counts[len(counts) // 2 - 1]} of '
    f'{moe.num_experts_per_tok}, held-out bits per byte are {bits[len(counts) // 2 - 1]:.3f}, '
    f'with all {base:.3f}, with one {bits[0]:.3f}. From {enough} on they are within 0.01 of all.'
  )

  def draw(fig: figure.Figure):
    axes = fig.subplots()
    axes.plot(counts, bits, 'o-', color=plots.BLUE)
    axes.set_xticks(counts)
    axes.set_xlabel('routed experts per token at evaluation')
    axes.set_ylabel('held-out bits per byte')

  arrays = {'num_experts_per_tok': np.asarray(counts), 'bits_per_byte': np.asarray(bits)}
  return probe_types.Finding(arrays, reading, draw, (6.0, 3.8))
