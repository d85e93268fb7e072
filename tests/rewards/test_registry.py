import pytest

from moe_jax import errors
from moe_jax.rewards import registry

EXAMPLE = {'question': 'What is 7 + 5?', 'answer': '7 + 5 = 12\nThe answer is 12.'}


def test_sums_are_read():
  pattern = r'a+(b)'
  found = registry.parse(rf"answer + 0.1*format(pattern=r'{pattern}') + -2 * length(limit=9)")
  assert found == (
    ('answer', 1.0, {}),
    ('format', 0.1, {'pattern': pattern}),
    ('length', -2.0, {'limit': 9}),
  )


@pytest.mark.parametrize(
  'spec, words',
  [
    ('', "its part '' is none"),
    ('answer + ', "its part '' is none"),
    ('0.1 answer', "its part '0.1 answer' is none"),
    ('length(9)', 'options are NAME=VALUE'),
    ('length(limit=open("x"))', "its part 'length(limit=open"),
    ('answr', "the reward 'answr' must be one of .*; did you mean 'answer'"),
    ('length(limits=9)', 'has wrong options'),
    ('answer + answer', "must name 'answer' once"),
  ],
)
def test_other_sums_are_refused(spec, words):
  with pytest.raises(errors.InputError, match=words.replace('(', r'\(')):
    registry.build(spec)


def test_a_sum_is_weighted_and_has_the_kind_of_its_first_term():
  text = '7 + 5 = 13\nThe answer is 12.'
  found = registry.build('2 * steps + 0.5 * answer')('', (), text, EXAMPLE)
  assert found.value == 2 * 0.5 + 0.5 * 1
  assert found.parts == {'steps/steps': 2, 'steps/right_steps': 0.5, 'answer/right': 1}
  assert found.kind == 'right' and found.step_rewards == [(10, 0.0), (len(text), 2.0)]
  found = registry.build('answer + steps')('', (), 'so', EXAMPLE)
  assert found.kind == 'no_answer' and found.step_rewards is None


def test_a_reward_of_ones_own(tmp_path, monkeypatch):
  (tmp_path / 'own_rewards.py').write_text(
    'from moe_jax.rewards import reward\n'
    'def brief(prompt, completion_ids, text, example, limit=9):\n'
    "  return reward.Reward(float(len(text) <= limit), {}, 'right')\n"
  )
  monkeypatch.syspath_prepend(tmp_path)
  found = registry.build('1.5 * own_rewards.brief(limit=3) + length')
  assert [found('', (), text, {}).value for text in ('12', '1234')] == [1.5, 0]
  with pytest.raises(errors.InputError, match="{'limits': 9} has wrong options"):
    registry.build('own_rewards.brief(limits=9)')
  for wrong in ('own_rewards.short', 'no_rewards.brief', 'answer.'):
    with pytest.raises(errors.InputError, match=f'{wrong!r} must be a function of .*PYTHONPATH'):
      registry.build(wrong)


def test_options_of_the_sum_come_before_the_defaults():
  defaults = {'length': {'limit': 4, 'margin': 4}}
  assert registry.build('length', defaults)('', [0] * 4, '', {}).value == -1
  assert registry.build('length(limit=8)', defaults)('', [0] * 4, '', {}).value == 0


def test_a_check_closes_what_it_has_opened(monkeypatch):
  closed = []

  class Sandbox:
    isolation = 'none'

    def __init__(self, limits, *, unsafe):
      assert unsafe and limits.cpu_seconds == 3

    def close(self):
      closed.append(self)

  monkeypatch.setattr(registry.programs.sandbox, 'Sandbox', Sandbox)
  registry.check('answer + program(unsafe=True, cpu_seconds=3)')
  assert len(closed) == 1
