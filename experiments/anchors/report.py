"""A record as text and as one HTML file with its figures."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.anchors import claims, pictures
from experiments.common import html_report
from moe_jax.analysis import paired

TITLES = {
  'flow': 'Flow to and from label words',
  'blocking': 'Label words isolated',
  'correlation': 'Attention to label words and the prediction',
  'reweighting': 'Anchor re-weighting',
  'compression': 'Demonstrations as a cache of few tokens',
  'confusion': 'Confusion predicted from keys',
  'experts': 'Experts of label words',
}


def mean(values: Sequence[float]) -> str:
  """A mean with its interval."""
  return paired.interval([float(v) for v in values]).text(3, sign=False)


def lines(record: Mapping[str, Any]) -> list[str]:
  """A line per claim, and what else a reader wants at once."""
  learned = claims.learned(record)
  out = [f'accuracy {mean(record["accuracy"])}, chance {record["chance"]:.3f}']
  for text, values in claims.differences(record).items():
    interval = paired.interval(values)
    out.append(f'{text}: {interval.text(3)}, {claims.verdict(interval, learned)}')
  return out + [readings(record)[part] for part in record if part in readings(record)]


def readings(record: Mapping[str, Any]) -> dict[str, str]:
  """A sentence on what only one figure says, by part."""
  out = {}
  if 'correlation' in record:
    auc = np.asarray(record['correlation']['auc'], float)
    if np.isnan(auc).any():
      out['correlation'] = 'The model predicts one label only, so that AUCROC is undefined.'
    else:
      top = int(np.argmax(auc))
      out['correlation'] = f'AUCROC is largest in layer {top + 1} of {len(auc)}, {auc[top]:.3f}.'
  if 'compression' in record:
    found, seconds = record['compression'], record['compression']['seconds']
    out['compression'] = (
      f'The cache of anchors keeps {found["kept_share"]:.0%} of the entries; a batch of queries '
      f'takes {seconds["whole"] * 1e3:.1f} ms with the demonstrations read anew, '
      f'{seconds["cached"] * 1e3:.1f} ms behind the whole cache and '
      f'{seconds["compressed"] * 1e3:.1f} ms behind the anchors: '
      f'{seconds["whole"] / seconds["compressed"]:.1f} and '
      f'{seconds["cached"] / seconds["compressed"]:.2f} times as fast.'
    )
  if 'confusion' in record:
    out['confusion'] = _confusion(record)
  if 'experts' in record:
    found = record['experts']
    apart = ', '.join(f'{value:.2f}' for value in found['separation_text'])
    out['experts'] = (
      f'Total variation between the experts of label words and of texts, by MoE layer: {apart}. '
      f'With {found["silenced"]} experts of every layer silenced, label loyalty is '
      + ', '.join(f'{mean(found["arms"][arm]["label_loyalty"])} ({arm})' for arm in found['arms'])
      + '.'
    )
  return out


def _confusion(record: Mapping[str, Any]) -> str:
  rho, p, count = claims.rank_correlation(record)
  layer, total = record['confusion']['layer'] + 1, len(record['confusion']['pairs'])
  said = (
    f'Keys of layer {layer}: rank correlation of predicted and measured confusion over {count} '
  )
  if rho == rho:
    said += f'pairs {rho:.2f} (p = {p:.2g}; 1 = the order of the measured one).'
  else:
    said += 'pairs is undefined: it needs three pairs, not all of them told apart alike.'
  if count < total:
    said += f' The AUC of {total - count} pairs is undefined: no query was of one of the classes.'
  return said


def write(record: Mapping[str, Any], directory: pathlib.Path) -> list[pathlib.Path]:
  """Writes report.md, report.html and the figures of one model; returns their paths."""
  drawn = pictures.draw(record, directory)
  settings = record['settings']
  blocks: list[html_report.Block] = [
    html_report.Heading(f'Label words as anchors: {record["task"]}, step {record["step"]}', 1),
    html_report.Text(
      f'{settings["sets"]} demonstration sets with {settings["queries"]} queries each; accuracy '
      f'{mean(record["accuracy"])}, chance {record["chance"]:.3f}. Intervals are 95 %, by Student '
      'over demonstration sets; that of AUCROC is a bootstrap over them. They say nothing of '
      'another training run.'
    ),
    html_report.Heading('Claims of the paper'),
    table(record),
  ]
  sentences = readings(record)
  for part, path in drawn.items():
    blocks.append(html_report.Heading(TITLES[part]))
    if part in sentences:
      blocks.append(html_report.Text(sentences[part]))
    blocks.append(html_report.Picture(path, TITLES[part]))
  return [*html_report.write(blocks, directory), *drawn.values()]


def table(record: Mapping[str, Any]) -> html_report.Table:
  """The claims with their differences; above 0 is what the paper says."""
  rows, learned = [], claims.learned(record)
  for text, values in claims.differences(record).items():
    interval = paired.interval(values)
    rows.append((text, interval.text(3), str(len(values)), claims.verdict(interval, learned)))
  return html_report.Table(('difference, above 0 as the paper has it', '95 %', 'n', ''), rows)
