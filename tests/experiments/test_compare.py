"""The command: what it prints and writes, and the report to print."""

import json

import PIL.Image
import pytest

from experiments import compare
from moe_jax import errors
from moe_jax.analysis.comparison import pictures
from tests import in_process
from tests.analysis.comparison import written


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  def draw(found, out):
    PIL.Image.new('RGB', (2, 2)).save(out / 'a.png')
    return [(out / 'a.png', 'a picture')]

  monkeypatch.setattr(pictures, 'draw', draw)


def test_report_and_tables_without_the_page(tmp_path, capsys):
  written.two_groups(tmp_path / 'runs', 2)
  out = tmp_path / 'out'
  in_process.run(compare, tmp_path / 'runs', f'--out={out}', '--nopage', words=True)
  printed = capsys.readouterr().out
  assert 'bias: 2 run(s), seeds 0, 1' in printed and 'compare.html' not in printed
  text = (out / 'report.md').read_text()
  assert '- **Higher**: `plain` against `bias`, held-out bits per byte: +0.1995 [' in text
  assert '| `model.moe.expert_bias.update_rule` | sign | none |' in text
  assert '![a picture](a.png)' in text and '| bias | 0, 1 | 24, 24 |' in text
  names = {path.name for path in out.iterdir()}
  assert {'report.html', 'curves.csv', 'verdicts.csv'} < names and 'compare.html' not in names


def test_json_and_baseline(tmp_path, capsys):
  paths = written.two_groups(tmp_path, 2)
  flags = (f'--out={tmp_path / "out"}', '--nopage', '--json', '--baseline=bias')
  in_process.run(compare, *paths, *flags, words=True)
  found = json.loads(capsys.readouterr().out)
  assert found['baseline'] == 'bias' and found['groups'] == {'plain': [0, 1], 'bias': [0, 1]}
  claims = [(one['arm'], one['figure'], one['verdict']) for one in found['claims']]
  assert claims[0] == ('plain', 'bits_per_byte', 'higher') and len(claims) == 2


def test_nothing_is_written_for_nothing(tmp_path):
  with pytest.raises(errors.InputError, match='no workdir is given'):
    in_process.run(compare, f'--out={tmp_path / "out"}', '--nopage', words=True)
  assert not (tmp_path / 'out').exists()
