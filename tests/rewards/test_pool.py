import time

import pytest

from moe_jax import errors
from moe_jax.rewards import line_process, pool, reward


def item(text, answer='7'):
  return reward.Item('', [1, 2], text, {'answer': answer})


class Scripted:
  """A worker that answers as the text of the item says, in place of a process."""

  started = 0
  isolation = 'none'

  def __init__(self, setup):
    Scripted.started += 1
    self.killed = False

  def ask(self, request, seconds):
    assert not self.killed
    text = request['text']
    if text == 'dies' or text == 'dies once' and Scripted.started == 1:
      raise line_process.DiedError('it ended with status -11')
    if text == 'hangs':
      raise line_process.TimeOverError(f'no answer within {seconds:g} s')
    if text in ('error', 'memory'):
      return {'failed': 'KeyError', 'kind': text}
    return {'reward': [float(len(text)), {'a': 1.0}, 'right', [[3, 0.5]]]}

  def kill(self):
    self.killed = True


@pytest.fixture
def scripted(monkeypatch):
  monkeypatch.setattr(pool, '_Worker', Scripted)
  monkeypatch.setattr(Scripted, 'started', 0)
  return Scripted


def test_rewards_come_in_order_and_failures_are_counted(scripted):
  texts = ['a', 'error', 'bbb', 'memory', 'hangs', 'dies', 'cc']
  with pool.RewardPool('answer', 1) as one:
    found = one.score([item(text) for text in texts])
  assert found[0] == reward.Reward(1.0, {'a': 1.0}, 'right', [(3, 0.5)])
  assert [r.value for r in found] == [1, 0, 3, 0, 0, 0, 2]
  assert [r.kind for r in found if r.value == 0] == ['error', 'memory', 'time', 'error']
  assert one.counts == {'right': 3, 'error': 2, 'memory': 1, 'time': 1}
  assert scripted.started == 4  # a worker that hung or died is replaced, for its own item twice


@pytest.mark.parametrize('together', [True, False])
def test_equal_answers_are_judged_once_and_counted_all(scripted, monkeypatch, together):
  asked = []

  def ask(self, request, seconds):
    asked.append((request['text'], request['example']['answer']))
    return scripted_ask(self, request, seconds)

  scripted_ask = Scripted.ask
  monkeypatch.setattr(Scripted, 'ask', ask)
  items = [item('a'), item('bb'), item('a'), item('a', answer='8'), item('a')]
  with pool.RewardPool('answer', 1) as one:
    if together:
      found = one.score(items)
    else:
      found = [reward for each in items for reward in one.score([each])]
  assert [r.value for r in found] == [1, 2, 1, 1, 1]
  assert sorted(asked) == [('a', '7'), ('a', '8'), ('bb', '7')]
  assert one.counts == {'right': 5}


def test_a_failure_is_not_shared_with_later_items(scripted):
  with pool.RewardPool('answer', 1) as one:
    one.score([item('a'), item('hangs')])
    assert scripted.started == 1
    one.score([item('a'), item('hangs')])
  assert scripted.started == 2  # it was asked again, by a new worker
  assert one.counts == {'right': 2, 'time': 2}


def test_few_items_are_remembered(scripted, monkeypatch):
  monkeypatch.setattr(pool, 'REMEMBERED', 2)
  with pool.RewardPool('answer', 1) as one:
    found = one.score([item(text) for text in ('a', 'bb', 'ccc', 'a')])
  assert [r.value for r in found] == [1, 2, 3, 1] and len(one._known) == 2


def test_an_item_whose_worker_died_is_tried_again(scripted):
  with pool.RewardPool('answer', 1) as one:
    assert one.score([item('dies once')])[0].kind == 'right'


@pytest.mark.parametrize('text', ['error', 'memory', 'hangs', 'dies'])
def test_checks_that_all_fail_are_an_error_and_no_zeros(scripted, text):
  with pool.RewardPool('answer', 2) as one:
    with pytest.raises(pool.PoolError, match='the checks of all 3 answers of a batch have failed'):
      one.score([item(text)] * 3)
    assert one.score([]) == []


def test_a_pool_that_cannot_go_on_is_an_error_for_all_who_wait(scripted, monkeypatch):
  with pool.RewardPool('answer', 1) as one:

    def refuse(setup):
      raise pool.PoolError('a worker of the reward pool does not start')

    monkeypatch.setattr(pool, '_Worker', refuse)
    with pytest.raises(pool.PoolError, match='does not start'):
      one.score([item('a'), item('dies'), item('b')])
    monkeypatch.setattr(pool, '_Worker', scripted)  # too late: what has been missed stays missed
    with pytest.raises(pool.PoolError, match='does not start'):
      one.score([item('a')])
  with pytest.raises(pool.PoolError, match='closed'):
    one.submit([item('a')])


def test_numbers_and_sums_are_refused_before_a_process_starts():
  for bad in ({'workers': 0}, {'time_limit_s': 0}):
    with pytest.raises(errors.InputError, match='must be positive'):
      pool.RewardPool('answer', **bad)
  with pytest.raises(errors.InputError, match='must be a sum such as'):
    pool.RewardPool('answer +')


@pytest.mark.slow
def test_processes_that_hang_are_ended_and_replaced():
  """A regular expression that takes for ever cannot be interrupted from Python."""
  with pool.RewardPool("format(pattern='(a+)+b')", 2, time_limit_s=0.5) as one:
    begin = time.monotonic()
    batch = one.submit([item('a' * 99), item('aaab'), item('aaa')])
    assert not batch.done()
    assert [r.kind for r in batch.result()] == ['time', 'right', 'wrong']
    assert batch.done() and time.monotonic() - begin < 10
    with pytest.raises(pool.PoolError, match='no answer within 0.5 s'):
      one.score([item('a' * 99)])


@pytest.mark.slow
def test_processes_import_what_is_in_their_path(tmp_path, monkeypatch):
  (tmp_path / 'own_rewards.py').write_text(
    'from moe_jax.rewards import reward\n'
    'def brief(prompt, completion_ids, text, example, limit):\n'
    "  return reward.Reward(float(len(text) <= limit), {}, 'right')\n"
  )
  monkeypatch.setenv('PYTHONPATH', str(tmp_path))
  with pool.RewardPool('own_rewards.brief(limit=3)', 1) as one:
    assert [r.value for r in one.score([item('12'), item('1234')])] == [1, 0]


@pytest.mark.slow
def test_a_refused_sum_and_a_python_that_does_not_start(monkeypatch):
  with pytest.raises(errors.InputError, match="did you mean 'answer'"):
    pool.RewardPool('answr')
  monkeypatch.setattr(pool.sys, 'executable', '/bin/false')
  with pytest.raises(pool.PoolError, match='does not start: it ended with status 1'):
    pool.RewardPool('answer')
