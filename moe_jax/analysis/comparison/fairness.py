"""Whether two groups may be compared seed by seed, and what each of them costs."""

from collections.abc import Sequence

from moe_jax.analysis.comparison import groups as groups_lib
from moe_jax.config import schema
from moe_jax.planning import describe, matched_budgets
from moe_jax.runs import trained_run

# What decides which tokens a step sees, beside the seed and the text; and what a loss is of.
ORDER = (
  'train.batch_size',
  'train.batch_ramp',
  'model.max_seq_len',
  'data.heldout_fraction',
  'data.fim_rate',
  'data.mixture',
  'data.chat_format',
  'objective.kind',
)
_UNKNOWN_TEXT = (None, '', trained_run.NO_DATA)  # of a record without one, and of imported weights


def seeds(first: groups_lib.Group, second: groups_lib.Group) -> list[int]:
  """The seeds that both groups have."""
  return [seed for seed in first.runs if seed in second.runs]


def reasons(first: groups_lib.Group, second: groups_lib.Group) -> list[str]:
  """Why no difference of two groups can be called real; empty if their pairs are pairs.

  A pair is two runs with the same seed, tokenizer, text and order of it, and schedules of one
  length.
  """
  pairs = [(first.runs[seed], second.runs[seed]) for seed in seeds(first, second)]
  if not pairs:
    return ['they have no seed in common']
  found = []
  if any(a.tokenizer != b.tokenizer for a, b in pairs):
    found.append('the tokenizers differ')
  if not all(a.tokenizer and b.tokenizer for a, b in pairs):
    found.append('a tokenizer.json is missing, so that tokenizers may differ')
  if any(run.data_fingerprint in _UNKNOWN_TEXT for pair in pairs for run in pair):
    found.append(
      'the text of a run is not known (data_fingerprint of config.json), so it may differ'
    )
  elif any(a.data_fingerprint != b.data_fingerprint for a, b in pairs):
    found.append('the text differs (data_fingerprint)')
  for key in ORDER:
    values = [_value(one.cfg, key) for one in (first, second)]
    if values[0] != values[1]:
      found.append(f'the data order differs ({key}: {values[0]} and {values[1]})')
  lengths = [one.cfg.train.num_steps for one in (first, second)]
  if lengths[0] != lengths[1]:
    found.append(
      f'the schedules differ in length (train.num_steps: {lengths[0]} and {lengths[1]}), so they '
      'are not comparable at equal steps'
    )
  return found


def _value(cfg: schema.Config, key: str) -> object:
  value: object = cfg
  for part in key.split('.'):
    value = getattr(value, part)
  return value


def budgets(groups: Sequence[groups_lib.Group]) -> list[dict[str, float]]:
  """{quantity: value} of each group: parameters, FLOPs, bytes, as `experiments.describe` counts."""
  described = [describe.describe(one.cfg, one.name, with_modules=False) for one in groups]
  return [describe.costs(one) for one in described]


def budget_rows(columns: Sequence[dict[str, float]], reference: int = 0) -> list[list[str]]:
  """A row per quantity: each group's value, with its difference from that of one group."""
  rows = []
  for name, base in columns[reference].items():
    row = [name]
    for i, column in enumerate(columns):
      mark = '' if i == reference else matched_budgets.difference(base, column[name])
      row.append(_cell(f'{column[name]:,.0f}', mark))
    rows.append(row)
  return rows


def _cell(value: str, mark: str) -> str:
  """'12', '12 =' or '12 (+3.4 %)'."""
  if mark in ('', 'equal'):
    return f'{value} =' if mark else value
  return f'{value} ({mark.partition("(")[2].rstrip(")") or mark})'


def unmatched(columns: Sequence[dict[str, float]], tolerance: float = 0.005) -> list[str]:
  """The quantities in which groups differ by more than a share of the first group's value."""
  return [
    name
    for name, first in columns[0].items()
    if any(abs(column[name] - first) > tolerance * abs(first) for column in columns)
  ]
