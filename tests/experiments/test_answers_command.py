import json
import types

import pytest

from configs import base
from experiments import answers
from moe_jax import errors
from moe_jax.api import load
from moe_jax.config import schema
from moe_jax.data import tokenizer as tokenizer_lib
from moe_jax.inference import generate
from moe_jax.post_training import answers as answers_lib
from moe_jax.rewards import pool, reward
from tests import in_process


def a_config(data, max_seq_len=256):
  return types.SimpleNamespace(data=data, model=types.SimpleNamespace(max_seq_len=max_seq_len))


@pytest.fixture
def asked(tmp_path, monkeypatch):
  """The settings of every pool that is opened; the run writes `def f` whatever it is asked."""
  values = base.get_config().data.to_dict()
  data = schema.DataConfig(**values | {'source': 'programs', 'heldout_fraction': 0.5})
  tokenizer = tokenizer_lib.byte_tokenizer(values['bos_token'], values['eos_token'])

  def complete(prompts, max_new_tokens, sampling):
    return generate.Generation([[1] * 5 for _ in prompts], ['def f' for _ in prompts], 1.0)

  loaded = types.SimpleNamespace(
    config=a_config(data), tokenizer=tokenizer, complete=complete, step=7
  )
  monkeypatch.setattr(load, 'load', lambda *args, **kwargs: loaded)
  monkeypatch.setattr(answers.cli, 'required', lambda name: str(tmp_path))
  opened = []

  class Pool:
    isolation = 'a box'

    def __init__(self, *arguments, **settings):
      opened.append((*arguments, settings))

    def __enter__(self):
      return self

    def __exit__(self, *unused):
      opened.append('closed')

    def submit(self, items):
      kinds = ['right', 'error'] * (len(items) // 2)
      found = [reward.Reward(0.0, {}, kind) for kind in kinds]
      return types.SimpleNamespace(result=lambda: found)

  monkeypatch.setattr(pool, 'RewardPool', Pool)
  return opened


def test_programs_are_run_and_the_sandbox_is_printed(asked, capsys):
  in_process.run(answers, '--n=4', '--workers=3', '--show=1')
  lines = capsys.readouterr().out.splitlines()
  assert lines[1] == "  -> 'def f' (right)" and lines[2] == 'sandbox: a box'
  assert lines[3].startswith('step=7 2 of 4 right: 50.0% [15.0%, 85.0%]')
  assert asked == [('program', 3, {'defaults': {'program': {'unsafe': False}}}), 'closed']


def test_as_json_and_without_isolation(asked, capsys):
  in_process.run(answers, '--n=2', '--unsafe_rewards', '--json')
  found = json.loads(capsys.readouterr().out)
  assert found['isolation'] == 'a box' and found['kinds'] == {'right': 1, 'error': 1}
  assert (found['step'], found['right'], found['share']) == (7, 1, 0.5)
  assert asked[0][2]['defaults'] == {'program': {'unsafe': True}}


def a_run(right_share_of: dict[float, int], max_seq_len=256, limits=None):
  """A run that answers sums: of the questions by number every n-th is right, n by temperature."""
  values = base.get_config().data.to_dict() | {'source': 'arithmetic', 'heldout_fraction': 0.5}
  data = schema.DataConfig(**values | {'path': '?max_value=9&operations=1&problems=300'})
  tokenizer = tokenizer_lib.byte_tokenizer(values['bos_token'], values['eos_token'])

  def complete(prompts, max_new_tokens, sampling):
    texts = []
    if limits is not None:
      limits.append((max(map(len, prompts)), max_new_tokens))
    for number, prompt in enumerate(prompts):
      words = tokenizer.decode(list(prompt)).split('What is ')[1].split('?')[0].split()
      value = int(words[0]) + int(words[2]) * (1 if words[1] == '+' else -1)
      texts.append(f'The answer is {value + number % right_share_of[sampling.temperature]}.')
    return generate.Generation([[1] * 5 for _ in prompts], texts, 1.0)

  return types.SimpleNamespace(
    config=a_config(data, max_seq_len), tokenizer=tokenizer, complete=complete, step=7
  )


def test_drawn_answers_and_another_run_are_told_beside(tmp_path, monkeypatch, capsys):
  runs = {str(tmp_path): a_run({0.0: 2, 1.0: 4}), 'start': a_run({0.0: 4, 1.0: 4})}
  monkeypatch.setattr(load, 'load', lambda workdir, **settings: runs[workdir])
  monkeypatch.setattr(answers.cli, 'required', lambda name: str(tmp_path))
  in_process.run(answers, '--n=16', '--samples=3', '--against=start', '--show=1')
  lines = capsys.readouterr().out.splitlines()
  assert lines[1].endswith('(right)') and lines[2].startswith('step=7 8 of 16 right: 50.0%')
  assert lines[3] == 'drawn, 3 to each: 25.0% right'
  # Four of sixteen differences are 1: 0.25, a deviation of 0.447, 2.131 errors either way.
  assert lines[4] == 'share right against start, greedy: +0.250 [+0.012, +0.488]'
  assert lines[5] == 'share right against start, sampled: +0.000 [+0.000, +0.000]'

  in_process.run(answers, '--n=16', '--samples=1', '--against=start', '--json')
  found = json.loads(capsys.readouterr().out)
  assert found['sampled_share'] == 0.25 and found['greedy_gain'][0] == 0.25
  assert found['sampled_gain'] == [0, 0, 0] and found['right'] == 8


def test_without_a_limit_an_answer_may_fill_the_shorter_row(tmp_path, monkeypatch, capsys):
  limits = []
  runs = {
    str(tmp_path): a_run({0.0: 2}, limits=limits),
    'short': a_run({0.0: 2}, max_seq_len=60, limits=limits),
  }
  monkeypatch.setattr(load, 'load', lambda workdir, **settings: runs[workdir])
  monkeypatch.setattr(answers.cli, 'required', lambda name: str(tmp_path))
  with pytest.raises(errors.InputError, match="--workers=3 has no effect on .*'arithmetic'"):
    in_process.run(answers, '--n=8', '--workers=3')
  in_process.run(answers, '--n=8')
  in_process.run(answers, '--n=8', '--against=short')
  in_process.run(answers, '--n=8', '--against=short', '--max_new_tokens=30')
  (alone, here, there, *given) = limits
  assert alone[1] == answers_lib.MOST_TOKENS
  assert here == there and here[0] + here[1] == 60
  assert [limit for _, limit in given] == [30, 30]
