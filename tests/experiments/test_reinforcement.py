"""The study: budgets of its arms, verdicts from made-up figures, and (slow) the command."""

import json
import pathlib

import pytest

from experiments.reinforcement import __main__ as command
from experiments.reinforcement import arms, report, study
from moe_jax import errors
from moe_jax.config import pages
from tests import in_process


def policy_of(arm):
  return pages.values(arm.page).objective.policy


def test_every_arm_writes_as_many_answers_to_the_same_questions():
  first = pages.values(arms.ARMS['process'].page)
  for arm in arms.ARMS.values():
    page, policy = pages.values(arm.page), policy_of(arm)
    for key in ('prompts', 'group_size', 'max_new_tokens', 'temperature', 'rows', 'kl_weight'):
      assert policy[key] == first.objective.policy[key], (arm, key)
    assert policy.max_draws == 1
    assert (page.data.path, page.data.heldout_fraction) == (
      first.data.path,
      first.data.heldout_fraction,
    )
    changed = arms.changes(arm, 40, policy.updates)
    assert changed['train.num_steps'] == 40 * policy.updates
    assert changed['checkpoint.save_every'] % policy.updates == 0
    base = pages.values(arms.BASES[arm.base])
    assert base.data.path == page.data.path
    assert base.data.heldout_fraction == page.data.heldout_fraction


def test_judges_hold_out_questions_that_are_labelled():
  """Labelled questions are those that the base was tuned on, so a larger share is held out."""
  base = pages.values(arms.BASES['base']).data
  for page in (study.PRM, study.ORM):
    data = pages.values(page).data
    assert data.path == base.path and data.heldout_fraction > base.heldout_fraction
  assert pages.values(study.ORM).objective.process_reward.outcome


def test_what_arms_change():
  plain, unreplayed = arms.ARMS['step_ppo'], arms.ARMS['step_ppo_unreplayed']
  differ = dict(arms.changes(unreplayed, 4, 2).items() - arms.changes(plain, 4, 2).items())
  assert differ == {'objective.policy.replay': 'none'}
  found = arms.chosen(['rft', 'ppo'], ['ppo=1e-4'])
  assert list(found) == ['rft', 'ppo'] and found['rft'] == arms.ARMS['rft']
  assert arms.changes(found['ppo'], 4, 2)['optim.peak_lr'] == 1e-4
  assert 'optim.peak_lr' not in arms.changes(found['rft'], 4, 1)


@pytest.mark.parametrize(
  'names, rates, words',
  [
    (['proces'], [], "--arms=proces must be among rft, .* did you mean 'process'"),
    (['ppo'], ['rft=1'], '--rates=rft=1 must be ARM=RATE with an arm of --arms=ppo'),
    (['ppo'], ['ppo=fast'], '--rates=ppo=fast must be ARM=RATE'),
    (['ppo'], ['ppo=0'], '--rates=ppo=0 must be .* positive'),
  ],
)
def test_unknown_arms_and_rates(names, rates, words):
  with pytest.raises(errors.InputError, match=words):
    arms.chosen(names, rates)


def learned(share, **more):
  return {
    'greedy': share, 'drawn': share, 'right_steps': 0.5, 'steps': 2.0, 'seconds': 60.0,
  } | more  # fmt: skip


def verified(votes, prm, seed):
  def ways(prm):
    return {
      'self_consistency': {'1': [20, 2.0], '4': [votes, 2.0]},
      'orm': {'1': [20, 2.0], '4': [votes + 10 * (-1) ** seed, 2.0]},
      'prm': {'1': [20, 2.0], '4': [prm, 1.5]},
      'self_consistency+orm': {'1': [20, 2.0], '4': [votes, 2.0]},
      'self_consistency+prm': {'1': [20, 2.0], '4': [votes + 2, 2.0]},
    }

  quality = {'precision': 0.9, 'recall': 0.5 + seed / 10, 'accuracy': 0.7}
  return {
    'questions': 100,
    'greedy': 20,
    'any_right': 80,
    'right_and_steps': {'min': ways(prm), 'last': ways(prm - 3), 'product': ways(prm)},
    'labels': {'solutions': 40, 'right': 9, 'by_completions': {'1': quality, '8': quality}},
    'judges': {'prm': {'auc': 0.8, 'auc_of_truth': None}, 'orm': {'auc': 0.7 + seed / 10}},
  }


