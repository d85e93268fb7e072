"""`experiments.train` with SIGTERM to process 1 while it evaluates: run by test_interrupted.py.

python -m tests.processes.signalled_train FLAGS; the signal comes before the second batch.
"""

import os
import runpy
import signal
import sys

from moe_jax.training import evaluate


def signalled(evaluate_all):
  """`evaluate.evaluate` with the signal."""

  def evaluate_some(*args, stop_requested=None, **kwargs):
    if stop_requested is None:  # at the end of the run
      return evaluate_all(*args, **kwargs)
    asked = 0

    def ask():
      nonlocal asked
      asked += 1
      if asked == 2:
        os.kill(os.getpid(), signal.SIGTERM)
      return stop_requested()

    return evaluate_all(*args, stop_requested=ask, **kwargs)

  return evaluate_some


if __name__ == '__main__':
  if '--process_id=1' in sys.argv:
    evaluate.evaluate = signalled(evaluate.evaluate)
  runpy.run_module('experiments.train', run_name='__main__', alter_sys=True)
