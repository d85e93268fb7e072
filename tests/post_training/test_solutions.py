"""Steps labelled by a scripted model: which beginnings are completed, and what counts as right."""

import dataclasses
import types

import numpy as np
import pytest

from moe_jax import errors
from moe_jax.data import chat_formats, conversations
from moe_jax.data import tokenizer as tokenizer_lib
from moe_jax.post_training import answers, rollouts, solutions
from tests import tiny
from tests.post_training.test_step_scores import CHANGES, tokenizer

QUESTION = answers.Question(
  (conversations.Turn('user', 'What is 7 + 5 - 3?', False),),
  '7 + 5 = 12\n12 - 3 = 9\nThe answer is 9.',
)
PROMPT = [1, 2, 3]
END = 0


def answer(text, prompt=PROMPT, ended=True):
  ids = [int(i) for i in tokenizer().encode(text)] + [END] * ended
  scores = np.zeros((3, len(ids)), np.float32)
  return rollouts.Answer(0, list(prompt), ids, ended, *scores, None)


def writer(monkeypatch, script):
  """One whose model writes what `script` says: [prompts, ...] -> groups of texts."""
  cfg, asked = tiny.make(**CHANGES), []
  run = types.SimpleNamespace(cfg=cfg, tokenizer=tokenizer(), mesh=None, variables=None)
  one = solutions.Writer(run, cfg.data)

  def written(prompts, group_size, greedy, tell, begun=False):
    asked.append((prompts, group_size, greedy, begun))
    groups = script.pop(0)
    return [
      [answer(text, prompt, ended) for text, ended in group]
      for prompt, group in zip(prompts, groups, strict=True)
    ]

  monkeypatch.setattr(one, '_written', written)
  return one, asked


RIGHT = ' 7 + 5 = 12\n12 - 3 = 9\nThe answer is 9.'
WRONG = ' 7 + 5 = 13\n13 - 3 = 10\nThe answer is 10.'


def test_every_beginning_is_completed_and_the_last_step_is_checked(monkeypatch):
  script = [
    [[(RIGHT, True), (WRONG, True), (WRONG, True), (' 7 + 5', False)]],
    [
      [('12 - 3 = 9\nThe answer is 9.', True), ('12 - 3 = 8\nThe answer is 8.', True)],
      [('The answer is 9.', True), ('The answer is 9.', False)],
      [('13 - 3 = 9\nThe answer is 9.', True), ('13 - 3 = 10\nThe answer is 10.', True)],
      [('The answer is 10.', True), ('', True)],
    ],
  ]
  one, asked = writer(monkeypatch, script)
  (group,) = one.sample([QUESTION], 4)
  assert [s.right for s in group] == [True, False, False, False]
  found = solutions.distinct([group])
  assert len(found) == 3  # the same solution twice is one
  labelled = one.label(found, 2)
  assert len(labelled) == 2  # one was cut
  first, second = labelled
  assert first.text == RIGHT[1:] and first.outcomes == ((True, False), (True, False), (True,))
  # Repaired once, so called good.
  assert second.outcomes == ((True, False), (False, False), (False,))
  assert first.truth == (True, True, True) and second.truth == (False, True, False)
  prompts, size, greedy, begun = asked[1]
  assert size == 2 and not greedy and begun and not asked[0][3] and len(prompts) == 4
  decode = tokenizer().decode
  assert [decode(ids).rpartition('Assistant:')[2] for ids in prompts] == [
    ' 7 + 5 = 12\n',
    ' 7 + 5 = 12\n12 - 3 = 9\n',
    ' 7 + 5 = 13\n',
    ' 7 + 5 = 13\n13 - 3 = 10\n',
  ]


def test_the_rest_of_an_answer_ends_with_its_row(monkeypatch):
  """Beginnings are read by length, each batch with the room that is left; order is kept."""
  cfg = tiny.make(**CHANGES | {'model__max_seq_len': 64})
  run = types.SimpleNamespace(cfg=cfg, tokenizer=tokenizer(), mesh=None, variables=None)
  one, asked = solutions.Writer(run, cfg.data, max_new_tokens=24), []

  class Sampler:
    def __init__(self, group_size, limit):
      self.limit = limit

    def sample(self, variables, prompts, draw, greedy):
      asked.append((max(map(len, prompts)), self.limit))
      return types.SimpleNamespace(answers=[answer(str(len(p)), p) for p in prompts])

  monkeypatch.setattr(one, '_sampler', Sampler)
  monkeypatch.setattr(solutions, 'BATCH', 2)
  prompts = [[1] * n for n in (47, 10, 30, 45, 62)]
  found = one._written(prompts, 1, False, lambda n: None, begun=True)
  assert [len(group[0].prompt) for group in found] == [47, 10, 30, 45, 62]
  # The limit itself where there is room for 34; 16 of 17, and all of the last 2.
  assert asked == [(30, 24), (47, 16), (62, 2)]
  one._written(prompts[:2], 1, False, lambda n: None)
  assert asked[3:] == [(47, 24)]  # a whole answer has its limit, and an error if there is no room


def test_a_beginning_holds_nothing_of_the_next_step(monkeypatch):
  """Lines that begin with space, and a tokenizer that has it in one token with the word behind."""
  data = tiny.make().data
  lines = 'We add, \u00e0 la carte \u2713\n  7 + 5 = 12\n\n So: {}\n\tThe answer is {}.'
  texts = ['User: What is 7 + 5?\n\nAssistant: ' + lines.format(n, n) for n in range(40)]
  bpe = tokenizer_lib.train_bpe(texts * 5, 400, data.bos_token, data.eos_token)
  said = lines.format(12, 12)
  question = answers.Question((conversations.Turn('user', 'What is 7 + 5?', False),), said)
  (prompt,) = chat_formats.prompts(data, [question.prompt], bpe)
  full = [int(i) for i in bpe.encode(' ' + said)]
  assert ' So' in [bpe.decode([i]) for i in full]  # the space is one token with the word

  def written(ids, begun):
    scores = np.zeros((3, len(ids) + 1), np.float32)
    return rollouts.Answer(0, begun, [*ids, bpe.eos_id], True, *scores, None)

  run = types.SimpleNamespace(cfg=tiny.make(**CHANGES), tokenizer=bpe, mesh=None, variables=None)
  one, asked = solutions.Writer(run, dataclasses.replace(data, source='conversations')), []

  def complete(prompts, group_size, greedy, tell, begun=False):
    asked.extend(prompts)
    # As a perfect model does: what is missing; and what would be if the next step were known.
    return [
      [written(full[len(ids) - len(prompt) :], ids), written(full[-1:], ids)] for ids in prompts
    ]

  monkeypatch.setattr(one, '_written', complete)
  ((solution, _),) = one.sample([question], 2)
  assert solution.right and solution.text == said
  (labelled,) = one.label([solution], 2)
  begun = [bpe.decode(ids[len(prompt) :]) for ids in asked[1:]]
  ends = [said[:end] for end in labelled.ends]
  assert len(begun) == 3 and len(ends) == 4
  for here, end, next_end in zip(begun, ends, ends[1:]):
    assert here.rstrip() == ' ' + end and (' ' + next_end).startswith(here)
  assert labelled.outcomes == ((True, False),) * 3 + ((True,),)


def test_answers_that_must_be_run_are_not_read():
  cfg = tiny.make(**CHANGES)
  run = types.SimpleNamespace(cfg=cfg, tokenizer=tokenizer(), mesh=None, variables=None)
  with pytest.raises(errors.InputError, match="source='programs' has answers that must be run"):
    solutions.Writer(run, dataclasses.replace(cfg.data, source='programs'))
