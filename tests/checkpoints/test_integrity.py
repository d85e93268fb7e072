import json
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.checkpoints import integrity

# Orbax leaves coroutines behind when a read fails.
pytestmark = pytest.mark.filterwarnings('ignore:coroutine .* was never awaited')


@flax.struct.dataclass
class State:
  step: jax.Array
  params: Any
  opt_state: Any


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int32', 'uint32', 'bool', 'int8'])
def test_checksum_sees_any_single_change(dtype):
  rng = np.random.default_rng(0)
  values = rng.integers(0, 2, (6, 7)) if dtype == 'bool' else rng.integers(0, 99, (6, 7))
  x = np.array(jnp.asarray(values).astype(dtype))
  seen = {integrity.checksums({'x': jnp.asarray(x)})['x']}
  raw = x.view(np.uint8)
  bits = [0] if dtype == 'bool' else [0, 7]
  places = [(i, b) for i in range(0, raw.size, 11) for b in bits]
  for i, bit in places:
    changed = raw.copy()
    changed.reshape(-1)[i] ^= 1 << bit
    seen.add(integrity.checksums({'x': jnp.asarray(changed.view(x.dtype))})['x'])
  assert len(seen) == 1 + len(places)


def test_checksum_sees_order_and_names_leaves():
  x = jnp.arange(8, dtype=jnp.float32)
  swapped = x.at[0].set(1.0).at[1].set(0.0)
  sums = integrity.checksums({'a': [x, swapped], 'b': State(jnp.int32(1), x.reshape(2, 4), ())})
  assert list(sums) == ['a/0', 'a/1', 'b/step', 'b/params']
  assert sums['a/0'] != sums['a/1']
  assert sums['a/0'] == sums['b/params'], 'position is that in the flattened array'
  assert sums == json.loads(json.dumps(sums))
