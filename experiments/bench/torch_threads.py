"""How many threads torch gets beside JAX."""

import os
import time
from collections.abc import Callable
from typing import Any


def use_best(run: Callable[[int], Any]):
  """Gives torch all cores, or one: where other programs run, its threads wait for each other.

  Args:
    run: takes the number of a round, as `harness.Program.run`.
  """
  import torch

  seconds = {}
  for threads in (1, os.cpu_count()):
    torch.set_num_threads(threads)
    run(0)
    start = time.perf_counter()
    run(1)
    seconds[threads] = time.perf_counter() - start
  torch.set_num_threads(min(seconds, key=seconds.get))
