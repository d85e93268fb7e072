import pytest

from experiments import doctor
from moe_jax.runs import checkup
from tests import in_process


@pytest.fixture
def faked(monkeypatch):
  """A machine of two facts."""
  lines = [checkup.Line('disk', '3 bytes free', 'free some'), checkup.Line('memory', 'much')]
  monkeypatch.setattr(checkup, 'facts', lambda workdir: workdir)
  monkeypatch.setattr(checkup, 'judge', lambda found: list(lines))
  return lines


def test_what_is_wrong_is_counted(faked, capsys):
  assert in_process.run(doctor, '--notrain') == 1
  said = capsys.readouterr().out.splitlines()
  assert said == ['wrong disk: 3 bytes free; free some', 'ok    memory: much', '1 of 2 are wrong']
  del faked[0]
  assert in_process.run(doctor, '--notrain') == 0
  assert capsys.readouterr().out.splitlines() == ['ok    memory: much', 'all is well']


def test_a_training_that_fails_is_wrong(faked, capsys, monkeypatch):
  del faked[0]
  failed = checkup.Line('two steps of smoke', 'no memory', 'see above')
  monkeypatch.setattr(checkup, 'try_training', lambda directory: failed)
  assert in_process.run(doctor) == 1
  assert capsys.readouterr().out.endswith('no memory; see above\n1 of 2 are wrong\n')


@pytest.mark.slow
def test_this_machine_can_train(tmp_path, capsys):
  assert in_process.run(doctor, f'--workdir={tmp_path}') == 0
  said = capsys.readouterr().out
  assert 'two steps of smoke: step=2 loss=' in said and 'all is well' in said
