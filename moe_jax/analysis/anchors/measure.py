"""Everything that is measured of one model on one task, as figures per demonstration set.

Axis letters: X layers, W label words.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_jax import errors, trees
from moe_jax.analysis.anchors import (
  blocking,
  compress,
  confusion,
  correlation,
  expert_use,
  prompts,
  reweight,
  saliency,
  tasks,
)
from moe_jax.config import schema
from moe_jax.data import tokenizer as tokenizer_lib
from moe_jax.inference import cached_model

MORE_SHOTS = 4  # auxiliary examples per class, which 'more shots' has as demonstrations
RESAMPLED = 100_000  # number of the first set of those that are drawn for every example
Figures = dict[str, Any]


class Subject(NamedTuple):
  """A trained model."""

  cfg: schema.ModelConfig
  variables: trees.Variables
  tokenizer: tokenizer_lib.Tokenizer


class Settings(NamedTuple):
  """How much is measured."""

  sets: int = 24  # demonstration sets, over which intervals are
  queries: int = 16  # of each
  size: int = 32  # prompts at a time
  random_draws: int = 20  # random token sets of compression, of which the best is reported too
  seed: int = 0


class Prepared(NamedTuple):
  """The prompts of all sets, their rows end to end, `settings.queries` of each."""

  subject: Subject
  task: tasks.Task
  settings: Settings
  sets: tuple[tasks.DemonstrationSet, ...]
  batch: prompts.Batch
  whole: blocking.Predictions

  def per_set(self, values: np.ndarray) -> list[float]:
    """Means over the queries of each set: [B] -> one number per set."""
    return values.reshape(self.settings.sets, -1).mean(axis=1).round(5).tolist()

  @property
  def model(self) -> tuple[schema.ModelConfig, trees.Variables]:
    return self.subject.cfg, self.subject.variables


def prepare(subject: Subject, task: tasks.Task, settings: Settings) -> Prepared:
  """Draws the sets, writes their prompts and asks the model.

  Raises:
    errors.InputError: a prompt is longer than the model's rows.
  """
  found = tuple(
    task.draw(settings.seed + i, MORE_SHOTS, settings.queries) for i in range(settings.sets)
  )
  batch = joined(subject, task, found)
  whole = blocking.predict(subject.cfg, subject.variables, batch, size=settings.size)
  return Prepared(subject, task, settings, found, batch, whole)


def joined(
  subject: Subject,
  task: tasks.Task,
  found: Sequence[tasks.DemonstrationSet],
  demonstrations: Callable[[tasks.DemonstrationSet], Sequence[prompts.Example]] | None = None,
  queries: Callable[[tasks.DemonstrationSet], Sequence[prompts.Example]] | None = None,
) -> prompts.Batch:
  """The prompts of several sets, by default of their own demonstrations and queries.

  Raises:
    errors.InputError: a prompt is longer than the model's rows.
  """
  rows, label_ids = [], []
  for one in found:
    encoder = prompts.Encoder(subject.tokenizer, task.template, one.labels, f'--task={task.name}')
    shown = demonstrations(one) if demonstrations else one.demonstrations
    for query in queries(one) if queries else one.queries:
      rows.append(encoder.prompt(shown, query))
      label_ids.append(encoder.label_ids)
  longest = max(len(row.ids) for row in rows)
  limit = subject.cfg.max_seq_len
  errors.require(
    longest <= limit,
    f'--task={task.name}: a prompt of {len(rows[0].places)} demonstrations has {longest} tokens, '
    f'and the model reads config.model.max_seq_len={limit}; give shorter examples',
  )
  return prompts.stack(rows, label_ids, min(-(-longest // 8) * 8, limit))


def run(
  prepared: Prepared, parts: Sequence[str] = (), say: Callable[[str], object] = lambda line: None
) -> Figures:
  """All figures by part, those of `PARTS` that are named or all that the model has.

  What is per set is a list with a number for each.
  """
  out: Figures = {
    'accuracy': prepared.per_set(prepared.whole.accuracy(prepared.batch)),
    'chance': 1 / prepared.task.num_classes,
  }
  for name, part in PARTS.items():
    if name in (parts or PARTS) and (name != 'experts' or prepared.subject.cfg.is_moe):
      say(name)
      out[name] = part(prepared)
  return out


def flow(prepared: Prepared) -> Figures:
  """S_wp, S_pq, S_ww by layer, of prompts that each have demonstrations of their own."""
  settings, task = prepared.settings, prepared.task
  count = 4 * settings.sets
  found = [task.draw(RESAMPLED + settings.seed + i, 0, 1) for i in range(count)]
  batch = joined(prepared.subject, task, found)
  out = {}
  for name, per_head in (('abs_of_sum', False), ('sum_of_abs', True)):
    metrics = saliency.measure(*prepared.model, batch, size=settings.size // 2, per_head=per_head)
    # Losses, and so gradients, differ in size from prompt to prompt: only proportions are compared.
    total = sum(metrics)
    shares = {k: v / np.maximum(total, 1e-30) for k, v in metrics._asdict().items()}
    out[name] = {k: v.T.round(5).tolist() for k, v in shares.items()}  # [prompts, X]
    out[name]['raw'] = {k: v.mean(axis=1).tolist() for k, v in metrics._asdict().items()}
  return out


def blocked_counts(num_layers: int) -> tuple[int, ...]:
  """How many of the first or last layers are blocked; the paper's 1, 3, 5, 7 of 48."""
  counts = (1, 2, 3) if num_layers < 12 else (1, 3, 5, 7)
  return tuple(n for n in counts if 2 * n <= num_layers)


