"""Takes a train step when it is told to, on as many virtual CPU devices as the environment says.

python -m experiments.bench.step_server: reads a config as a line of JSON, answers with the bytes
that its step allocates, then reads numbers and answers each when that step is done.
"""

import json
import sys

import jax

from experiments.common import stepper
from moe_jax.config import parse, paths
from moe_jax.devices import compile_cache


def main():
  """Serves until standard input ends."""
  compile_cache.enable(paths.cache_root(''))
  one = stepper.Stepper(parse.from_dict(json.loads(sys.stdin.readline())))
  print(one.peak_bytes, flush=True)
  for line in sys.stdin:
    jax.block_until_ready(one.run(int(line)))
    print('done', flush=True)


if __name__ == '__main__':
  main()