def made_up(seeds=3):
  """Starts of 20, 21 and 22 %; process gains 10 points, outcome 1, replay does nothing."""
  found = {}
  for seed in range(seeds):
    start = 0.2 + seed / 100
    found[seed] = {
      'base': learned(start),
      'dense_base': learned(start + 0.3),
      'rft': learned(start + 0.01 * (-1) ** seed),
      'outcome': learned(start + 0.01),
      'process': learned(start + 0.1),
      'step_ppo': learned(start + 0.02),
      'step_ppo_unreplayed': learned(start + 0.021),
      'dense_process': learned(start + 0.3 + 0.15),
      'verification': verified(50, 60 + seed, seed),
    }
  return found


ARMS = {name: arms.ARMS[name] for name in made_up(1)[0] if name in arms.ARMS}


def row(tables, begins):
  (found,) = [line for text in tables for line in text.split('\n') if line.startswith(begins)]
  return [cell.strip() for cell in found.strip('|').split('|')]


def test_gains_are_over_the_own_start():
  found = report.gains(ARMS, made_up())
  assert found['process'] == pytest.approx([10, 10, 10])
  assert found['dense_process'] == pytest.approx([15, 15, 15])
  tables = report.tables(ARMS, made_up())
  assert row(tables, '| start, dense')[1:3] == ['51.0', '51.0']
  assert row(tables, '| GRPO, process, checker |')[4:6] == ['+10.0 [+10.0, +10.0]'] * 2
  assert row(tables, '| 1 | 21.0')[:4] == ['1', '21.0', '-1.0', '+1.0']


def test_verdicts_of_learning():
  tables = report.tables(ARMS, made_up())
  assert row(tables, '| GRPO by process')[1:] == ['+9.0 [+9.0, +9.0]', 'confirmed', 'confirmed', '']
  assert row(tables, '| a mixture gains')[1:4] == ['-5.0 [-5.0, -5.0]', *['contradicted'] * 2]
  assert row(tables, '| replay makes no difference (within 2)')[2] == 'confirmed'
  # +0, +2, +0 points: 2/3 on average.
  claim = row(tables, '| GRPO by outcome gains more')
  assert claim[1] == '+0.7 [-2.2, +3.5]' and claim[2:4] == ['not yet decided'] * 2
  assert int(claim[4]) > 3
  # A claim without both of its arms is not there.
  assert not [text for text in tables if 'PPO by outcome gains more' in text]


def test_several_claims_are_harder_than_one():
  values = {'a': [1.0, 2.0, 3.0, 2.0], 'b': [0.0] * 4, 'c': [0.0, 0.1, -0.1, 0.0]}
  many = [report.Claim(f'claim {i}', 'c', 'b') for i in range(9)]
  text = report._claims('Title.', [report.Claim('first', 'a', 'b'), *many], values)
  assert row([text], '| first')[2:4] == ['confirmed', 'not yet decided']
  text = report._claims('Title.', [report.Claim('first', 'a', 'b')], values)
  assert row([text], '| first')[2:4] == ['confirmed', 'confirmed']


def test_choosing_among_answers():
  tables = report.tables({}, made_up())
  assert row(tables, '| greedy')[1:] == ['20.0 [20.0, 20.0]', '']
  assert row(tables, '| best by PRM (least step)')[1:] == ['20.0', '61.0 [58.5, 63.5]']
  assert row(tables, '| best by PRM, last step')[2] == '58.0 [55.5, 60.5]'
  assert row(tables, '| the PRM beats votes')[1:3] == ['+11.0 [+8.5, +13.5]', 'confirmed']
  assert row(tables, '| the ORM beats votes')[3] == 'not yet decided'
  assert row(tables, '| 8 |')[1:3] == ['90.0 [90.0, 90.0]', '60.0 [35.2, 84.8]']
  assert row(tables, '| PRM, true steps') == ['PRM, true steps', '-']


