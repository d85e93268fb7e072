"""Runs of rewards: what they log, and that they go on bit by bit in the middle of an iteration."""

import concurrent.futures
import json
import signal
import types

import jax
import numpy as np
import pytest

import moe_jax
from moe_jax import errors
from moe_jax.data import conversations
from moe_jax.post_training import answers, policy_batches, policy_stage, rollouts, stages
from moe_jax.rewards import pool, registry, reward
from moe_jax.runs import metric_log, policy_plot
from moe_jax.training import policy_loss
from tests import tiny
from tests.inference.test_generate import sentencepiece
from tests.post_training.conftest import SIZES
from tests.training.test_policy_loss import RUN

SETTINGS = SIZES | {
  'data.path': '?max_value=9&operations=1&problems=300',
  'objective.policy.prompts': 4,
  'objective.policy.group_size': 4,
  'objective.policy.max_new_tokens': 6,
  'objective.policy.updates': 2,
  # Of random tokens about every other answer has it.
  'objective.policy.reward': "format(pattern='.*[a-z].*')",
  'objective.policy.eval_questions': 8,
  'objective.policy.kl_weight': 0.04,
  'train.micro_batch_size': 0,
  'train.num_steps': 6,
  'optim.schedule': 'constant',
  'optim.warmup_steps': 0,
  'optim.peak_lr': 5e-3,
}


def tune(base, workdir, say=print, **changes):
  given = SETTINGS | {'init_from': str(base.directory)}
  given['data.cache_dir'] = str(workdir.parent / 'cache')
  return moe_jax.train('grpo', workdir, report=False, say=say, **given | changes)


def lines(run):
  return [json.loads(line) for line in (run.directory / 'metrics.jsonl').open()]


