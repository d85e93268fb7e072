import functools
import json
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest

from configs import base
from experiments import esft
from experiments.common import cli
from moe_jax import errors
from moe_jax.api import load
from moe_jax.data import corpus
from moe_jax.data import tokenizer as tokenizer_lib
from moe_jax.post_training import expert_scores, expert_selection
from tests import in_process

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize('arguments', [(), ('selct', '--p=0.2'), ('--p=0.2',)])
def test_the_first_argument_says_what_to_do(monkeypatch, capsys, arguments):
  monkeypatch.setattr('sys.argv', ['esft', *arguments])
  with pytest.raises(SystemExit) as end:
    cli.run_action(esft.main, esft.define_flags, esft.ACTIONS)
  text = capsys.readouterr().err
  assert end.value.code == 2 and 'must be one of score, select, extract, merge' in text
  assert arguments != ('selct', '--p=0.2') or "did you mean 'select'" in text


def test_help_is_the_commands_own(monkeypatch, capsys):
  monkeypatch.setattr('sys.argv', ['esft', '--help'])
  cli.run_action(esft.main, lambda: None, esft.ACTIONS)
  assert "ESFT's scores and selection" in capsys.readouterr().out


def test_scores_are_of_text_that_the_run_can_read(tmp_path, monkeypatch):
  """A config may come from another run; ids of its tokenizer are other text to this one."""
  data = base.get_config().data
  own = tokenizer_lib.byte_tokenizer(data.bos_token, data.eos_token)
  other = tokenizer_lib.train_bpe(['def f(x):'] * 9, 280, data.bos_token, data.eos_token)
  other.save(tmp_path / 'other.json')
  asked, read, load_corpus = [], [], corpus.load_corpus

  def read_once(*arguments):
    read.append(load_corpus(*arguments))
    return read[-1]

  def score(run, cfg, text, tokens):
    assert [text] == read
    asked.append(tokens)
    return expert_selection.ExpertScores(np.ones((1, 8)) / 8, np.ones((1, 8)) / 8, tokens, 1)

  model = types.SimpleNamespace(moe=types.SimpleNamespace(num_experts=8))
  run = types.SimpleNamespace(
    trained=types.SimpleNamespace(tokenizer=own), config=types.SimpleNamespace(model=model)
  )
  monkeypatch.setattr(load, 'load', lambda workdir, flag: run)
  monkeypatch.setattr(expert_scores, 'score', score)
  monkeypatch.setattr(corpus, 'load_corpus', read_once)
  command = types.SimpleNamespace(
    __name__=esft.__name__,
    define_flags=esft.define_flags,
    main=functools.partial(esft.main, action='score'),
  )
  line = (
    '--workdir=runs/base',
    '--config=configs/smoke.py',
    f'--config.data.cache_dir={tmp_path}/cache',
    '--config.data.synthetic_documents=60',
    f'--out={tmp_path}/out',
    '--tokens=8',
  )
  in_process.run(command, *line)
  assert asked == [8]
  with pytest.raises(errors.InputError, match="other.json' is not the tokenizer of --workdir=runs"):
    in_process.run(command, *line, f'--config.data.tokenizer={tmp_path}/other.json')
  assert asked == [8]


def test_select_writes_the_fewest_experts(tmp_path):
  scores = {'1': {'0': 0.7, '1': 0.3}, '2': {'0': 0.1, '1': 0.9}}
  (tmp_path / 'summary.json').write_text(json.dumps({'token_scores': scores}))
  arguments = (f'--scores={tmp_path / "summary.json"}', '--p=0.8', f'--out={tmp_path / "out"}')
  line = [sys.executable, '-m', 'experiments.esft', 'select', *arguments]
  done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  text = '3 of 4 experts by token scores, p=0.8, 1.50 of 2 per layer (1 to 2)'
  assert text in done.stdout
  found = json.loads((tmp_path / 'out/expert_cfg.json').read_text())
  assert found['experts'] == {'1': [0, 1], '2': [1]}
