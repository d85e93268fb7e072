"""Math-Shepherd by its command: labels, two judges, and what they choose."""

import functools
import json
import types

import pytest

import moe_jax
from configs import reasoner
from experiments import process_reward
from tests import in_process


def run(action, *arguments):
  """The command with its action, in this process."""
  command = types.SimpleNamespace(
    __name__=process_reward.__name__,
    define_flags=process_reward.define_flags,
    main=functools.partial(process_reward.main, action=action),
  )
  in_process.run(command, *arguments)


@pytest.mark.slow
def test_labels_judges_and_choices(tmp_path, capsys):
  """Questions leave less room in a row than an answer may usually have."""
  page = reasoner.get_config('small')
  page.train.num_steps, page.optim.warmup_steps, page.train.eval_every = 20, 5, 0
  moe_jax.train(page, tmp_path / 'base', report=False, say=lambda line: None)
  base, labels = f'{tmp_path}/base', f'{tmp_path}/labels.jsonl'
  label = (f'--workdir={base}', f'--out={labels}', '--questions=16', '--completions=2')
  run('label', *label)
  said = capsys.readouterr().out
  assert 'solutions of 16 questions' in said and 'N=2: precision' in said
  for kind, variant in (('prm', 'small'), ('orm', 'small_outcome')):
    run(
      'train',
      f'--config=configs/process_reward.py:{variant}',
      f'--config.init_from={base}',
      f'--config.objective.process_reward.labels={labels}',
      f'--workdir={tmp_path}/{kind}',
      '--config.train.num_steps=12',
      '--config.data.heldout_fraction=0.4',  # of few questions
      '--config.checkpoint.save_every=12',
    )
  judges = (f'--prm={tmp_path}/prm', f'--orm={tmp_path}/orm', f'--out={tmp_path}/verified.json')
  verify = (f'--workdir={base}', *judges, '--questions=8', '--candidates=2')
  run('verify', *verify)
  said = capsys.readouterr().out
  assert 'greedy: ' in said and 'of 8 right' in said
  assert json.loads((tmp_path / 'verified.json').read_text())


def test_a_judge_that_is_not_there_is_named_by_its_flag(tmp_path):
  with pytest.raises(moe_jax.InputError, match='^--prm=.*nope holds no checkpoints'):
    run('verify', f'--prm={tmp_path}/nope', f'--orm={tmp_path}', f'--out={tmp_path}/a.json')