def test_the_report_is_written_around_what_is_there(tmp_path):
  (tmp_path / 'README.md').write_text(f'# Head\n{report.START}\nold\n{report.END}\n# Verdict\n')
  report.write(tmp_path, ARMS, made_up(), {'iterations': 40})
  text = (tmp_path / 'README.md').read_text()
  assert text.startswith('# Head') and text.endswith('# Verdict\n') and '\nold\n' not in text
  kept = json.loads((tmp_path / 'results.json').read_text())
  assert kept['settings'] == {'iterations': 40} and list(kept['seeds']) == ['0', '1', '2']
  assert (tmp_path / 'curves.png').stat().st_size > 10_000


FLAGS = ('--seeds=1', '--base_steps=30', '--n=8', '--samples=1')


@pytest.mark.parametrize(
  'flags, words',
  [
    (('--parts=learn',), '--parts=learn must be among learning, verification'),
    (('--samples=0',), '--samples=0 must be positive'),
    (('--candidates=3',), '--candidates=3 must be among 1, 2, 4'),
    (('--iterations=2', '--arms=outcome'), 'warmup_steps=5 must be smaller than .*num_steps=2'),
    (('--judge_steps=2', '--parts=verification'), 'warmup_steps=.* must be smaller than .*=2'),
    (('--samples=2',), 'base/result.json is of other settings: samples=2 .was 1.; give'),
  ],
)
def test_bad_input_trains_nothing(tmp_path, monkeypatch, flags, words):
  monkeypatch.setattr(study.Seed, 'fill', lambda *_: pytest.fail('nothing is to be trained'))
  place = tmp_path / '0' / 'base' / 'result.json'
  place.parent.mkdir(parents=True)
  place.write_text(json.dumps({'settings': {'base_steps': 30, 'n': 8, 'samples': 1}}))
  with pytest.raises(errors.InputError, match=words):
    in_process.run(command, f'--workdir={tmp_path}', *FLAGS, *flags)


@pytest.mark.slow
def test_an_arm_is_trained_measured_and_not_again(tmp_path, monkeypatch, capsys):
  out = tmp_path / 'out'
  given = (f'--workdir={tmp_path}', f'--out={out}', '--parts=learning', '--iterations=6', *FLAGS)
  in_process.run(command, *given, '--arms=process')
  record = json.loads((out / 'results.json').read_text())['seeds']['0']
  assert record['process']['answers'] == 6 * 256 and len(record['process']['reward']) == 6
  assert record['base']['questions'] == 8 and 0 <= record['process']['greedy'] <= 1
  first = (out / 'README.md').read_text()
  assert '| GRPO, process, checker |' in first
  monkeypatch.setattr(study.Seed, '_trained', lambda *_: pytest.fail('all is there already'))
  in_process.run(command, *given, '--arms=process')
  assert (out / 'README.md').read_text() == first
  # The start and what was measured of it are of any number of iterations, the arm is not.
  with pytest.raises(errors.InputError, match='train.num_steps: 6 -> 7'):
    in_process.run(command, *given, '--arms=process', '--iterations=7')


@pytest.mark.slow
@pytest.mark.long  # CI runs the same parts by the commands of Math-Shepherd
def test_steps_are_labelled_judged_and_answers_chosen(tmp_path):
  out = tmp_path / 'out'
  more = ('--label_questions=64', '--solutions=4', '--completions=2', '--judge_steps=12')
  given = (f'--workdir={tmp_path}', f'--out={out}', '--parts=verification', *FLAGS, *more)
  in_process.run(command, *given, '--candidates=2')
  found = json.loads((out / 'results.json').read_text())['seeds']['0']['verification']
  assert found['questions'] == 8 and list(found['labels']['by_completions']) == ['1', '2']
  curves = found['right_and_steps']['min']['prm']
  assert list(curves) == ['1', '2'] and all(0 <= right <= 8 for right, _ in curves.values())
  assert (pathlib.Path(tmp_path) / '0' / 'labels.jsonl').exists()
  assert '| best by PRM (least step) |' in (out / 'README.md').read_text()
