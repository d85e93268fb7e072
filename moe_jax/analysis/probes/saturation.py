"""How much of the routing of earlier checkpoints is still there."""

import numpy as np
from matplotlib import figure

from moe_jax.analysis import observations
from moe_jax.analysis.probes import probe_types
from moe_jax.config import router_traits


def kept_share(before: np.ndarray, after: np.ndarray, num_experts: int) -> float:
  """The share of the experts chosen in `before` that the same tokens choose in `after`.

  Args:
    before: [T, K] in 0..E; E = no expert.
    after: [T, K], of as many choices or of another number.
    num_experts: E.
  """
  same = (before[:, :, None] == after[:, None, :]).any(axis=2)
  real = before < num_experts
  return float((same & real).sum() / max(real.sum(), 1))


def saturation(context: probe_types.Context) -> probe_types.Finding:
  """Of every other checkpoint's top K, how many this one still chooses, token by token."""
  if not context.others:
    raise probe_types.NotApplicableError(
      'the workdir holds no second checkpoint to compare with; keep some with '
      'config.checkpoint.keep_every'
    )
  now = context.observations
  steps = sorted(context.others)
  shares = np.array([_compare(context, context.others[step], now) for step in steps])
  moe = context.subject.cfg.model.moe
  k = router_traits.of(moe).per_token(moe)
  chance = k / moe.num_experts
  names = context.layer_names()
  reading = (
    f'Of the top {k} experts of step {steps[0]}, the tokens still choose '
    f'{probe_types.per_layer(100 * shares[0], names, "{:.0f} %")} at step {context.step}'
    + (
      f', of those of step {steps[-1]} {probe_types.per_layer(100 * shares[-1], names, "{:.0f} %")}'
      if len(steps) > 1
      else ''
    )
    + f'; by chance it would be {100 * chance:.0f} %.'
  )

  def draw(fig: figure.Figure):
    axes = fig.subplots()
    for i, name in enumerate(names):
      line = [*(100 * shares[:, i]), 100.0]
      axes.plot([*steps, context.step], line, 'o-', label=name, color=f'C{i % 10}')
    axes.axhline(100 * chance, color='0.6', lw=1, ls='--')
    axes.annotate('chance', (steps[0], 100 * chance), xytext=(2, 3), textcoords='offset points')
    axes.set_ylim(0, 105)
    axes.set_xlabel('step of the checkpoint')
    axes.set_ylabel(f'of its top K also chosen at step {context.step}, %')
    if len(names) <= 10:
      axes.legend(frameon=False, fontsize=8)

  arrays = {'steps': np.asarray(steps), 'kept_share': shares, 'chance': np.asarray(chance)}
  return probe_types.Finding(arrays, reading, draw, (6.5, 4.0))


def _compare(
  context: probe_types.Context, variables, now: observations.Observations
) -> list[float]:
  """[layers] against an other checkpoint."""
  then = observations.collect(context.subject._replace(variables=variables), context.num_tokens)
  return [
    kept_share(a, b, now.num_experts)
    for a, b in zip(then.of_tokens(then.expert_idx), now.of_tokens(now.expert_idx))
  ]
