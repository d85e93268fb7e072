"""`experiments.train` with a batch that is bad on one process: run by test_as_one.py.

python -m tests.processes.poisoned_train FLAGS; the rows that process 1 reads at step 3 have a token
that no vocabulary has.
"""

import runpy
import sys

from moe_jax.data import pipeline

BAD_STEP = 3


def poisoned(batches):
  """`pipeline.train_batches` with the bad batch."""

  def bad(*args, start_step, **kwargs):
    for step, batch in enumerate(batches(*args, start_step=start_step, **kwargs), start_step + 1):
      if step == BAD_STEP:
        batch = {**batch, 'tokens': batch['tokens'].copy()}
        batch['tokens'][0, 9] = 10**6
      yield batch

  return bad


if __name__ == '__main__':
  if '--process_id=1' in sys.argv:
    pipeline.train_batches = poisoned(pipeline.train_batches)
  runpy.run_module('experiments.train', run_name='__main__', alter_sys=True)