def blocking_part(prepared: Prepared) -> Figures:
  """Loyalties and accuracy with label words, or random ones, isolated in first or last layers."""
  settings, layers = prepared.settings, prepared.subject.cfg.num_layers
  out = {}
  for count in blocked_counts(layers):
    for end in ('first', 'last'):
      which = range(count) if end == 'first' else range(layers - count, layers)
      for words in ('label', 'random'):
        rng = np.random.default_rng([settings.seed, count, end == 'last'])

        def hidden(rows: slice, which=which, words=words, rng=rng) -> np.ndarray:
          part = prepared.batch.take(rows)
          if words == 'label':
            return blocking.hide_label_words(part, which, layers)
          return blocking.hide_random_words(part, which, layers, rng)

        found = blocking.predict(*prepared.model, prepared.batch, size=settings.size, hidden=hidden)
        out[f'{end}/{count}/{words}'] = loyalties(prepared, found)
  return out


def loyalties(prepared: Prepared, found: blocking.Predictions) -> Figures:
  """Agreement with the whole model, and accuracy, per set."""
  return {
    'label_loyalty': prepared.per_set(blocking.label_loyalty(found, prepared.whole)),
    'word_loyalty': prepared.per_set(blocking.word_loyalty(found, prepared.whole)),
    'accuracy': prepared.per_set(found.accuracy(prepared.batch)),
  }


def correlation_part(prepared: Prepared, resamples: int = 200) -> Figures:
  """AUCROC and R by layer, with percentiles of a bootstrap over sets.

  They are None where the model predicts one label only.
  """
  settings = prepared.settings
  scores = correlation.scores(*prepared.model, prepared.batch, size=settings.size)
  labels = prepared.whole.label

  def of_rows(rows: np.ndarray) -> np.ndarray:
    return np.asarray([correlation.multiclass_auc(one[rows], labels[rows]) for one in scores])

  rng, places = np.random.default_rng(settings.seed), np.arange(len(labels))
  by_set = places.reshape(settings.sets, -1)
  drawn = np.asarray(
    [
      of_rows(by_set[rng.integers(settings.sets, size=settings.sets)].ravel())
      for _ in range(resamples)
    ]
  )
  aucs = of_rows(places)
  if np.isnan(aucs).any():  # one label is predicted, and so in every resample
    low = high = aucs
  else:
    low, high = np.nanpercentile(drawn, [2.5, 97.5], axis=0)
  return {
    'auc': _defined(aucs),
    'low': _defined(low),
    'high': _defined(high),
    'cumulative': _defined(correlation.cumulative(aucs)),
  }


def _defined(values: np.ndarray) -> list[float | None]:
  """Numbers by layer, None for NaN, which JSON has not."""
  return [None if np.isnan(value) else float(value) for value in values]


