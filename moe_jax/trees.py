"""Aliases for pytrees in signatures: parameters, variables, batches, JSON."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

Tree = Any  # a pytree of arrays, or of what stands for each: a ShapeDtypeStruct, a sharding
Params = dict[str, Any]  # nested dict of weights, as `Transformer` names them
RouterState = dict[str, Any]  # nested dict of what routing remembers from step to step
Variables = Mapping[str, Any]  # {'params': Params, 'router_state': RouterState}
HostBatch = Mapping[str, np.ndarray]  # rows of a batch by `packing.KEYS`, [B, L] each
Batch = Mapping[str, jax.Array]  # the same on a mesh
Json = Mapping[str, Any]  # an object of JSON, or the nested values of a config
