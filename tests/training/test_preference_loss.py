"""DPO against its closed form, and the identities: packing, accumulation, the order of a pair."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from moe_jax import errors
from moe_jax.config import parse, schema
from moe_jax.data import corpus, whole_documents
from moe_jax.devices import partitioning
from moe_jax.models import transformer
from moe_jax.training import cross_entropy, evaluate, objective, preference_loss, train_state
from tests import tiny

DPO = schema.DpoConfig(0.5, 'sigmoid', 0.0, False, 0.0)
CHANGES = {
  'objective__kind': 'dpo',
  'objective__dpo__beta': 0.5,
  'data__source': 'preferences',
  'init_from': 'elsewhere',
  'model__moe__balance__expert_level__weight': 0.0,
}
PAIRS = ((5, 4), (3, 6), (7, 2), (2, 2), (4, 3))  # tokens of chosen and rejected
PROMPT = 1  # token of each that is not learned, besides the first


def pairs_split(lengths=PAIRS, seed=0) -> corpus.TokenSplit:
  rng = np.random.default_rng(seed)
  sizes = np.asarray(lengths)
  learned = np.concatenate([np.arange(n) >= min(PROMPT, n - 1) for n in sizes.ravel()])
  return corpus.TokenSplit(
    tokens=rng.integers(32, size=sizes.sum()).astype(np.uint16),
    offsets=np.concatenate([[0], np.cumsum(sizes.sum(1))]),
    doc_bytes=sizes.sum(1),
    doc_domain=np.zeros(len(sizes), np.int32),
    learned=learned.astype(np.uint8),
    doc_chosen=sizes[:, 0],
    reference=rng.normal(size=(len(sizes), 2)).astype(np.float32) - 8,
  )


def one_of(split, i, swap=False) -> corpus.TokenSplit:
  """The i-th pair alone."""
  begin, end = split.offsets[i : i + 2]
  middle = begin + split.doc_chosen[i]
  order = np.arange(begin, end)
  if swap:
    order = np.concatenate([order[middle - begin :], order[: middle - begin]])
  return corpus.TokenSplit(
    tokens=split.tokens[order],
    offsets=np.array([0, end - begin]),
    doc_bytes=split.doc_bytes[i : i + 1],
    doc_domain=split.doc_domain[i : i + 1],
    learned=split.learned[order],
    doc_chosen=np.array([end - middle if swap else middle - begin]),
    reference=split.reference[i : i + 1, :: -1 if swap else 1],
  )


def rows_of(*splits, num_rows=8):
  rows = []
  for split in splits:
    found = whole_documents.WholeDocuments(split, np.arange(split.num_documents), 16)
    rows += [found[i] for i in range(len(found))]
  rows += [found.padding_row()] * (num_rows - len(rows))
  return {k: np.stack([r[k] for r in rows]) for k in (*objective.BATCH_KEYS, objective.REFERENCE)}


def scores_by_hand(cfg, params, split):
  """[n, 2], each answer run alone through the model, its log-probabilities by log_softmax."""
  apply = transformer.Transformer(cfg.model).apply
  place, ones = np.arange(16, dtype=np.int32)[None], np.ones((1, 16), np.int32)
  run = tiny.jit(lambda ids: apply({'params': params}, ids, place, ones))
  found = np.zeros((split.num_documents, 2))
  for i in range(split.num_documents):
    begin, end = split.offsets[i : i + 2]
    middle = begin + split.doc_chosen[i]
    for half, here in enumerate((slice(begin, middle), slice(middle, end))):
      ids, learned = split.tokens[here].astype(np.int32), split.learned[here]
      padded = np.zeros((1, 16), np.int32)
      padded[0, : len(ids)] = ids
      log_p = np.asarray(jax.nn.log_softmax(run(padded).logits))[0]
      found[i, half] = sum(log_p[t - 1, ids[t]] for t in range(1, len(ids)) if learned[t])
  return found


@pytest.fixture(scope='module')
def model():
  cfg = tiny.make(**CHANGES)
  return cfg, tiny.params(cfg.model)


@pytest.mark.parametrize(
  ('changes', 'want'),
  [
    ({}, math.log(1 + math.exp(-0.5 * 3))),
    ({'label_smoothing': 0.1}, 0.9 * math.log1p(math.exp(-1.5)) + 0.1 * math.log1p(math.exp(1.5))),
    ({'loss': 'ipo'}, (3 - 1) ** 2),
    ({'length_normalised': True}, math.log1p(math.exp(-0.5 * (2 / 4 + 1 / 2)))),
  ],
)
def test_losses_by_hand(changes, want):
  """log p/q is 2 for the chosen answer of 4 tokens and -1 for the rejected one of 2."""
  policy = preference_loss.Answers(
    jnp.array([[[-5.0, -9.0], [0.0, 0.0]]]), jnp.array([[[4.0, 2.0], [0.0, 0.0]]])
  )
  reference = jnp.array([[[-7.0, -8.0], [0.0, 0.0]]])
  found = preference_loss.sums(dataclasses.replace(DPO, **changes), policy, reference)
  np.testing.assert_allclose(found.loss, want, rtol=1e-6)
  assert (found.pairs, found.correct) == (1, 1)
  assert (found.chosen_tokens, found.rejected_tokens, found.log_ratio) == (4, 2, 1)
  if not changes:
    means = found.means()
    assert (means['chosen_reward'], means['rejected_reward']) == (1.0, -0.5)
    assert means['reward_margin'] == 1.5 and tuple(means) == preference_loss.FIGURES
    np.testing.assert_allclose(means['reference_kl'], 1 / 6)


def test_loss_and_gradient_are_the_closed_form(model):
  """-log sigmoid of the margin of scores by hand; its gradient by pairs of two SFT gradients."""
  cfg, params = model
  split = pairs_split()
  loss, grads = tiny.gradients(**CHANGES)(params, rows_of(split))
  policy = scores_by_hand(cfg, params, split)
  margin = 0.5 * ((policy - split.reference)[:, 0] - (policy - split.reference)[:, 1])
  np.testing.assert_allclose(loss.main, np.log1p(np.exp(-margin)).mean(), rtol=1e-5)
  assert loss.figures.correct == (margin > 0).sum() and loss.figures.pairs == len(PAIRS)
  # d/dw = -beta sigmoid(-margin) (d log p(chosen) - d log p(rejected)) / pairs.
  rows = rows_of(split)
  weights = np.zeros((len(rows['tokens']), 17), np.float32)
  found = whole_documents.WholeDocuments(split, np.arange(len(PAIRS)), 16)
  for row in range(len(found)):
    for k, document in enumerate(found.documents(row)):
      slope = -0.5 / (1 + np.exp(margin[document])) / len(PAIRS)
      weights[row, [2 * k + 1, 2 * k + 2]] = slope, -slope
  weights = np.take_along_axis(weights, rows['segment_ids'], 1)

  def weighted(params):
    out = transformer.apply(
      cfg.model, {'params': params}, rows['tokens'], rows['positions'], rows['segment_ids']
    )
    logits = out.normed @ params['head']
    targets = rows['targets']
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None] % 32, -1)[..., 0]
    return (weights * picked * (targets >= 0)).sum()

  tiny.assert_trees_close(grads, tiny.jit(jax.grad(weighted))(params), rtol=1e-4, atol=2e-6)


def test_with_itself_as_reference_the_loss_is_log_2(model):
  cfg, params = model
  split = pairs_split()
  split = dataclasses.replace(
    split, reference=scores_by_hand(cfg, params, split).astype(np.float32)
  )
  loss, _ = tiny.gradients(**CHANGES)(params, rows_of(split))
  np.testing.assert_allclose(loss.main, math.log(2), atol=1e-5)
  means = jax.device_get(loss.figures).means()
  assert abs(means['reward_margin']) < 1e-5 and abs(means['reference_kl']) < 1e-5


def test_packing_accumulation_and_order_change_nothing(model):
  _, params = model
  split = pairs_split()
  run = tiny.gradients(**CHANGES)
  loss, grads = run(params, rows_of(split))
  alone = [one_of(split, i) for i in range(len(PAIRS))]
  for other, rows in (
    (run, rows_of(*alone)),
    (tiny.gradients(**CHANGES, train__micro_batch_size=2), rows_of(*alone[::-1])),
  ):
    found, found_grads = other(params, rows)
    tiny.assert_trees_close(
      (found.main, found.figures), (loss.main, loss.figures), rtol=1e-5, atol=1e-5
    )
    tiny.assert_trees_close(found_grads, grads, rtol=1e-4, atol=2e-6)
  swapped, _ = run(params, rows_of(*(one_of(split, i, swap=True) for i in range(len(PAIRS)))))
  one, other = (jax.device_get(x.figures).means() for x in (loss, swapped))
  np.testing.assert_allclose(one['reward_margin'], -other['reward_margin'], rtol=1e-5)


def test_the_sft_term_is_the_cross_entropy_of_the_chosen_answers(model):
  cfg, params = model
  split = pairs_split()
  batch = rows_of(split) | {'row': np.arange(8)}
  totals = objective.totals_of(cfg, batch)
  assert (totals.pairs, totals.chosen) == (len(PAIRS), sum(max(c - PROMPT, 1) for c, _ in PAIRS))
  with_term = dataclasses.replace(
    cfg.objective, dpo=dataclasses.replace(cfg.objective.dpo, sft_weight=0.7)
  )

  def total(cfg):
    return objective.batch_loss(cfg, params, {}, batch, jnp.uint32(0), totals)[0]

  plain, more = tiny.jit(
    lambda: (total(cfg), total(dataclasses.replace(cfg, objective=with_term)))
  )()
  chosen = scores_by_hand(cfg, params, split)[:, 0].sum()
  np.testing.assert_allclose(more - plain, -0.7 * chosen / int(totals.chosen), rtol=1e-5)


def test_evaluation_counts_the_nats_of_both_answers_once(model):
  cfg, params = model
  rows = rows_of(pairs_split())
  sums = evaluate._sums.__wrapped__

  def both(params):
    variables = {'params': params, 'router_state': {}}
    return [sums(cfg.model, 5, dpo, variables, rows) for dpo in (None, cfg.objective.dpo)]

  (nats, targets, _, nothing), (same, number, _, figures) = tiny.jit(both)(params)
  assert nothing is None and targets == number
  np.testing.assert_allclose(nats, same, rtol=1e-6)
  loss, _ = tiny.gradients(**CHANGES)(params, rows)
  tiny.assert_trees_close(figures, loss.figures, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  'axes, temperature',
  [({}, 1.0), ({}, 0.7), (dict(data=2, fsdp=2, tensor=2), 0.7), (dict(data=2, sequence=2), 1.0)],
  ids=['one', 'one, colder', 'data x fsdp x tensor', 'sequence'],
)
def test_token_log_probs_and_their_gradients(axes, temperature):
  """Against log_softmax of all logits; 24 tokens in tiles of 5 per device, which do not divide."""
  from tests.training import test_cross_entropy as head

  x, weight, targets = head.operands()
  slopes = jnp.asarray(np.random.default_rng(1).normal(size=targets.shape), jnp.float32)

  def program(log_probs):
    def run(x, weight, targets):
      def total(x, weight):
        return (slopes * log_probs(x, weight, targets)).sum()

      return log_probs(x, weight, targets), jax.grad(total, argnums=(0, 1))(x, weight)

    return tiny.jit(run)

  def by_hand(x, weight, targets):
    log_p = jax.nn.log_softmax(x @ weight / temperature)
    picked = jnp.take_along_axis(log_p, jnp.maximum(targets, 0)[..., None], -1)[..., 0]
    return jnp.where(targets >= 0, picked, 0.0)

  def ours(x, weight, targets):
    return cross_entropy.token_log_probs(x, weight, targets, chunk=5, temperature=temperature)

  got = head.on_mesh(axes, program(ours), x, weight, targets)
  want = program(by_hand)(x, weight, targets)
  tiny.assert_trees_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ('key', 'value', 'words'),
  [
    ('init_from', '', 'whose|as its weights are the reference'),
    ('objective.dpo.beta', 0.0, 'must be positive'),
    ('objective.dpo.loss', 'hinge', 'one of sigmoid, ipo'),
    ('objective.dpo.label_smoothing', 0.5, r'must lie in \[0, 0.5\)'),
    ('objective.dpo.sft_weight', -1.0, 'must not be negative'),
    ('train.z_loss_weight', 0.1, 'must be 0 with'),
    ('model.moe.capacity.policy', 'score', 'log-probabilities of other computations'),
    ('model.moe.router', 'expert_choice', 'log-probabilities of other computations'),
    ('model.moe.router', 'sinkhorn', 'log-probabilities of two models'),
    ('model.moe.options.input_jitter', 0.1, "must be off with objective.kind='dpo'"),
    ('model.num_mtp_layers', 1, "num_mtp_layers=1 must be 0 with objective.kind='dpo'"),
    ('data.source', 'conversations', 'must name preferences only'),
    ('objective.kind', 'sft', 'must name conversations only'),
  ],
)
def test_settings_that_do_not_go_together(key, value, words):
  page = base.get_config()
  page.update_from_flattened_dict({k.replace('__', '.'): v for k, v in CHANGES.items()})
  parse.from_dict(page.to_dict())
  page.update_from_flattened_dict({key: value})
  with pytest.raises(errors.InputError, match=words):
    parse.from_dict(page.to_dict())


def test_a_pair_may_fill_a_row_to_its_last_place():
  """The last token of each answer is a target only: 9 + 9 tokens take 16 places, 9 + 10 take 17."""
  assert whole_documents.num_rows(pairs_split(((9, 9),)), 16) == 1
  assert whole_documents.num_rows(pairs_split(((9, 10),)), 16) == 0
  assert (rows_of(pairs_split(((9, 9),)), num_rows=1)['segment_ids'] > 0).all()


@pytest.mark.slow
def test_8_devices_equal_1(model):
  """The experts on two of them, hidden states and head split over the others."""
  cfg, params = model
  rows = rows_of(pairs_split())
  mesh = tiny.mesh(data=2, fsdp=2, expert=2)
  shardings = jax.tree.map(lambda x: x.sharding, train_state.abstract_state(cfg, mesh).params)
  with partitioning.activate(mesh):
    fn = tiny.jit(functools.partial(objective.gradients, cfg))
    operands = jax.device_put(params, shardings), {}, partitioning.put_batch(rows, mesh)
    loss, grads = fn(*operands, jnp.uint32(0))
  want, want_grads = tiny.gradients(**CHANGES)(params, rows)
  tiny.assert_trees_close((loss.main, loss.figures), (want.main, want.figures), rtol=1e-5)
  tiny.assert_trees_close(grads, want_grads, rtol=1e-3, atol=1e-5)