def reweight_part(prepared: Prepared) -> Figures:
  """Accuracy with learned factors, at the paper's and its code's rate, and with more shots."""
  subject, settings, sets = prepared.subject, prepared.settings, prepared.sets
  flat = joined(subject, prepared.task, sets, queries=lambda one: one.more)
  each = len(sets[0].more)
  examples = prompts.Batch(
    *(np.moveaxis(a.reshape(len(sets), each, *a.shape[1:]), 0, 1) for a in flat)
  )
  out: Figures = {}
  for rate in (reweight.PAPER_RATE, reweight.REPOSITORY_RATE):
    fitted = reweight.fit(*prepared.model, examples, rate=rate, seed=settings.seed)
    beta = np.repeat(fitted.beta, settings.queries, axis=0)
    found = reweight.predict(*prepared.model, prepared.batch, beta, size=settings.size // 2)
    out[f'rate_{rate:g}'] = {
      'accuracy': prepared.per_set(found.accuracy(prepared.batch)),
      'losses': fitted.losses.mean(axis=1).round(5).tolist(),
    }
  shots, batch = more_shots(prepared)
  if shots > 1:
    found = blocking.predict(*prepared.model, batch, size=settings.size // 2)
    out['more_shots'] = {'accuracy': prepared.per_set(found.accuracy(batch)), 'shots': shots}
  return out


def more_shots(prepared: Prepared) -> tuple[int, prompts.Batch]:
  """(shots per class, prompts): as many of the further examples as go into a row."""
  classes = prepared.task.num_classes
  for shots in range(1 + MORE_SHOTS, 1, -1):

    def shown(one: tasks.DemonstrationSet, shots=shots) -> list[prompts.Example]:
      more = [one.more[k * MORE_SHOTS + i] for i in range(shots - 1) for k in range(classes)]
      return [*one.demonstrations, *more]

    try:
      return shots, joined(prepared.subject, prepared.task, prepared.sets, shown)
    except errors.InputError:
      continue  # longer than a row: one less
  return 1, prepared.batch


def compress_part(prepared: Prepared) -> Figures:
  """Loyalties, accuracy and seconds with part of the demonstrations' cache, and baselines."""
  subject, settings, batch = prepared.subject, prepared.settings, prepared.batch
  weights = cached_model.unstack(subject.cfg, subject.variables)

  def kept(mask: np.ndarray, **options: bool) -> blocking.Predictions:
    return compress.predict(subject.cfg, weights, batch, mask, size=settings.size, **options)

  out: Figures = {'everything': loyalties(prepared, kept(compress.demonstrations(batch)))}
  out['hidden_anchor'] = loyalties(prepared, kept(compress.anchors(batch)))
  out['hidden_anchor_near'] = loyalties(
    prepared, kept(compress.anchors(batch), keep_distances=False)
  )
  out['hidden_labels_only'] = loyalties(prepared, kept(compress.labels_only(batch)))
  texts = compress.demonstrations(batch) & (batch.kinds == prompts.TEXT)
  text_anchor = compress.without(batch, texts)
  found = blocking.predict(*prepared.model, text_anchor, size=settings.size)
  out['text_anchor'] = loyalties(prepared, found)
  draws = []
  for number in range(settings.random_draws):
    rng = np.random.default_rng([settings.seed, number])
    draws.append(loyalties(prepared, kept(compress.random_words(batch, rng))))
  out['hidden_random'] = draws[0]
  best = np.argmax([one['label_loyalty'] for one in draws], axis=0)  # of every set
  out['hidden_random_top'] = {
    key: [draws[number][key][i] for i, number in enumerate(best)] for key in draws[0]
  }
  seconds = compress.measure_seconds(subject.cfg, weights, batch.take(slice(settings.size)))
  tokens = compress.anchors(batch).sum() / compress.demonstrations(batch).sum()
  return {'arms': out, 'seconds': seconds._asdict(), 'kept_share': float(tokens)}


def confusion_part(prepared: Prepared) -> Figures:
  """Predicted and measured confusion of every pair of classes, over all sets that have both."""
  settings, batch = prepared.settings, prepared.batch
  layer = confusion.deep_layer(prepared.subject.cfg.num_layers)
  states = confusion.states(*prepared.model, batch, layer, size=settings.size)
  predicted: dict[tuple[str, str], list[float]] = {}
  ratios: dict[tuple[str, str], list[confusion.Ratios]] = {}
  for number, one in enumerate(prepared.sets):
    rows = slice(number * settings.queries, (number + 1) * settings.queries)
    found = confusion.distances(states.queries, states.keys[rows].mean(axis=0))
    log_probs, answers = prepared.whole.log_probs[rows], batch.answer[rows]
    order = sorted(range(len(one.classes)), key=lambda k: one.classes[k])
    for a, i in enumerate(order):
      for j in order[a + 1 :]:
        pair = one.classes[i], one.classes[j]
        predicted.setdefault(pair, []).append(float(found[i, j]))
        ratios.setdefault(pair, []).append(confusion.pair_ratios(log_probs, answers, i, j))
  pairs = []
  for pair, values in predicted.items():
    asked = sum(len(one.positive) + len(one.negative) for one in ratios[pair])
    pairs.append([*pair, float(np.mean(values)), confusion.pair_auc(ratios[pair]), asked])
  return {'layer': layer, 'pairs': pairs}


def experts_part(prepared: Prepared) -> Figures:
  """Which experts label words choose, and accuracy and flow with some of them silenced."""
  cfg, variables = prepared.model
  settings, batch = prepared.settings, prepared.batch
  shares = expert_use.shares(cfg, variables, batch, size=settings.size)
  count = max(1, cfg.moe.num_experts // 8)
  arms: Figures = {}
  for arm in expert_use.ARMS:
    rng = np.random.default_rng([settings.seed, 7])
    without = expert_use.silenced(variables, expert_use.chosen(shares, arm, count, rng))
    found = blocking.predict(cfg, without, batch, size=settings.size)
    flow_left = saliency.measure(cfg, without, batch.take(slice(64)), size=settings.size // 2)
    arms[arm] = loyalties(prepared, found) | {
      'flow': {k: v.mean(axis=1).tolist() for k, v in flow_left._asdict().items()}
    }
  return {
    'shares': shares.round(5).tolist(),
    'separation_text': expert_use.separation(shares).tolist(),
    'separation_format': expert_use.separation(shares, prompts.FORMAT).tolist(),
    'silenced': count,
    'arms': arms,
  }


PARTS: Mapping[str, Callable[[Prepared], Figures]] = {
  'flow': flow,
  'blocking': blocking_part,
  'correlation': correlation_part,
  'reweighting': reweight_part,
  'compression': compress_part,
  'confusion': confusion_part,
  'experts': experts_part,
}


def clear():
  """Lets compiled programs go."""
  jax.clear_caches()
