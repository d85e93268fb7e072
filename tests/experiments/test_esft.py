import json
import pathlib
import subprocess
import sys

import pytest

from experiments import esft
from experiments.common import cli

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
