"""Do the arms that are compared cost the same? Asked before anything is trained."""

import math
from collections.abc import Mapping, Sequence

from experiments.routing_ablation import arms
from moe_jax import errors
from moe_jax.config import schema
from moe_jax.planning import describe as describe_lib
from moe_jax.planning import matched_budgets
from moe_jax.training import optim

# Routers grow with the number of experts, and the papers count them nowhere.
LABELS = {
  'total': 'parameters without routers',
  'activated': 'activated parameters without routers',
  'cache': 'KV cache bytes / token',
}


def quantities(described: describe_lib.Description) -> dict[str, int]:
  """What comparisons hold equal, by the keys of `LABELS`."""
  return {
    'total': described.parameters.total - described.parameters.router,
    'activated': described.activated.total - described.activated.router,
    'cache': described.kv_cache_bytes_per_token,
  }


def describe(configs: Mapping[str, schema.Config]) -> dict[str, describe_lib.Description]:
  """What `experiments.describe` says of every arm."""
  return {name: describe_lib.describe(cfg, name) for name, cfg in configs.items()}


def tokens(cfg: schema.Config) -> int:
  """Tokens that a whole run is trained on."""
  return optim.tokens_at(cfg.train, cfg.model.max_seq_len, [cfg.train.num_steps])[0]


def rows(described: Mapping[str, describe_lib.Description]) -> list[list[str]]:
  """One row per arm, `HEADER` above."""
  return [
    [
      name,
      *(f'{value:,}' for value in quantities(d).values()),
      f'{d.parameters.router:,}',
      f'{d.train_flops_per_token:,}',
      f'{d.all_to_all_bytes_per_token:,.0f}',
    ]
    for name, d in described.items()
  ]


HEADER = [
  'arm',
  *LABELS.values(),
  'routers',
  'training FLOPs / token',
  'all-to-all bytes / token',
]


def check(described: Mapping[str, describe_lib.Description]) -> list[str]:
  """One line per quantity that a claim or a sweep needs to match.

  Raises:
    errors.InputError: some do not match; names them all.
  """
  lines, wrong = [], []
  for arm, baseline, keys, tolerance in _pairs(list(described)):
    first, second = (quantities(described[name]) for name in (baseline, arm))
    for key in keys:
      difference = matched_budgets.difference(first[key], second[key])
      line = f'{arm} against {baseline}: {LABELS[key]}: {difference}'
      lines.append(line)
      if not math.isclose(first[key], second[key], rel_tol=tolerance):
        wrong.append(f'{line}, at most {tolerance:.1%} is fair')
  errors.require(
    not wrong,
    f'--arms: these arms are compared and must match: {"; ".join(wrong)}. Correct their config '
    'pages, or leave one of each pair out with --arms',
  )
  return lines


def _pairs(present: Sequence[str]) -> list[tuple[str, str, tuple[str, ...], float]]:
  """(arm, baseline, what must match, tolerance) of all comparisons between these arms."""
  found = [(c.arm, c.baseline, c.matched, c.tolerance) for c in arms.CLAIMS]
  for sweep in arms.SWEEPS:
    first, *others = [name for name in sweep.points if name in present] or ['']
    found += [(name, first, sweep.matched, 0.005) for name in others]
  both = [pair for pair in found if pair[0] in present and pair[1] in present and pair[2]]
  return list(dict.fromkeys(both))


def text(
  described: Mapping[str, describe_lib.Description],
  configs: Mapping[str, schema.Config],
  num_seeds: int,
) -> str:
  """The table for a terminal, and what training all of it takes."""
  table = [HEADER, *rows(described)]
  widths = [max(map(len, column)) for column in zip(*table)]
  lines = ['  '.join(cell.rjust(w) for cell, w in zip(row, widths)) for row in table]
  per_run = {name: tokens(cfg) for name, cfg in configs.items() if name in described}
  flops = num_seeds * sum(d.train_flops_per_token * per_run[name] for name, d in described.items())
  total = (
    f'{len(described)} arms x {num_seeds} seeds, {min(per_run.values()):,} to '
    f'{max(per_run.values()):,} tokens each: {flops:.2e} FLOPs'
  )
  return '\n'.join([*lines, total])
