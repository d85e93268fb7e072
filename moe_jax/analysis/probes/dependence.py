"""What decides a token's experts: its domain, its id, its place; and what each expert reads."""

from collections.abc import Sequence

import numpy as np
from matplotlib import figure

from moe_jax.analysis import information
from moe_jax.analysis.probes import probe_types

MOST_DOMAINS = 16  # rows of a heat map
WORDS = 8  # of an expert's list
LEAST_COUNT = 8  # times that a token id must have met an expert to be on its list


def _shares(context: probe_types.Context, labels: np.ndarray) -> np.ndarray:
  """[layers], see `information.decided_share`; labels [B, L]."""
  seen = context.observations
  flat = seen.of_tokens(labels)
  return np.array(
    [
      information.decided_share(choices, flat, seen.num_experts)
      for choices in seen.of_tokens(seen.expert_idx)
    ]
  )


def domains(context: probe_types.Context) -> probe_types.Finding:
  """Domain x expert: how much more often than on average a domain uses an expert."""
  seen, labels = context.observations, context.subject.corpus.domains
  present = np.bincount(seen.of_tokens(seen.domains), minlength=len(labels))
  top = [d for d in np.argsort(-present, kind='stable')[:MOST_DOMAINS] if present[d]]
  if len(top) < 2:
    raise probe_types.NotApplicableError(
      f'the tokens are of {len(top)} domain(s); give data.domain_field, or more tokens'
    )
  flat = seen.of_tokens(seen.domains)
  table = np.stack(
    [
      _padded(information.counts(choices, flat, seen.num_experts), len(labels))
      for choices in seen.of_tokens(seen.expert_idx)
    ]
  )  # [layers, domains, E]
  use = table / np.maximum(table.sum(axis=2, keepdims=True), 1)
  mean = table.sum(axis=1) / table.sum(axis=(1, 2), dtype=float)[:, None]
  lift = use / np.maximum(mean[:, None], 1e-12)
  decided = _shares(context, seen.domains)
  layer, row = np.unravel_index(lift[:, top].max(axis=2).argmax(), (len(lift), len(top)))
  expert = int(lift[layer, top[row]].argmax())
  reading = (
    f'The domain decides {_percent(decided, context)} of the choice of experts (0 % = chance, '
    f"100 % = a token's domain says all of its experts). The strongest bond: {labels[top[row]]!r} "
    f'uses expert {expert} of {context.layer_names()[layer]} '
    f'{lift[layer, top[row], expert]:.1f} times as often as the text as a whole.'
  )

  def draw(fig: figure.Figure):
    panels = probe_types.grid(fig, seen.num_layers)
    for axes, values, name in zip(panels, lift[:, top], context.layer_names()):
      shown = np.log2(np.clip(values, 1 / 8, 8))
      image = axes.imshow(shown, aspect='auto', cmap='RdBu_r', vmin=-3, vmax=3)
      axes.set_title(name, fontsize=10)
      axes.set_xlabel('routed expert')
      axes.set_yticks([])
    for axes in panels[::3]:
      axes.set_yticks(range(len(top)), [labels[d][:18] or '(none)' for d in top], fontsize=7)
    bar = fig.colorbar(image, ax=panels, shrink=0.8)
    bar.set_ticks([-3, 0, 3], labels=['1/8', '1', '8 x'])
    bar.set_label("use / the text's mean use")

  arrays = {'counts': table, 'decided_share': decided, 'domains': np.asarray(labels)}
  return probe_types.Finding(arrays, reading, draw, probe_types.panel_size(seen.num_layers, 3.4))


def _padded(table: np.ndarray, rows: int) -> np.ndarray:
  return np.pad(table, ((0, rows - len(table)), (0, 0)))


def _percent(values: np.ndarray, context: probe_types.Context) -> str:
  return probe_types.per_layer(100 * values, context.layer_names(), '{:.1f} %')


