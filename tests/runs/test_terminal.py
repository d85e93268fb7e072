import errno
import os

import pytest

from moe_jax.runs import terminal


def test_a_run_goes_on_when_nobody_reads_it_and_says_so_once(caplog):
  read, write = os.pipe()
  with open(write, 'w') as pipe:
    say = terminal.of(lambda line: print(line, file=pipe, flush=True))
    assert terminal.of(say) is say
    say('heard')
    assert os.read(read, 100) == b'heard\n' and not say.lost
    os.close(read)
    for _ in range(3):
      say('not heard')
    assert say.lost
    assert caplog.text.count('Broken pipe') == 1 and 'metrics.jsonl' in caplog.text
    os.dup2(os.open(os.devnull, os.O_WRONLY), write)


@pytest.mark.parametrize('number', [errno.EIO, errno.ENOSPC])
def test_a_closed_terminal_and_a_full_disk_are_no_reason_to_stop(number):
  def say(line):
    raise OSError(number, os.strerror(number))

  lines = terminal.Terminal(say)
  lines('one')
  lines('two')
  assert lines.lost


def test_other_mistakes_are_not_hidden():
  def say(line):
    raise ValueError(line)

  with pytest.raises(ValueError, match='one'):
    terminal.Terminal(say)('one')
