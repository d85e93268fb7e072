import io
import json
import resource

import pytest

from moe_jax.rewards import reward, worker

ITEM = {'prompt': '', 'completion_ids': [], 'text': '7', 'example': {'answer': '7'}}


@pytest.fixture(autouse=True)
def unlimited(monkeypatch):
  found = []
  monkeypatch.setattr(resource, 'setrlimit', lambda *limit: found.append(limit))
  return found


def serve(spec, *items):
  setup = {'spec': spec, 'defaults': {}, 'seconds': 3, 'memory': 2**40}
  out = io.StringIO()
  lines = ''.join(json.dumps(one) + '\n' for one in (setup, *items))
  worker.serve(io.StringIO(lines), out)
  return [json.loads(line) for line in out.getvalue().splitlines()]


def test_lines_are_answered(unlimited):
  wrong = ITEM | {'text': 'no'}
  right = {'reward': [1.0, {'answer/right': 1.0}, 'right', None]}
  none = {'reward': [0.0, {'answer/right': 0.0}, 'no_answer', None]}
  assert serve('answer', ITEM, wrong) == [{'ready': ''}, right, none]
  assert unlimited[0] == (resource.RLIMIT_AS, (2**40, 2**40))
  assert [kind for kind, _ in unlimited[1:]] == [resource.RLIMIT_CPU] * 2


def test_a_sum_that_is_refused_is_said():
  (answer,) = serve('answr', ITEM)
  assert "did you mean 'answer'" in answer['refused']


@pytest.mark.parametrize(
  'found, words',
  [
    (reward.Reward(float('nan'), {}, 'right'), 'ValueError: the reward is Reward(value=nan'),
    (reward.Reward(1.0, {'a': float('inf')}, 'right'), 'ValueError'),
    (reward.Reward(1.0, {}, 'right', [(3, float('nan'))]), 'ValueError'),
    (reward.Reward(1.0, {}, 'rihgt'), 'ValueError'),
    (KeyError('tests'), "KeyError: 'tests'"),
  ],
)
def test_a_check_that_fails_is_told_from_a_wrong_answer(found, words):
  def function(*unused):
    if isinstance(found, Exception):
      raise found
    return found

  answer = worker.judge(function, ITEM)
  assert answer['kind'] == 'error' and words in answer['failed'] and 'reward' not in answer


def test_memory_is_a_kind_of_its_own():
  def function(*unused):
    raise MemoryError

  assert worker.judge(function, ITEM)['kind'] == 'memory'
