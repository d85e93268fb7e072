"""Multi-token prediction against its formula, in the loss, in the books of routing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import errors
from moe_jax.models import decoder_block, layers, model_variables, token_prediction, transformer
from moe_jax.models.attention import multi_head
from moe_jax.training import objective, optim, optimizer_step
from tests import tiny

ON = dict(
  model__num_mtp_layers=2,
  model__num_layers=2,
  model__moe__expert_bias__update_rule='sign',
  model__moe__dispatch='dense',
  model__moe__balance__expert_level__scope='global_batch',  # counted over all modules first
)
CFG = tiny.make(**ON)
ROWS = tiny.batch(((16,), (7, 9), (5, 4, 3), (1, 2)))
STATE = tiny.router_state(CFG.model)
CLOSE = dict(rtol=1e-4, atol=1e-4)  # float32 through three blocks


def ahead(tokens, targets, segment_ids, num):
  """(seen, aims) of a single row, lists by depth."""
  rows = (jnp.array([one], jnp.int32) for one in (tokens, targets, segment_ids))
  return [found[:, 0].tolist() for found in token_prediction.tokens_ahead(*rows, num)]


def test_tokens_ahead_by_hand():
  # Documents a b c | d e, and padding; the last token of a document has no target.
  seen, aims = ahead([10, 11, 12, 13, 14, 0], [11, 12, -1, 14, -1, -1], [1, 1, 1, 2, 2, 0], 2)
  assert seen == [[11, 12, -1, 14, -1, -1], [12, -1, -1, -1, -1, -1]]
  assert aims == [[12, -1, -1, -1, -1, -1], [-1] * 6]


def test_padding_has_nothing_ahead():
  seen, aims = ahead([10, 11, 0, 0, 0], [11, -1, -1, -1, -1], [1, 1, 0, 0, 0], 2)
  assert seen == [[11, -1, -1, -1, -1], [-1] * 5] and aims == [[-1] * 5] * 2


def test_a_document_that_goes_on_behind_the_row_lends_its_next_token_only():
  seen, aims = ahead([4, 5, 6], [5, 6, 7], [1, 1, 1], 2)
  assert seen == [[5, 6, 7], [6, 7, -1]]
  assert aims == [[6, 7, -1], [7, -1, -1]]


def test_a_prompt_is_seen_and_not_aimed_at():
  # A prompt 1 2 3 and its answer 4 5 of which all is learned; a second turn 6 that is not.
  tokens, targets = [1, 2, 3, 4, 5], [-1, -1, 4, 5, -1]
  seen, aims = ahead(tokens, targets, [1] * 5, 3)
  assert seen == [[2, 3, 4, 5, -1], [3, 4, 5, -1, -1], [4, 5, -1, -1, -1]]
  assert aims == [[-1, 4, 5, -1, -1], [4, 5, -1, -1, -1], [5, -1, -1, -1, -1]]


def test_what_is_learned_changes_nothing_of_what_is_computed():
  """The modules see a prompt as text, as they do when they draft."""
  variables = {'params': tiny.params(CFG.model), 'router_state': STATE}
  rows = [ROWS[k] for k in ('tokens', 'positions', 'segment_ids')]
  places = np.arange(ROWS['targets'].shape[1])
  targets = jnp.where(places < 6, -1, ROWS['targets'])
  out = tiny.jit(lambda t: transformer.apply(CFG.model, variables, *rows, targets=t))(targets)
  np.testing.assert_array_equal(out.mtp.logits, output().mtp.logits)
  np.testing.assert_array_equal(out.mtp.stats.sums.num_tokens, output().mtp.stats.sums.num_tokens)
  want = np.stack([np.where(places < 6 - k, -1, output().mtp.targets[k - 1]) for k in (1, 2)])
  np.testing.assert_array_equal(out.mtp.targets, want)


@functools.cache
def output():
  variables = {'params': tiny.params(CFG.model), 'router_state': STATE}
  rows = [ROWS[k] for k in ('tokens', 'positions', 'segment_ids')]
  apply = transformer.Transformer(CFG.model).apply
  run = tiny.jit(lambda targets: apply(variables, *rows, targets=targets))
  return run(ROWS['targets'])


def rms(x, scale):
  return layers.RMSNorm(CFG.model.norm_eps, jnp.float32).apply({'params': scale}, x)


@functools.partial(tiny.jit, static_argnames='k')
def depth(own, state, all_params, hidden, ids, k):
  """(h^k, logits) of one document: hidden [1, n, D] of depth k - 1, ids its tokens."""
  n = ids.shape[0] - k  # positions whose t_{i+k} exists
  embedded = all_params['embedding'][ids[k:]][None]
  pair = [rms(embedded, own['embedding_norm']), rms(hidden[:, :n], own['hidden_norm'])]
  ctx = multi_head.Context(jnp.arange(n)[None], jnp.ones((1, n), jnp.int32))
  tokens = transformer.routing.Tokens(
    ids[None, k:], jnp.ones((1, n), bool), jnp.zeros(1, jnp.int32), jnp.uint32(0)
  )
  hidden, _ = decoder_block.Block(CFG.model, True, False).apply(
    {'params': own['block'], 'router_state': state},
    jnp.concatenate(pair, axis=-1) @ own['projection'],
    decoder_block.LayerInputs(None, jnp.int32(0), {}),
    ctx,
    tokens,
  )
  return hidden, rms(hidden, own['norm']) @ all_params['head']


def test_depths_are_the_formula_one_document_at_a_time():
  """h^k = Block(M [norm(Emb(t_{i+k})); norm(h^{k-1})]), P^k = head(norm(h^k)) for t_{i+k+1}.

  h^0 is the model's last state behind its final norm.
  """
  out, params = output(), tiny.params(CFG.model)
  for b, first, last in ((0, 0, 16), (1, 7, 16)):
    ids = ROWS['tokens'][b, first:last]
    hidden = rms(out.hidden[b : b + 1, first:last], params['final_norm'])
    for k in (1, 2):
      own = jax.tree.map(lambda a: a[k - 1], params['mtp_layers'])  # noqa: B023
      state = jax.tree.map(lambda a: a[k - 1], STATE['mtp_layers']['block'])  # noqa: B023
      hidden, want = depth(own, state, params, hidden, ids, k)
      n = want.shape[1]
      got = out.mtp.logits[k - 1, b, first : first + n]
      np.testing.assert_allclose(got, want[0], **CLOSE, err_msg=f'{b} {first} {k}')
      aims = np.asarray(out.mtp.targets[k - 1, b, first : first + n])
      np.testing.assert_array_equal(aims, [*ids[k + 1 :], -1])


def test_predictions_do_not_touch_the_main_model():
  plain = {k: v for k, v in tiny.params(CFG.model).items() if k != 'mtp_layers'}
  model = tiny.make(**ON | dict(model__num_mtp_layers=0)).model
  state = {'moe_layers': STATE['moe_layers']}
  rows = [ROWS[k] for k in ('tokens', 'positions', 'segment_ids')]
  out = tiny.jit(transformer.Transformer(model).apply)(
    {'params': plain, 'router_state': state}, *rows
  )
  np.testing.assert_allclose(out.logits, output().logits, **CLOSE)
  assert out.mtp is None


@functools.cache
def compiled(**overrides):
  """(lambda) -> (loss, gradients)."""
  fn = tiny.jit(functools.partial(objective.gradients, tiny.make(**ON | overrides)))
  params = tiny.params(CFG.model)
  return lambda weight: fn(params, STATE, ROWS, jnp.uint32(0), jnp.float32(weight))


@functools.cache
def gradients(weight=0.3, **overrides):
  return compiled(**overrides)(weight)


def test_loss_is_lambda_times_the_mean_over_depths():
  loss, _ = gradients()
  logp = jax.nn.log_softmax(output().mtp.logits)
  aims = np.asarray(output().mtp.targets)
  label = np.take_along_axis(np.asarray(logp), np.maximum(aims, 0)[..., None], -1)[..., 0]
  want = -(label * (aims >= 0)).sum() / 2 / tiny.num_targets(ROWS)
  np.testing.assert_allclose(loss.mtp, want, rtol=1e-5)


def test_gradient_is_linear_in_lambda():
  grads = [gradients(weight)[1] for weight in (0.0, 0.3, 0.6)]

  def part(g):
    return g['embedding']

  np.testing.assert_allclose(
    part(grads[2]) - part(grads[0]), 2 * (part(grads[1]) - part(grads[0])), rtol=1e-3, atol=1e-4
  )
  assert np.abs(grads[1]['mtp_layers']['projection']).max() > 1e-3


def test_books_count_the_modules_tokens_and_only_those_with_a_successor():
  loss, _ = gradients()
  k, real = CFG.model.moe.num_experts_per_tok, (ROWS['segment_ids'] > 0).sum()
  rows = (ROWS[key] for key in ('tokens', 'targets', 'segment_ids'))
  seen, _ = token_prediction.tokens_ahead(*rows, 2)
  want = [k * real, *(k * (one >= 0).sum() for one in seen)]
  np.testing.assert_array_equal(loss.stats.sums.load.sum(-1), want)


def test_their_biases_move_with_the_others_once_per_step():
  loss, _ = gradients()
  state = optimizer_step.next_router_state(CFG, STATE, loss.stats, jnp.int32(0))
  before, after = (model_variables.moe_state(s)['expert_bias'] for s in (STATE, state))
  load = np.asarray(loss.stats.sums.load, np.float64)
  want = 1e-3 * np.sign(load.mean(-1, keepdims=True) - load)
  np.testing.assert_allclose(after - before, want, atol=1e-6)
  assert after.shape == (3, 8)  # one layer of the model, two modules
  assert jax.tree.structure(state) == jax.tree.structure(STATE)


@pytest.mark.parametrize(
  'overrides',
  [
    dict(train__micro_batch_size=2, model__moe__dispatch='dropless'),
    pytest.param(dict(model__remat='full', model__scan_layers=False), marks=pytest.mark.slow),
  ],
)
def test_accumulation_dispatch_remat_and_unrolling_change_nothing(overrides):
  want, got = gradients(), gradients(**overrides)
  np.testing.assert_array_equal(got[0].stats.sums.load, want[0].stats.sums.load)
  np.testing.assert_allclose(got[0].mtp, want[0].mtp, rtol=1e-5)
  np.testing.assert_allclose(got[0].aux, want[0].aux, rtol=1e-5)
  tiny.assert_trees_close(got[1], want[1], rtol=2e-3, atol=1e-4)


def test_lambda_follows_its_ramp():
  cfg = tiny.make(train__mtp_loss_ramp=((0.25, 0.3), (0.5, 0.2)), train__mtp_loss_weight=0.1).train
  got = [float(optim.mtp_weight(cfg, jnp.int32(step))) for step in (0, 4, 5, 9, 10, 19)]
  np.testing.assert_allclose(got, [0.3, 0.3, 0.2, 0.2, 0.1, 0.1], rtol=1e-6)


@pytest.mark.parametrize('ramp', [((0.5, 0.1), (0.2, 0.1)), ((1.0, 0.1),), ((0.5, -1.0),)])
def test_bad_ramps_are_refused(ramp):
  with pytest.raises(errors.InputError, match='mtp_loss_ramp'):
    tiny.make(train__mtp_loss_ramp=ramp)


def test_a_dense_model_predicts_ahead_too():
  cfg = tiny.make(model__moe__num_experts=0, model__num_mtp_layers=1, model__num_layers=1)
  loss, grads = tiny.gradients(
    model__moe__num_experts=0, model__num_mtp_layers=1, model__num_layers=1
  )(tiny.params(cfg.model), ROWS)
  assert loss.stats is None and float(loss.mtp) > 0
  assert np.abs(grads['mtp_layers']['block']['mlp']['down']).max() > 1e-3


def test_modules_route_by_the_ids_that_they_see_more(monkeypatch):
  """What the block is given, the layers before it left out."""
  given = []

  def block(*unused, **named):
    return lambda x, own, ctx, tokens: given.append(tokens) or (x, (None, None))

  monkeypatch.setattr(decoder_block, 'Block', block)
  ids, mask = jnp.array([[5, 6, 0]]), jnp.array([[True, True, False]])
  ahead = token_prediction.Ahead(jnp.ones((1, 3, 16)), ids, mask)
  tokens = transformer.routing.Tokens(ids + 1, mask | True, jnp.zeros(1, jnp.int32), jnp.uint32(3))
  module = token_prediction.MTPLayer(CFG.model, True, False)
  module.init_with_output(jax.random.key(0), jnp.ones((1, 3, 16)), None, ahead, None, tokens)
  (seen,) = given
  np.testing.assert_array_equal(seen.ids, ids)
  np.testing.assert_array_equal(seen.mask, mask)
  assert seen.seed == 3 and seen.row is tokens.row
