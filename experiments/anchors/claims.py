"""What the paper claims, as differences that a model's figures give, one per unit of the interval.

The unit is a demonstration set, or for flow a prompt with a set of its own; over training seeds it
is a run, with the mean of its units.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from moe_jax.analysis import paired

Figures = Mapping[str, Any]


class Claim(NamedTuple):
  """A difference that is above 0 if the paper's finding holds here."""

  text: str
  part: str  # of `measure.PARTS`
  # Figures of the part -> one number per unit; none where the figures are not defined.
  values: Callable[[Figures], Sequence[float]]


def thirds(num_layers: int) -> tuple[slice, slice]:
  """The first and the last third of the layers, at least one each."""
  size = max(1, num_layers // 3)
  return slice(size), slice(num_layers - size, num_layers)


def blocked(figures: Figures) -> int:
  """The number of blocked layers that the claims look at: a third of six, five of many."""
  counts = sorted({int(key.split('/')[1]) for key in figures})
  return counts[min(1, len(counts) - 1)] if counts[-1] < 5 else 5


def _flow(which: int, over: str, under: str) -> Callable[[Figures], Sequence[float]]:
  def values(figures: Figures) -> Sequence[float]:
    shares = {key: np.asarray(figures['abs_of_sum'][key]) for key in (over, under)}
    part = thirds(shares[over].shape[1])[which]
    return (shares[over] - shares[under])[:, part].mean(axis=1).tolist()

  return values


def _loyalty(over: str, under: str) -> Callable[[Figures], Sequence[float]]:
  def values(figures: Figures) -> Sequence[float]:
    count = blocked(figures)
    one, two = (figures[key.format(count)]['label_loyalty'] for key in (over, under))
    return (np.asarray(one) - two).tolist()

  return values


def _compressed(baseline: str) -> Callable[[Figures], Sequence[float]]:
  def values(figures: Figures) -> Sequence[float]:
    arms = figures['arms']
    one, two = (arms[key]['label_loyalty'] for key in ('hidden_anchor', baseline))
    return (np.asarray(one) - two).tolist()

  return values


def _deeper(figures: Figures) -> Sequence[float]:
  auc = np.asarray(figures['auc'], float)
  if np.isnan(auc).any():
    return []
  first, last = thirds(len(auc))
  return [float(auc[last].mean() - auc[first].mean())]


def _silenced(figures: Figures) -> Sequence[float]:
  arms = figures['arms']
  return (np.asarray(arms['random']['label_loyalty']) - arms['label']['label_loyalty']).tolist()


CLAIMS = {
  'shallow_flow': Claim(
    'first third of layers: S_wp above S_pq (share of the three)', 'flow', _flow(0, 'wp', 'pq')
  ),
  'deep_flow': Claim(
    'last third of layers: S_pq above S_wp (share of the three)', 'flow', _flow(1, 'pq', 'wp')
  ),
  'label_words_matter': Claim(
    'label loyalty in first layers: random words blocked, less label words blocked',
    'blocking',
    _loyalty('first/{}/random', 'first/{}/label'),
  ),
  'early_layers_matter': Claim(
    'label loyalty with label words blocked: in last layers, less in first layers',
    'blocking',
    _loyalty('last/{}/label', 'first/{}/label'),
  ),
  'deep_attention_tells': Claim(
    'AUCROC: last third of layers, less first third', 'correlation', _deeper
  ),
  'anchors_beat_text': Claim(
    'label loyalty: hidden anchors, less anchors as text', 'compression', _compressed('text_anchor')
  ),
  'anchors_beat_random': Claim(
    'label loyalty: hidden anchors, less random words',
    'compression',
    _compressed('hidden_random'),
  ),
  'anchors_beat_best_random': Claim(
    'label loyalty: hidden anchors, less the best of random words',
    'compression',
    _compressed('hidden_random_top'),
  ),
  'experts_of_labels_matter': Claim(
    'label loyalty: random experts silenced, less those that label words choose',
    'experts',
    _silenced,
  ),
}


def reweighting(record: Figures, rate: str, baseline: str = 'plain') -> list[float]:
  """Accuracy with learned factors less that of the baseline, per set."""
  found = record['reweighting']
  other = record['accuracy'] if baseline == 'plain' else found['more_shots']['accuracy']
  return (np.asarray(found[rate]['accuracy']) - other).tolist()


def differences(record: Figures) -> dict[str, list[float]]:
  """Of every claim whose part was measured and is defined: text -> one number per unit."""
  measured = ((c.text, c.values(record[c.part])) for c in CLAIMS.values() if c.part in record)
  out = {text: list(values) for text, values in measured if len(values)}
  found = record.get('reweighting', {})
  for rate in (key for key in found if key.startswith('rate_')):
    name = f're-weighting at rate {rate.removeprefix("rate_")}'
    out[f'accuracy: {name}, less plain'] = reweighting(record, rate)
    if 'more_shots' in found:
      shots = found['more_shots']['shots']
      text = f'accuracy: {name}, less {shots} shots per class'
      out[text] = reweighting(record, rate, 'more_shots')
  rho = rank_correlation(record).rho if 'confusion' in record else float('nan')
  if rho == rho:  # else no class was confused with another, or too few pairs were asked about
    out['confusion: rank correlation of that predicted from keys and the measured'] = [rho]
  return out


class RankCorrelation(NamedTuple):
  """Spearman's, of predicted and measured confusion over pairs of classes."""

  rho: float  # NaN for none
  p: float
  pairs: int


def asked_pairs(record: Figures) -> list[Sequence[Any]]:
  """The pairs of classes whose confusion was measured: queries of both were asked."""
  # Records of older versions have NaN in place of null.
  pairs = record['confusion']['pairs']
  return [pair for pair in pairs if pair[3] is not None and pair[3] == pair[3]]


def rank_correlation(record: Figures) -> RankCorrelation:
  """Whether classes whose keys are near each other are confused; 1 = the measured order."""
  pairs = asked_pairs(record)
  if len(pairs) < 3 or len({pair[3] for pair in pairs}) < 2:
    return RankCorrelation(float('nan'), float('nan'), len(pairs))
  found: Any = stats.spearmanr([pair[2] for pair in pairs], [pair[3] for pair in pairs])
  return RankCorrelation(float(found.statistic), float(found.pvalue), len(pairs))


def learns(accuracy: Sequence[float], chance: float) -> bool:
  """Whether the interval of the accuracy lies above chance; else no claim says anything."""
  return paired.interval([float(value) for value in accuracy]).low > chance


def learned(record: Figures) -> bool:
  """`learns` of what was measured of a run, by its demonstration sets."""
  return learns(record['accuracy'], record['chance'])


def are_anchors(record: Figures) -> bool:
  """Whether label words are anchors of a run, by its own demonstration sets.

  It has learned; to blind them in first layers costs more than to blind random words; and they and
  the formatting, as a cache, keep more than the best of random words do. Both intervals above 0.
  """
  words, cache = CLAIMS['label_words_matter'], CLAIMS['anchors_beat_best_random']
  found = [paired.interval(list(c.values(record[c.part]))) for c in (words, cache)]
  return learned(record) and all(interval.low > 0 for interval in found)


def verdict(interval: paired.Interval, learned: bool) -> str:
  """What an interval says of a claim; nothing of a model that does not use its demonstrations."""
  if not learned:
    return 'not judged: accuracy is not above chance'
  return 'one value' if interval.num_seeds == 1 else paired.verdict(interval, 'higher')
