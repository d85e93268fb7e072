"""The claims about the loss as functions of the tokens trained on: curves, pictures, sentences."""

import csv
import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.common import html_report
from experiments.routing_ablation import arms, measure
from moe_jax.analysis import difference_curves, difference_pictures, paired
from moe_jax.config import schema
from moe_jax.training import optim

MAIN = (('deepseekmoe', 'gshard'), ('m4', 'gshard'))  # arm and baseline of the main claim
CAPTION = (
  'training loss of the arm minus that of its baseline, same seed and batch, averaged over '
  'windows; mean over seeds, band of its 95 % interval, and the crossover with its own'
)


def curve(
  claim: arms.Claim, results: measure.Results, configs: Mapping[str, schema.Config]
) -> difference_curves.Curve | None:
  """Differences of a claim's two arms in training loss.

  None for claims about other figures, and where no logged loss is finite in every run.
  """
  if claim.figure != arms.BITS or not claim.baseline:
    return None
  cfg, names = configs[claim.arm], (claim.arm, claim.baseline)
  seeds = measure.common(results, *names)
  values, baseline = (measure.curves(results, name, 'loss', seeds) for name in names)
  if values is None or baseline is None:
    return None
  if not np.isfinite(values[1] - baseline[1]).all(axis=0).any():
    return None
  tokens = optim.tokens_at(cfg.train, cfg.model.max_seq_len, values[0].tolist())
  return difference_curves.curve(tokens, values[1], baseline[1])


def moves(
  claim: arms.Claim,
  found: difference_curves.Curve | None,
  difference: paired.Interval,
  results: measure.Results,
  configs: Mapping[str, schema.Config],
) -> bool:
  """Whether the verdict on held-out bits per byte waits, see `difference_curves.RULE`.

  The slope is that of the training loss, in bits per byte as the held-out text has them per nat.
  """
  if found is None or len(found.tokens) < difference_curves.MIN_POINTS:
    return False
  if not difference_curves.same_rates(*(configs[n].optim for n in (claim.arm, claim.baseline))):
    return False
  seeds = measure.common(results, claim.arm, claim.baseline)
  bits, nats = (measure.column(results, claim.baseline, key, seeds) for key in (arms.BITS, 'loss'))
  if bits is None or nats is None:
    return False
  slope = difference_curves.outcome(found, claim.direction).slope
  return difference_curves.still_moves(
    difference,
    difference_curves.scaled(slope, sum(bits) / sum(nats)),
    claim.direction,
    arms.EQUAL_MARGIN * float(np.mean(bits)),
  )


def _title(graded: Any) -> str:
  return f'{graded.claim.arm} − {graded.claim.baseline}'


def draw(out: pathlib.Path, graded: Sequence[Any]) -> list[html_report.Picture]:
  """Draws `difference.png`, of the main claim, and `differences.png`, of all of them.

  Args:
    out: directory of the pictures.
    graded: `report.Graded` of the claims.
  """
  panels = {
    (g.claim.arm, g.claim.baseline): difference_pictures.Panel(_title(g), g.curve, g.verdict)
    for g in graded
    if g.curve is not None
  }
  drawn = []
  for name, keys, columns, of in (
    ('difference.png', MAIN, 2, 'The main claim'),
    ('differences.png', tuple(panels), 3, 'Every claim about the loss'),
  ):
    chosen = [panels[key] for key in keys if key in panels]
    if chosen:
      difference_pictures.draw(out / name, chosen, columns=columns)
      drawn.append(html_report.Picture(out / name, f'{of} against tokens: {CAPTION}'))
  return drawn


def blocks(graded: Sequence[Any]) -> list[html_report.Block]:
  """A line per claim about the loss: where it stands, how it moves, where it crosses zero."""
  lines = [
    f'`{g.claim.arm}` against `{g.claim.baseline}`: '
    f'{difference_curves.sentence(g.curve, g.verdict)}.'
    for g in graded
    if g.curve is not None
  ]
  if not lines:
    return []
  words = (
    'Verdicts are those above, on the held-out text; differences and crossovers are of the '
    'training loss, in nats per token. Negative: the arm is better than its baseline. Within a run '
    'a difference also moves as the learning rate falls, most where the rates of the arms differ; '
    '`experiments.routing_ablation.lengths` compares whole runs of several lengths.'
  )
  heading = html_report.Heading('Against tokens')
  return [heading, html_report.Text(words), html_report.Bullets(lines)]


def csv_text(graded: Sequence[Any]) -> str:
  """A line per claim about the loss and window of steps."""
  text = io.StringIO()
  writer = csv.writer(text, lineterminator='\n')
  writer.writerow(['arm', 'baseline', 'tokens', 'mean', 'low', 'high', 'by seed'])
  for g in graded:
    if g.curve is None:
      continue
    for at, one, column in zip(
      g.curve.tokens, difference_curves.band(g.curve), g.curve.differences.T
    ):
      ends = [f'{v:.5f}' for v in (one.mean, one.low, one.high)]
      seeds = ' '.join(f'{v:.5f}' for v in column)
      writer.writerow([g.claim.arm, g.claim.baseline, round(at), *ends, seeds])
  return text.getvalue()


def runs_text(results: measure.Results) -> str:
  """The logged steps of every run as CSV: arm, seed, step, training loss, MaxVio."""
  text = io.StringIO()
  writer = csv.writer(text, lineterminator='\n')
  writer.writerow(['arm', 'seed', 'step', 'loss', 'max_vio'])
  for arm, runs in results.items():
    for seed, run in runs.items():
      curve = run['curve'] or {'step': [], 'loss': [], 'max_vio': []}
      for step, loss, max_vio in zip(curve['step'], curve['loss'], curve['max_vio']):
        cells = [
          '' if value is None else f'{value:{form}}'
          for value, form in ((loss, '.6g'), (max_vio, '.4g'))
        ]
        writer.writerow([arm, seed, step, *cells])
  return text.getvalue()
