import sys

import pytest

from moe_jax.rewards import line_process

ECHO = """
import json, sys, time
for line in sys.stdin:
  request = json.loads(line)
  if request['say'] == 'nothing':
    time.sleep(99)
  if request['say'] == 'bye':
    sys.exit(3)
  print(json.dumps(request), flush=True)
  print(json.dumps({'say': 'more'}), flush=True)
"""


@pytest.mark.slow
def test_lines_time_and_death():
  process = line_process.LineProcess([sys.executable, '-S', '-c', ECHO], {})
  assert process.ask({'say': 'ä' * 10**5}, 20) == {'say': 'ä' * 10**5}
  assert process.receive(20) == {'say': 'more'}
  with pytest.raises(line_process.TimeOverError, match='no answer within 0.1 s'):
    process.ask({'say': 'nothing'}, 0.1)
  process.kill()
  process = line_process.LineProcess([sys.executable, '-S', '-c', ECHO], {})
  with pytest.raises(line_process.DiedError, match='ended with status 3'):
    process.ask({'say': 'bye'}, 20)
  with pytest.raises(line_process.DiedError, match='ended with status 3'):
    process.send({'say': 'hello'})
  process.close(1)
