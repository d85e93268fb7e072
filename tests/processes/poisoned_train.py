"""`experiments.train` with a batch that is bad on one process: run by test_as_one.py.

python -m tests.processes.poisoned_train FLAGS; the rows that process 1 reads at step 3 have a token
that no vocabulary has. Every process prints the checksum of its own shards after each step.
"""

import hashlib
import runpy
import sys

import jax
import numpy as np

from moe_jax.data import pipeline
from moe_jax.runs import loop_actions

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


def telling(after_step):
  """`SaveCheckpoint.after_step` that first prints `state STEP CHECKSUM` of the shards here."""

  def tell(self, report):
    digest = hashlib.sha256()
    state = report.state
    for leaf in jax.tree.leaves((state.params, state.router_state, state.opt_state)):
      if leaf.ndim:  # single numbers of the optimizer's state count steps
        for shard in leaf.addressable_shards:
          digest.update(np.asarray(shard.data).tobytes())
    print(f'state {report.step} {digest.hexdigest()}', flush=True)
    after_step(self, report)

  return tell


if __name__ == '__main__':
  loop_actions.SaveCheckpoint.after_step = telling(loop_actions.SaveCheckpoint.after_step)
  if '--process_id=1' in sys.argv:
    pipeline.train_batches = poisoned(pipeline.train_batches)
  runpy.run_module('experiments.train', run_name='__main__', alter_sys=True)