def tokens_and_places(context: probe_types.Context) -> probe_types.Finding:
  """How far the token id, the token before and the place decide the experts.

  Places count from the beginning of the document, or of the row that it goes on in.
  """
  seen = context.observations
  before = np.where(seen.positions > 0, np.roll(seen.tokens, 1, axis=1) + 1, 0)
  # Places in groups that double: 0, 1, 2-3, 4-7, ...
  place = np.where(seen.positions > 0, np.log2(np.maximum(seen.positions, 1)).astype(int) + 1, 0)
  shares = {
    'token_id': _shares(context, seen.tokens),
    'token_before': _shares(context, before),
    'place': _shares(context, place),
  }
  names = context.layer_names()
  reading = (
    f'The token id alone decides {_percent(shares["token_id"], context)} of the choice of experts; '
    f'the token before it {_percent(shares["token_before"], context)}; the place in the document, '
    f'counted anew in each row, {_percent(shares["place"], context)}. 100 % = nothing else '
    'matters, 0 % = chance.'
  )

  def draw(fig: figure.Figure):
    axes = fig.subplots()
    for key, values in shares.items():
      axes.plot(range(len(values)), 100 * values, 'o-', label=key.replace('_', ' '))
    axes.set_xticks(range(len(names)), [str(context.first_layer + i) for i in range(len(names))])
    axes.set_xlabel('layer')
    axes.set_ylabel('of the choice of experts, %')
    axes.set_ylim(min(-5, axes.get_ylim()[0]), 105)
    axes.axhline(0, color='0.6', lw=1)
    axes.legend(frameon=False)

  return probe_types.Finding(shares, reading, draw, (6.5, 4.0))


def vocabulary(context: probe_types.Context) -> probe_types.Finding:
  """The token ids that each expert is chosen by more often than others: readable lists."""
  seen, tokenizer = context.observations, context.subject.corpus.tokenizer
  ids = seen.of_tokens(seen.tokens)
  lists, lifts = [], []
  for choices in seen.of_tokens(seen.expert_idx):
    words, lift = words_of(information.counts(choices, ids, seen.num_experts))
    lists.append(words)
    lifts.append(lift)
  lists, lifts = np.stack(lists), np.stack(lifts)  # [layers, E, WORDS]
  shown = [_most_particular(lifts[i], 6) for i in range(seen.num_layers)]
  lines = [
    f'{name}, expert {e}: {spell(tokenizer, lists[i, e])}'
    for i, name in enumerate(context.layer_names())
    for e in shown[i]
  ]
  reading = (
    'Tokens that an expert takes more often than its share of the text would have it, the most '
    f'particular experts of each layer: {"; ".join(lines)}.'
  )

  def draw(fig: figure.Figure):
    axes = fig.subplots()
    axes.axis('off')
    axes.text(0, 1, '\n'.join(lines), va='top', fontsize=9, family='monospace')

  height = 0.5 + 0.19 * len(lines)
  return probe_types.Finding({'ids': lists, 'lift': lifts}, reading, draw, (9.0, height))


def words_of(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Per expert the ids whose share of their choices it has most of, above its mean share.

  Args:
    table: [V, E] counts of (token id, expert).

  Returns:
    ids [E, WORDS] int32, best first, -1 = no more; their lift [E, WORDS]: the expert's share of the
    id's choices over its share of all choices.
  """
  share = table.sum(axis=0) / max(table.sum(), 1)
  of_id = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
  lift = np.where(table >= LEAST_COUNT, of_id / np.maximum(share, 1e-12), 0.0)
  best = np.argsort(-lift, axis=0, kind='stable')[:WORDS].T
  best = np.pad(best, ((0, 0), (0, WORDS - best.shape[1])))
  lifts = np.take_along_axis(lift, best.T, axis=0).T
  return np.where(lifts > 1, best, -1).astype(np.int32), np.where(lifts > 1, lifts, 0.0)


def _most_particular(lift: np.ndarray, number: int) -> np.ndarray:
  """Experts by the mean lift of their lists, best first."""
  return np.argsort(-lift.mean(axis=1), kind='stable')[:number]


def spell(tokenizer, ids: Sequence[int]) -> str:
  """Ids as text in quotes, white space shown."""
  texts = (tokenizer.decode([int(i)], skip_special_tokens=False) for i in ids if i >= 0)
  return ' '.join(repr(text) for text in texts)
