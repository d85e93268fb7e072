import subprocess
import sys

CODE = """
from moe_jax.planning import host_memory
before = host_memory.peak()
held = bytearray(before + 2**26)  # more than all that this process ever held
during = host_memory.peak()
assert before > 0 and during >= len(held), (before, during)
"""


def test_the_peak_is_that_of_what_was_touched():
  done = subprocess.run([sys.executable, '-c', CODE], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
