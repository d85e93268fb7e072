"""Accelerators and how they are wired: what rooflines and memory plans need to know.

Figures are per device as JAX counts devices: a chip, but half of a chip of v4 and tpu7x. Peaks are
the makers' (bfloat16, dense); bounds made from them are optimistic, as bounds must be.

Sources: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x} and NVIDIA's data sheets for peaks,
bandwidths and interconnect; `hbm_bytes` of TPUs is what XLA leaves to a program, as its message for
programs that are too large says (libtpu 0.0.42), and of GPUs all that the driver reports to a
program: 79.1 GiB of an H100 and 139.8 GiB of an H200, which are sold as 80 and 141 GB (141e9 bytes
would leave 9e9 unused). `gpu_targets` describes the devices by the same figures.
"""

import dataclasses
import math
import re
from typing import Any

from moe_jax import errors

GIB = 2**30
NODE = 8  # GPUs that NVLink joins


@dataclasses.dataclass(frozen=True)
class Chip:
  """One kind of device."""

  name: str
  kind: str  # 'tpu' or 'gpu'
  flops: float  # peak bfloat16 FLOP/s
  hbm_bytes: int  # memory that a program may use
  hbm_bandwidth: float  # bytes/s
  link_bandwidth: float  # bytes/s, one way: of one ICI link of a TPU, of all NVLinks of a GPU
  torus: int  # dimensions of the TPU's torus; 0 for a GPU
  wraps: int  # length of a dimension from whose multiples on it is a ring; shorter ones are lines
  dcn_bandwidth: float  # bytes/s out of the slice (or the node), per device
  per_chip: int = 1  # devices of a chip


def _tpu(name: str, **values: Any) -> Chip:
  return Chip(name=name, kind='tpu', **values)


def _gpu(name: str, **values: Any) -> Chip:
  return Chip(name=name, kind='gpu', torus=0, wraps=0, **values)


# Links: v5p and tpu7x 1200 GB/s both ways over 6 links, v6e 800 over 4, v5e 400 over 4, v4 600 over
# 6. The two devices of a chip of v4 and tpu7x share its links and its network. Rings: v4, v5p and
# tpu7x are cubes of 4 that optical switches close, v5e and v6e close at the full pod of 16.
# Networks: 25 (v5e), 50 (v4, v5p) and 100 (v6e, tpu7x) Gbit/s per chip, 400 per GPU.
CHIPS = {
  chip.name: chip
  for chip in (
    _tpu(
      'v4',
      flops=275e12 / 2,
      hbm_bytes=int(15.25 * GIB),
      hbm_bandwidth=1228e9 / 2,
      link_bandwidth=50e9 / 2,
      torus=3,
      wraps=4,
      dcn_bandwidth=6.25e9 / 2,
      per_chip=2,
    ),
    _tpu(
      'v5e',
      flops=197e12,
      hbm_bytes=int(15.75 * GIB),
      hbm_bandwidth=819e9,
      link_bandwidth=50e9,
      torus=2,
      wraps=16,
      dcn_bandwidth=3.125e9,
    ),
    _tpu(
      'v5p',
      flops=459e12,
      hbm_bytes=int(95.74 * GIB),
      hbm_bandwidth=2765e9,
      link_bandwidth=100e9,
      torus=3,
      wraps=4,
      dcn_bandwidth=6.25e9,
    ),
    _tpu(
      'v6e',
      flops=918e12,
      hbm_bytes=int(31.25 * GIB),
      hbm_bandwidth=1640e9,
      link_bandwidth=100e9,
      torus=2,
      wraps=16,
      dcn_bandwidth=12.5e9,
    ),
    _tpu(
      'tpu7x',
      flops=2307e12 / 2,
      hbm_bytes=int(94.75 * GIB),
      hbm_bandwidth=7380e9 / 2,
      link_bandwidth=100e9 / 2,
      torus=3,
      wraps=4,
      dcn_bandwidth=12.5e9 / 2,
      per_chip=2,
    ),
    _gpu(
      'h100',
      flops=989e12,
      hbm_bytes=84_929_347_584,
      hbm_bandwidth=3352.32e9,
      link_bandwidth=450e9,
      dcn_bandwidth=50e9,
    ),
    _gpu(
      'h200',
      flops=989e12,
      hbm_bytes=150_110_011_392,
      hbm_bandwidth=4800e9,
      link_bandwidth=450e9,
      dcn_bandwidth=50e9,
    ),
  )
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """So many chips, wired so."""

  chip: Chip
  dims: tuple[int, ...]  # of one slice: chips along each dimension of the torus, or (GPUs,)
  num_slices: int  # joined by the slow network

  @property
  def name(self) -> str:
    slices = f'*{self.num_slices}' if self.num_slices > 1 else ''
    return f'{self.chip.name}:{"x".join(map(str, self.dims))}{slices}'

  @property
  def num_devices(self) -> int:
    return math.prod(self.dims) * self.chip.per_chip * self.num_slices

  @property
  def libtpu_name(self) -> str:
    """Of one slice, as `jax.experimental.topologies` takes it."""
    return f'{self.chip.name}:{"x".join(map(str, self.dims))}'


def gpus(count: int) -> int:
  """The most GPUs up to `count` that are part of one node or whole nodes."""
  return min(count, NODE) if count < 2 * NODE else count - count % NODE


def parse(text: str) -> Topology:
  """'v5p:8x8x8', 'v5e:16x16*2' (two slices) or 'h200:16' -> Topology.

  Raises:
    errors.InputError: the chip is unknown, or the shape is not one of its kind.
  """
  match = re.fullmatch(r'(\w+):(\d+(?:x\d+)*)(?:\*(\d+))?', text)
  if match is None or match[1] not in CHIPS:
    raise errors.InputError(
      f'--topology={text!r} must be CHIP:SHAPE with CHIP one of {", ".join(CHIPS)}, for example '
      'v5p:8x8x8, v5e:16x16, two slices of it v5e:16x16*2, or h200:8'
    )
  chip, dims = CHIPS[match[1]], tuple(map(int, match[2].split('x')))
  num_slices = int(match[3] or 1)
  wanted = chip.torus or 1
  errors.require(
    len(dims) == wanted and min(dims) > 0 and num_slices > 0,
    f'--topology={text!r}: {chip.name} has {wanted} dimension(s), so its shape is written '
    f'{"x".join(["N"] * wanted)}, with positive numbers',
  )
  if chip.kind == 'gpu':
    errors.require(
      num_slices == 1 and dims[0] == gpus(dims[0]),
      f'--topology={text!r} must name at most {NODE} GPUs of one node, or whole nodes of {NODE}',
    )
  return Topology(chip, dims, num_slices)
