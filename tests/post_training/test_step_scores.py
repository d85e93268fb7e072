"""Markers behind steps: where they stand, what is learned at them, and what is read there."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import errors
from moe_jax.data import chat_template, conversations, template_worker
from moe_jax.data import tokenizer as tokenizer_lib
from moe_jax.models import transformer
from moe_jax.post_training import answers, policy_stage, step_scores
from moe_jax.rewards import reward
from tests import tiny
from tests.data import rendered_chats
from tests.training.test_policy_loss import RUN

TEXT = '1 + 2 = 3\n3 - 1 = 1\nThe answer is 1.'
ENDS = (9, 19, len(TEXT))
SOLUTIONS = [
  step_scores.Solution('What is 1 + 2 - 1?', TEXT, ENDS),
  step_scores.Solution('What is 4?', 'The answer is 4.', (16,)),
  step_scores.Solution('What is 5?', '', ()),
]
CHANGES = RUN | {
  'objective__kind': 'process_reward',
  'objective__process_reward__labels': 'labels.jsonl',
  'model__vocab_size': 288,
  'model__max_seq_len': 128,
}


@functools.cache
def tokenizer():
  data = tiny.make().data
  return tokenizer_lib.byte_tokenizer(data.bos_token, data.eos_token)


def marker(**changes):
  cfg = tiny.make(**(CHANGES | changes))
  return step_scores.Marker(cfg.objective.process_reward, cfg.data, tokenizer())


def test_a_marker_stands_behind_every_step_and_the_text_is_whole():
  own = marker()
  first, second, empty = own.marked(SOLUTIONS)
  assert len(first.marks) == 3 and len(second.marks) == 1 and not len(empty.marks)
  assert set(first.ids[first.marks]) == {own.step_id} == {tokenizer().token_id('<｜fim▁end｜>')}
  said = tokenizer().decode([i for i in first.ids if i != own.step_id])
  assert said == f'User: What is 1 + 2 - 1?\n\nAssistant: {TEXT}'
  parts = np.split(first.ids, first.marks + 1)
  assert tokenizer().decode(parts[1].tolist()) == '\n3 - 1 = 1'
  (whole, *_) = marker(objective__process_reward__outcome=True).marked(SOLUTIONS)
  assert whole.marks.tolist() == [len(whole.ids) - 1]


def test_a_template_has_no_space_before_a_solution_that_it_does_not_write(monkeypatch):
  monkeypatch.setattr(
    chat_template, '_ask', lambda request: template_worker.answer(request, lambda: None)
  )
  one = tokenizer_lib.byte_tokenizer(rendered_chats.BOS, rendered_chats.EOS)
  for name, opening in (('words', 'Assistant: '), ('tokens', '<｜Assistant｜>')):
    text, tokens = rendered_chats.TEMPLATES[name]
    one._inner.add_special_tokens(list(tokens))
    cfg = tiny.make(**CHANGES | {'data__chat_format': 'template', 'data__chat_template': text})
    own = step_scores.Marker(cfg.objective.process_reward, cfg.data, one)
    ids = own.marked(SOLUTIONS[:1])[0].ids
    said = one.decode([int(i) for i in ids if i != own.step_id], skip_special_tokens=False)
    assert said.endswith(opening + TEXT)


def test_labels_are_targets_at_the_markers_and_nowhere_else():
  own = marker()
  marked = own.marked(SOLUTIONS[:2])
  labels = [np.array([own.good_id, own.bad_id, own.bad_id]), np.array([own.good_id])]
  (row,) = step_scores.rows(marked, np.arange(2), 256)
  arrays = step_scores.filled(marked, row, 256, labels)
  assert (arrays['targets'] >= 0).sum() == 4  # as many as there are steps
  at = np.flatnonzero(arrays['targets'] >= 0)
  assert (arrays['tokens'][at] == own.step_id).all()
  plus, minus = (tokenizer().encode(text)[0] for text in '+-')
  assert arrays['targets'][at].tolist() == [plus, minus, minus, plus]
  assert set(arrays['segment_ids']) == {0, 1, 2}
  assert arrays['positions'][len(marked[0].ids)] == 0


def test_what_is_longer_than_a_row_is_left_out():
  marked = marker().marked(SOLUTIONS[:2])
  assert [[n for n, _ in row] for row in step_scores.rows(marked, np.arange(2), 60)] == [[1]]


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'step_token': '<none>'}, 'must be a special token'),
    ({'good': 'good'}, 'must each be one token'),
  ],
)
def test_tokens_that_are_not_there_are_named(changes, words):
  with pytest.raises(errors.InputError, match=words):
    marker(**{f'objective__process_reward__{key}': value for key, value in changes.items()})


def test_scores_are_those_of_the_two_labels_alone_whatever_shares_the_row():
  cfg = tiny.make(**CHANGES)
  variables = {'params': tiny.params(cfg.model), 'router_state': {}}
  run = types.SimpleNamespace(
    cfg=cfg, mesh=tiny.mesh(1), variables=variables, tokenizer=tokenizer()
  )
  got = step_scores.score(run, SOLUTIONS, batch_size=1)
  own = marker()
  (one, *_) = own.marked(SOLUTIONS)
  ids = one.ids[None]
  out = tiny.jit(functools.partial(transformer.apply, cfg.model))(
    variables, ids, jnp.arange(ids.shape[1])[None], jnp.ones_like(ids)
  )
  logits = np.asarray(out.logits[0], np.float64)[one.marks]
  difference = logits[:, own.good_id] - logits[:, own.bad_id]
  np.testing.assert_allclose(got[0], jax.nn.sigmoid(difference), atol=1e-4)
  assert len(got[1]) == 1 and len(got[2]) == 0


def test_what_a_row_has_no_room_for_is_unread_and_the_rest_is_as_it_is():
  cfg = tiny.make(**CHANGES)
  variables = {'params': tiny.params(cfg.model), 'router_state': {}}
  run = types.SimpleNamespace(
    cfg=cfg, mesh=tiny.mesh(1), variables=variables, tokenizer=tokenizer()
  )
  whole, told = step_scores.score(run, SOLUTIONS), []
  sizes = [len(one.ids) for one in marker().marked(SOLUTIONS)]
  # All but the last token of the first; up to its second marker; nothing of any.
  second = int(marker().marked(SOLUTIONS)[0].marks[1])
  for length, unread in ((sizes[0] - 1, 1), (second + 1, 1), (second, 2), (8, 4)):
    run.cfg = tiny.make(**(CHANGES | {'model__max_seq_len': length}))
    found = step_scores.score(run, SOLUTIONS, tell_unread=told.append)
    assert told.pop() == unread and not told
    for number, (one, full) in enumerate(zip(found, whole, strict=True)):
      read = len(full) - (min(unread, 3) if number == 0 else unread == 4) * (len(full) > 0)
      np.testing.assert_allclose(one[:read], full[:read], atol=1e-5)
      assert (one[read:] == step_scores.UNREAD).all() and len(one) == len(full)


def test_an_answer_of_many_short_lines_stops_no_run():
  """A marker for every line: 24 of one character have more tokens than a row has room for."""
  cfg = tiny.make(**CHANGES | {'model__max_seq_len': 96})
  variables = {'params': tiny.params(cfg.model), 'router_state': {}}
  judge = types.SimpleNamespace(
    cfg=cfg, mesh=tiny.mesh(1), variables=variables, tokenizer=tokenizer()
  )
  turn = conversations.Turn('user', 'What is 20 - 10 + 10?', False)
  question, told = answers.Question((turn,), 'The answer is 20.'), []
  text = '\n'.join('1' * 24)
  found = [reward.Reward(0.0, {}, 'wrong')]
  (one,) = policy_stage.judged_by(judge, found, [question], [text], told.append)
  values = [value for _, value in one.step_rewards]
  (unread,) = told
  assert len(values) == 24 and values[-unread:] == [0.0] * unread and all(values[:-unread])
  assert one.value == 0 and one.kind == 'wrong'


def test_another_run_is_refused():
  run = types.SimpleNamespace(cfg=tiny.make(), mesh=tiny.mesh(1), tokenizer=tokenizer())
  with pytest.raises(errors.InputError, match="must be 'process_reward'"):
    step_scores.score(run, SOLUTIONS)
