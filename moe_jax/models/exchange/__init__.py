"""Exchanges of tokens between the devices of mesh axis `expert`, one function per collective.

Every device of an expert-parallel group holds E / P experts and tokens of its own. An exchange
brings tokens to the experts' devices, lets them compute, brings the results back and adds them up:

  all_to_all         every pair of devices swaps a buffer of a fixed size
  ragged_all_to_all  every device sends each other one what it has for it
  all_gather         every device sees the tokens of the whole group (ring of experts)

All of them compute the same thing. A token's state is sent once to each device that it needs,
however many of its experts live there, so device-limited routing bounds what is sent. They run
inside `partitioning.per_shard`; see `buffers` for the axis letters.
"""

from collections.abc import Callable

from moe_jax.devices import hardware
from moe_jax.models.exchange import all_gather, all_to_all, ragged

EXCHANGES: dict[str, Callable] = {
  'all_to_all': all_to_all.exchange,
  'ragged_all_to_all': ragged.exchange,
  'all_gather': all_gather.exchange,
}


def choose(kind: str) -> str:
  """The key of `EXCHANGES` for `config.model.moe.exchange.kind`; 'auto' asks the platform."""
  return kind if kind != 'auto' else default(hardware.platform(), hardware.is_3d_torus())


def default(platform: str, is_3d_torus: bool) -> str:
  """What 'auto' takes on a platform, 'cpu', 'gpu' or 'tpu'.

  XLA has no ragged all-to-all for CPU and for the two-dimensional torus of a large v5e or v6e
  slice. On GPUs gathering is faster than it (13 % against 1-3 % of the peak on eight B200).
  """
  if platform == 'gpu':
    return 'all_gather'
  return 'ragged_all_to_all' if platform == 'tpu' and is_3d_torus else 'all_to_all'