def same_weights(a, b):
  for x, y in zip(jax.tree.leaves(a.variables), jax.tree.leaves(b.variables), strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.mark.slow
def test_a_run_is_logged_and_goes_on_bit_by_bit(base, tmp_path):
  whole = tune(base, tmp_path / 'whole', **{'objective.policy.reference_every': 2})
  logged = lines(whole)
  assert list(logged[0]) == [*metric_log.KEYS, *metric_log.POLICY_KEYS]
  assert [line['clip_share'] for line in logged[::2]] == [0, 0, 0]  # the first update of each
  assert logged[0]['ratio'] == pytest.approx(1, abs=1e-5)
  assert logged[0]['reference_kl'] == pytest.approx(0, abs=1e-6) and logged[3]['reference_kl'] > 0
  # Two iterations, four steps: the reference is the policy again.
  assert logged[4]['reference_kl'] == pytest.approx(0, abs=1e-6)
  assert logged[0]['sampler_log_ratio_max'] < 1e-4 and logged[0]['experts_differ'] == 0
  assert logged[0]['reward'] == logged[1]['reward']  # one iteration
  asked = policy_plot.read_heldout(whole.directory)
  assert [line['step'] for line in asked] == [0, 6] and asked[0]['total'] > 0

  # A signal in the middle of an iteration: the run ends at its end, is saved, and goes on.
  def interrupting(line):
    if line.startswith('step=2 loss'):  # seen at step 3
      signal.raise_signal(signal.SIGTERM)

  stopped = tune(
    base, tmp_path / 'stopped', interrupting, **{'objective.policy.reference_every': 2}
  )
  assert stopped.interrupted_by == 'SIGTERM' and stopped.step == 4
  resumed = tune(base, tmp_path / 'stopped', **{'objective.policy.reference_every': 2})
  same_weights(whole, resumed)
  for a, b in zip(logged, lines(resumed), strict=True):
    assert {k: a[k] for k in ('loss', 'reward', 'entropy', 'reference_kl')} == {
      k: b[k] for k in ('loss', 'reward', 'entropy', 'reference_kl')
    }

  # One that has lost its last checkpoint, as one that was killed.
  for step in ('4', '6'):
    (tmp_path / 'whole' / 'checkpoints' / step).rename(tmp_path / f'lost{step}')
  same_weights(resumed, tune(base, tmp_path / 'whole', **{'objective.policy.reference_every': 2}))


@pytest.mark.slow
def test_a_reward_is_won_and_replay_changes_nothing_in_float32(base, tmp_path):
  changes = {'train.num_steps': 16, 'checkpoint.save_every': 16, 'objective.policy.prompts': 8}
  free = lines(tune(base, tmp_path / 'none', **changes, **{'objective.policy.replay': 'none'}))
  assert np.mean([x['reward'] for x in free[-4:]]) > 0.1 + free[0]['reward']
  replayed = lines(tune(base, tmp_path / 'rollout', **changes | {'train.num_steps': 2}))
  np.testing.assert_allclose(replayed[0]['loss'], free[0]['loss'], atol=1e-6)
  np.testing.assert_allclose(replayed[0]['grad_norm'], free[0]['grad_norm'], rtol=1e-4)


@pytest.mark.slow
def test_a_router_that_keeps_all_experts_learns(base, tmp_path):
  changes = {'model.moe.router': 'ds_moe', 'model.moe.dispatch': 'dense', 'train.num_steps': 2}
  changes |= {'model.moe.expert_bias.update_rule': 'none', 'objective.policy.replay': 'none'}
  (first, _) = lines(tune(base, tmp_path / 'run', **changes))
  assert first['experts_differ'] == 0 and first['sampler_log_ratio_max'] < 1e-4


def test_another_objective_has_no_such_stage(base, tmp_path):
  assert stages.of(base.config) is None
  with pytest.raises(errors.InputError, match='must begin with a reward of steps'):
    tune(base, tmp_path / 'run', **{'objective.policy.supervision': 'process'})
  with pytest.raises(errors.InputError, match=r"reward='steps \+ length' must be one reward"):
    made(reward='steps + length', supervision='process')
  made(reward='2 * steps', supervision='process')
  made(reward='steps + length')
  with pytest.raises(errors.InputError, match='prompts=400'):
    tune(base, tmp_path / 'run', **{'objective.policy.prompts': 400})
  assert not (tmp_path / 'run').exists()


def test_a_model_judges_steps_or_wholes_and_the_checker_what_is_right(monkeypatch):
  found = [reward.Reward(1.0, {}, 'right'), reward.Reward(0.0, {}, 'wrong')]
  question = answers.Question((conversations.Turn('user', 'What is 1 + 1?', False),), '2')
  texts = ['1 + 1 = 2\nThe answer is 2.', 'no']
  asked = []

  def score(judge, solutions, tell_unread):
    asked.append(solutions)
    whole = judge.cfg.objective.process_reward.outcome
    return [np.array([0.25] if whole else [0.75, 0.25]), np.array([0.5])]

  monkeypatch.setattr(policy_stage.step_scores, 'score', score)
  for whole in (False, True):
    cfg = tiny.make(objective__process_reward__outcome=whole)
    judge = types.SimpleNamespace(cfg=cfg)
    first, second = policy_stage.judged_by(judge, found, [question] * 2, texts)
    assert (first.value, first.kind, second.value, second.kind) == (0.25, 'right', 0.5, 'wrong')
    assert first.step_rewards == (None if whole else [(9, 0.75), (26, 0.25)])
  assert asked[0][0].ends == (9, 26) and asked[0][0].question == 'What is 1 + 1?'


def test_questions_without_room_for_an_answer_are_left_out_at_the_start(monkeypatch):
  """And not met in the middle of a run, which would end by it."""
  stage, told = made(prompts=2, max_new_tokens=6, eval_questions=0), []
  stage._say, every = told.append, stage._questions
  assert stage._cfg.model.max_seq_len == 16
  sizes = [10 + (number % 3 == 2) for number in range(len(every))]
  at = {question.prompt[-1].content: size for question, size in zip(every, sizes)}
  monkeypatch.setattr(policy_stage, 'PART', 7)
  monkeypatch.setattr(
    stage, '_prompts', lambda part: [[1] * at[one.prompt[-1].content] for one in part]
  )
  stage._leave_long_out()
  assert stage._questions == [one for one, size in zip(every, sizes) if size == 10]
  assert len(told) == 1 and told[0].startswith(f'{sizes.count(11)} of {len(every)} questions')
  stage._leave_long_out()
  assert len(told) == 1
  at.update(dict.fromkeys(at, 11))
  with pytest.raises(errors.InputError, match='max_seq_len=16 has no room for .* questions'):
    stage._leave_long_out()


def test_steps_that_no_judge_can_read_are_told_once():
  stage, told = made(eval_questions=0, reward_model=''), []
  stage._say = told.append
  for number in (3, 5):
    stage._tell_unread(number)
  assert len(told) == 1 and 'for 3 steps' in told[0] and 'worth 0' in told[0]


@pytest.mark.parametrize('algorithm, told_of', [('grpo', [5, 12]), ('ppo', [])])
def test_iterations_that_teach_nothing_are_told_once(monkeypatch, algorithm, told_of):
  stage, told = made(eval_questions=0, algorithm=algorithm), []
  shares = iter([1, 1, 1, 1, 1, 1, 0.5, 1, 1, 1, 1, 1])

  def figures(unused_groups):
    return {'equal_groups': next(shares)}

  written = rollouts.Rollouts([], 1.0)
  monkeypatch.setattr(stage, '_groups', lambda *unused: ([], written))
  monkeypatch.setattr(stage, '_learnable', lambda *unused: ({}, []))
  monkeypatch.setattr(stage, '_variables', dict)
  monkeypatch.setattr(policy_stage, '_max_vio', lambda *unused: None)
  monkeypatch.setattr(policy_batches, 'answer_figures', figures)
  for iteration in range(1, 13):
    stage._say = lambda line, number=iteration: told.append((number, line))
    stage._iteration(iteration)
  assert [number for number, _ in told] == told_of
  assert all('5 iterations in a row' in line and 'max_draws' in line for _, line in told)


def made(**policy):
  """A stage on sums that has started no run."""
  return stages.of(tiny.make(**(RUN | {f'objective__policy__{k}': v for k, v in policy.items()})))


def test_a_judge_that_is_not_there_is_named_by_its_field(tmp_path):
  field = 'config.objective.policy.reward_model'
  with pytest.raises(errors.InputError, match=f'^{field}={tmp_path}/nope holds no checkpoints'):
    made(reward_model=f'{tmp_path}/nope')


def test_questions_come_in_passes_without_repetition_by_seed_and_draw():
  stage = made(prompts=300, eval_questions=0)
  total = len(stage._questions)
  per_pass = total // 300
  asked = [stage._asked(draw) for draw in range(per_pass + 1)]
  first = [q for draw in asked[:per_pass] for q in draw]
  assert len(set(first)) == len(first) == 300 * per_pass
  assert asked[per_pass] != asked[0] and stage._asked(1) == asked[1]


def test_more_questions_are_drawn_until_enough_groups_differ(monkeypatch):
  stage = made(prompts=2, max_draws=3, eval_questions=0)
  mixed, equal = np.array([0.5, -0.5]), np.zeros(2)
  drawn, learned = [], []

  def groups(variables, draw):
    drawn.append(draw)
    values = [mixed, equal] if draw < 8 else [mixed, mixed]
    written = rollouts.Rollouts([], 1.0)
    return [[types.SimpleNamespace(advantages=v, rewards=None, draw=draw)] for v in values], written

  def learnable(variables, flat):
    learned.extend(flat)
    return {}, []

  monkeypatch.setattr(stage, '_groups', groups)
  monkeypatch.setattr(stage, '_learnable', learnable)
  monkeypatch.setattr(stage, '_variables', dict)
  monkeypatch.setattr(policy_stage, '_max_vio', lambda *unused: None)
  monkeypatch.setattr(
    policy_batches, 'answer_figures', lambda groups: {'equal_groups': len(groups)}
  )
  stage._iteration(2)
  assert drawn == [6, 7]  # three draws belong to each iteration; two were enough
  assert [one.draw for one in learned] == [6, 7] and all(one.advantages.any() for one in learned)
  assert stage.figures['equal_groups'] == 4  # figures are of all that was written


def test_steps_end_where_they_do_whatever_a_decoder_leaves_out():
  """One of the SentencePiece kind leaves out the first space of what it decodes."""
  inner, stage = sentencepiece(), made(eval_questions=0)
  prompt, new = (inner.encode(text).ids for text in ('a b', 'h h h'))
  stage._tokenizer = types.SimpleNamespace(decode=inner.decode)
  scores = np.zeros(len(new), np.float32)
  answer = rollouts.Answer(0, prompt, new, False, scores, scores, scores, None)
  said, skipped = stage._text(answer)
  assert said == 'h h h'
  ends = policy_batches.step_ends(inner.decode, new, [1, 3, 5], skipped, False)
  assert [inner.decode(new[: end + 1]) for end in ends] == ['h', 'h h', 'h h h']


def test_answers_are_judged_as_they_end_and_each_gets_its_own_reward(monkeypatch):
  stage = made(prompts=2, group_size=2, eval_questions=0)
  events = []

  def answer(number):
    scores = np.zeros(1, np.float32)
    return rollouts.Answer(number // 2, [1], [number], True, scores, scores, scores, None)

  def sample(variables, prompts, draw, *, on_answer):
    for number in (2, 0, 3, 1):  # in the order in which they end
      on_answer(number, answer(number))
    events.append('written')
    return rollouts.Rollouts([answer(number) for number in range(4)], 1.0)

  def submit(items):
    ((question, ids, text, _),) = items
    events.append((question, text))
    future = concurrent.futures.Future()
    future.set_result((reward.Reward(float(text), {}, 'right'), ''))
    return pool.Scored([future])

  stage._sampler = types.SimpleNamespace(sample=sample)
  stage._pool = types.SimpleNamespace(submit=submit)
  monkeypatch.setattr(stage, '_prompts', lambda questions: [[1]] * len(questions))
  monkeypatch.setattr(stage, '_text', lambda one: (str(one.tokens[0]), 0))
  groups, _ = stage._groups({}, 0)
  first, second = (question.prompt[-1].content for question in stage._asked(0))
  assert events == [(second, '2'), (first, '0'), (second, '3'), (first, '1'), 'written']
  assert [[one.reward.value for one in group] for group in groups] == [[0, 1], [2, 3]]


END = 256  # a token of the end behind the 256 bytes


def grouped(monkeypatch, texts, found, judge=None, **policy):
  """The first group of answers of these texts, a token a byte; those that end in '$' are complete.

  Args:
    monkeypatch: of pytest.
    texts: of the answers.
    found: what each is worth, or None for what the policy's own reward says of it.
    judge: of steps.
    policy: of the run.
  """
  policy = {'prompts': 1, 'group_size': len(texts), 'eval_questions': 0} | policy
  stage, written = made(**policy), []
  stage._judge = judge
  for text in texts:
    ids = [*text.removesuffix('$').encode(), *([END] if text.endswith('$') else [])]
    zeros = np.zeros(len(ids), np.float32)
    written.append(
      rollouts.Answer(0, [1], ids, text.endswith('$'), zeros, zeros, zeros, experts=None)
    )

  def decode(ids):
    return bytes(i for i in ids if i < END).decode(errors='replace')

  def sample(variables, prompts, draw, *, on_answer):
    for number, one in enumerate(written):
      on_answer(number, one)
    return rollouts.Rollouts(written, 1.0)

  def submit(items):
    ((_, ids, text, _),) = items
    future, given = concurrent.futures.Future(), found
    if given is None:
      worth = registry.build(stage._policy.reward)('', ids, text, SUM)
    else:
      worth = given[next(numbers)]
    future.set_result((worth, ''))
    return pool.Scored([future])

  numbers = iter(range(len(texts)))
  stage._sampler = types.SimpleNamespace(sample=sample)
  stage._pool = types.SimpleNamespace(submit=submit)
  stage._tokenizer = types.SimpleNamespace(decode=decode)
  monkeypatch.setattr(stage, '_prompts', lambda questions: [[1]] * len(questions))
  monkeypatch.setattr(policy_stage.chat_formats, 'said', lambda data, text: text)
  ((group,), _) = stage._groups({}, 0)
  return group


SUM = {'question': 'What is 7 + 5 - 3?', 'answer': '7 + 5 = 12\n12 - 3 = 9\nThe answer is 9.'}


def test_a_reward_of_one_step_at_the_end_is_that_of_the_outcome(monkeypatch):
  """Of the end token too: an answer's last step ends with it."""
  texts = ['The answer is 9.$', 'The answer is 8.\n$', '九$']
  steps = [
    reward.Reward(v, {}, 'right', [(len(t.strip('\n$')), v)]) for v, t in zip([1, 0, 0.2], texts)
  ]
  outcome = grouped(monkeypatch, texts, steps)
  process = grouped(monkeypatch, texts, steps, supervision='process', reward='steps')
  for a, b in zip(outcome, process, strict=True):
    assert a.advantages.all() and len(a.advantages) == len(a.answer.tokens)
    np.testing.assert_allclose(b.advantages, a.advantages, rtol=1e-9)


def test_a_cut_answer_is_not_punished_for_the_steps_that_did_not_come(monkeypatch):
  """Of PPO with bootstrapped values: the phantom ones were -1.33, and raised all others by 0.33."""
  texts = [f'{SUM["answer"]}$', '7 + 5 = 12\n12 - 3', '7 + 5 = 13\n13 - 3 = 10\nThe answer is 10.$']
  policy = {'algorithm': 'ppo', 'supervision': 'process', 'reward': 'steps'}
  policy |= {'kl_weight': 0.0, 'truncated': 'bootstrap'}
  right, cut = grouped(monkeypatch, texts[:2], None, **policy)
  assert not right.rewards.any() and not cut.rewards.any()  # each step is as good as the mean
  right, cut, wrong = grouped(monkeypatch, texts, None, **policy)
  mean = 5 / 7  # steps 1 1 1, 1, 0 1 0
  assert right.rewards[[9, 20, -1]] == pytest.approx([1 - mean] * 3)
  assert cut.rewards.nonzero()[0].tolist() == [9] and cut.rewards[9] == pytest.approx(1 - mean)
  assert wrong.rewards[[9, -1]] == pytest.approx([-mean] * 2)


def test_a_judge_finds_an_answer_without_a_step_the_worst(monkeypatch):
  """Its end token is a wrong step: it had no advantage, and others, below the mean, a lower one."""
  monkeypatch.setattr(
    policy_stage.step_scores,
    'score',
    lambda judge, solutions, tell_unread: [np.full(len(one.ends), 0.5) for one in solutions],
  )
  judge = types.SimpleNamespace(cfg=tiny.make())
  found = [reward.Reward(0.0, {}, 'wrong')] * 3
  policy = {'supervision': 'process', 'reward': 'steps', 'std': 'none'}
  spoken, empty, blank = grouped(monkeypatch, ['a\nb$', '$', ' \n$'], found, judge, **policy)
  assert empty.reward.step_rewards == [(1, 0.0)] and empty.reward.value == 0
  # Steps 0.5, 0.5, 0, 0: mean 0.25.
  np.testing.assert_allclose(spoken.advantages, [0.5, 0.25, 0.25, 0.25])
  np.testing.assert_allclose(empty.advantages, [-0.25])
  np.testing.assert_allclose(blank.advantages, [-0.25] * 3)


def test_answers_of_a_router_that_keeps_all_experts_are_learned_from(monkeypatch):
  """E columns, not K: they are not replayed, and only compared with what the trainer chooses."""
  ds_moe = {'model__moe__router': 'ds_moe', 'model__moe__dispatch': 'dense'}
  plain = {'objective__policy__replay': 'none', 'objective__policy__kl_weight': 0.0}
  cfg = tiny.make(**RUN | ds_moe | plain)
  stage, experts = stages.of(cfg), np.tile(np.arange(8, dtype=np.int32), (2, 3, 1))
  scores = np.zeros(2, np.float32)
  answer = rollouts.Answer(0, [1, 2], [5, 3], True, scores, scores, scores, experts)
  one = policy_batches.Judged(answer, reward.Reward(1.0, {}, 'right'), np.ones(2))
  params = tiny.params(cfg.model)
  stage._state = types.SimpleNamespace(params=params)

  def measured(variables, batch, value=None):
    assert policy_loss.EXPERTS not in batch
    shape = batch['tokens'].shape
    return policy_stage._Measured(np.zeros(shape), np.tile(experts[0, 0], (*shape, 2, 1)), None)

  monkeypatch.setattr(stage, '_measured', measured)
  batch, _ = stage._learnable({}, [one])
  assert policy_loss.EXPERTS not in batch and stage.figures['experts_differ'] == 0
