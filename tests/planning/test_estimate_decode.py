import dataclasses

import jax.numpy as jnp
import numpy as np

from moe_jax.planning import (
  estimate_decode,
  flops,
  planner,
)
from tests.planning import requests


def test_decode_reads_weights_and_caches():
  plan = planner.plan(dataclasses.replace(requests.request(), decode=True, rows=8))
  model = requests.request().cfg.model
  elements = flops.kv_cache_elements_per_token(model) * model.max_seq_len
  assert plan.breakdown['caches'] == elements * jnp.dtype(model.dtype).itemsize
  one = estimate_decode.flops_per_token(model) * 8 / 8  # rows, devices
  assert plan.flops_per_device == plan.computed_flops_per_device == one
  assert plan.traffic_bytes > plan.breakdown['caches']
  assert np.isfinite(plan.step_seconds_bound) and plan.how == planner.ESTIMATED
