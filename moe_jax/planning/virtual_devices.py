"""What expert parallelism would cost on P devices, from assignments alone; no device is needed.

Experts lie on devices in contiguous blocks, the last of which may be smaller; the tokens of batch
row r are at home on device r modulo P. A token is sent once to each device that has one of its
experts, whatever their number, and comes back once: 2 x embed_dim numbers in a forward pass unless
that device is its home.

Axis letters are those of `moe_jax.models`.
"""

import collections
import dataclasses
import fractions
import math
from collections.abc import Sequence

import numpy as np

from moe_jax import errors
from moe_jax.balance import router_stats
from moe_jax.config import moe_config, router_traits


@dataclasses.dataclass(frozen=True)
class Report:
  """The figures of one batch; nothing is dropped but where a drop rate says so."""

  num_devices: int  # P
  num_tokens: int  # real tokens
  capacity_factor: float
  device_load: np.ndarray  # [layers, P] int64, assignments
  tokens_sent: np.ndarray  # [layers, P, P] int64, tokens of device i with an expert on device j
  devices_per_token: np.ndarray  # [layers, P + 1] int64, tokens that use 0, 1 ... P devices
  all_to_all_bytes_per_token: np.ndarray  # [layers] float64, dispatch + combine of a forward pass
  straggler_factor: np.ndarray  # [layers] float64, max / mean of device_load
  expert_drop_rate: np.ndarray  # [layers] float64, at capacity_factor of the mean load per expert
  device_drop_rate: np.ndarray  # [layers] float64, the same per device

  def over_limit(self, limit: int) -> np.ndarray:
    """[layers] float64, share of the tokens that need more than `limit` devices."""
    return self.devices_per_token[:, limit + 1 :].sum(axis=1) / self.num_tokens

  @property
  def mean_devices(self) -> np.ndarray:
    """[layers] float64, devices per token."""
    return self.devices_per_token @ np.arange(self.num_devices + 1) / self.num_tokens

  def __str__(self) -> str:
    return table(self)


def report(
  expert_idx: np.ndarray,
  num_experts: int,
  num_devices: int,
  *,
  rows: np.ndarray | None = None,
  mask: np.ndarray | None = None,
  capacity_factor: float,
  embed_dim: int,
  bytes_per_number: int,
) -> Report:
  """Deals the assignments of one batch to virtual devices.

  Args:
    expert_idx: [layers, B, L, K] integers; E is no expert.
    num_experts: E.
    num_devices: P.
    rows: [B] number of each row in the whole batch; None counts from 0.
    mask: [B, L] bool, the real tokens; None = those that any layer gave an expert, which is all of
      them unless experts choose their tokens.
    capacity_factor: room of an expert (a device), as a multiple of the batch's mean load.
    embed_dim: numbers that a token has on its way.
    bytes_per_number: of these.

  Raises:
    errors.InputError: P leaves a device without an expert, or no token has an expert.
  """
  _check(expert_idx, num_experts, num_devices)
  if mask is None:
    mask = np.asarray((expert_idx < num_experts).any(axis=(0, 3)))
  num_tokens = int(mask.sum())
  errors.require(num_tokens > 0, 'expert_idx assigns no token to any expert; nothing to report')
  rows = np.arange(expert_idx.shape[1]) if rows is None else np.asarray(rows)
  home = np.broadcast_to(rows[:, None] % num_devices, mask.shape)[mask]
  layers = [_layer(layer[mask], home, num_experts, num_devices) for layer in expert_idx]
  load, sent, histogram = (np.stack(arrays) for arrays in zip(*layers))
  device_load = router_stats.device_load(load, num_devices)
  remote = sent.sum(axis=(1, 2)) - np.trace(sent, axis1=1, axis2=2)
  return Report(
    num_devices=num_devices,
    num_tokens=num_tokens,
    capacity_factor=capacity_factor,
    device_load=device_load,
    tokens_sent=sent,
    devices_per_token=histogram,
    all_to_all_bytes_per_token=remote / num_tokens * embed_dim * bytes_per_number * 2,
    straggler_factor=np.asarray(router_stats.max_vio(device_load) + 1),
    expert_drop_rate=_drop_rate(load, capacity_factor),
    device_drop_rate=_drop_rate(device_load, capacity_factor),
  )


def _check(expert_idx: np.ndarray, num_experts: int, num_devices: int):
  if expert_idx.ndim != 4 or expert_idx.min() < 0 or expert_idx.max() > num_experts:
    raise ValueError(
      f'expert_idx {expert_idx.shape} must be [layers, B, L, K] with values 0 to {num_experts}'
    )
  size = moe_config.group_size(num_experts, num_devices)
  errors.require(
    size * (num_devices - 1) < num_experts,
    f'{num_devices} virtual devices leave one without an expert: {num_experts} experts are cut '
    f'into blocks of {size}; choose a divisor of {num_experts}',
  )


def _layer(
  expert_idx: np.ndarray, home: np.ndarray, num_experts: int, num_devices: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """expert_idx [T, K], home [T] -> load [E], tokens_sent [P, P], devices per token [P + 1]."""
  token, column = np.nonzero(expert_idx < num_experts)
  expert = expert_idx[token, column]
  on = np.zeros((len(expert_idx), num_devices), bool)
  on[token, expert // moe_config.group_size(num_experts, num_devices)] = True
  sent = np.stack([on[home == device].sum(axis=0) for device in range(num_devices)])
  histogram = np.bincount(on.sum(axis=1), minlength=num_devices + 1)
  return np.bincount(expert, minlength=num_experts), sent, histogram


def _drop_rate(load: np.ndarray, factor: float) -> np.ndarray:
  """Share above a capacity of factor x mean load, rounded up: [layers, parts] -> [layers]."""
  total = load.sum(axis=1)
  # The decimal number that was written, as in `models.routers.capacity`: 0.07 as a float is more.
  exact = fractions.Fraction(str(factor))
  room = np.array([math.ceil(exact * int(n) / load.shape[1]) for n in total])
  return np.maximum(load - room[:, None], 0).sum(axis=1) / np.maximum(total, 1)


def table(report: Report, limits: Sequence[int] = (1, 2, 3, 4)) -> str:
  """A line per layer and one of means; `> M` is the share of tokens that need more than M devices.

  Args:
    report: what to print.
    limits: the M to print; those that no token can exceed are left out.
  """
  limits = [m for m in limits if m < report.num_devices]
  columns = {
    'devices/token': (report.mean_devices, '{:.2f}'),
    **{f'> {m}': (report.over_limit(m), '{:.1%}') for m in limits},
    'bytes/token': (report.all_to_all_bytes_per_token, '{:,.0f}'),
    'straggler': (report.straggler_factor, '{:.3f}'),
    'expert drops': (report.expert_drop_rate, '{:.1%}'),
    'device drops': (report.device_drop_rate, '{:.1%}'),
  }
  lines = [['layer', *columns]]
  for layer in range(len(report.device_load)):
    lines.append([str(layer), *(form.format(v[layer]) for v, form in columns.values())])
  lines.append(['mean', *(form.format(v.mean()) for v, form in columns.values())])
  widths = [max(map(len, column)) for column in zip(*lines)]
  text = ['  '.join(c.rjust(w) for c, w in zip(line, widths)) for line in lines]
  head = (
    f'{report.num_tokens:,} tokens on {report.num_devices} virtual devices, '
    f'drops at capacity factor {report.capacity_factor:g}'
  )
  return '\n'.join([head, *text])


def expected_bytes_per_token(
  moe: moe_config.MoEConfig, embed_dim: int, bytes_per_number: int
) -> float:
  """All-to-all bytes per token and MoE layer, dispatch + combine of a forward pass, in expectation.

  For `moe.num_virtual_devices` devices, each as likely a token's home, when routing is uniformly
  random; see `expected_devices_per_token`.
  """
  d = moe.num_virtual_devices
  return expected_devices_per_token(moe) * (d - 1) / d * embed_dim * bytes_per_number * 2


def expected_devices_per_token(moe: moe_config.MoEConfig, train: bool = True) -> float:
  """Mean number of virtual devices with an expert of a token, exact for uniformly random routing.

  Each token draws its K active experts, all different, from M groups drawn before if groups limit
  it; where tokens have no fixed number of experts each expert has a token with probability K / E.
  Drops, and second experts that GShard's rule leaves out, are not considered.
  """
  devices = range(moe.num_virtual_devices)
  return sum(1 - _unused(moe, device, train) for device in devices)


def _unused(moe: moe_config.MoEConfig, device: int, train: bool) -> float:
  """Probability that a token has no expert on `device`."""
  traits = router_traits.of(moe)
  k, e = traits.active_experts(moe, train), moe.num_experts
  if not traits.ranked:
    on_device = int((_blocks(e, moe.num_virtual_devices) == device).sum())
    return (1 - k / e) ** on_device
  reachable = _reachable(moe, device)
  # Hypergeometric: all K come from the experts in reach that are elsewhere.
  missed = sum(
    ways * (math.comb(n - on_device, k) / math.comb(n, k))
    for (n, on_device), ways in reachable.items()
  )
  return missed / sum(reachable.values())


def _blocks(num_experts: int, num_groups: int) -> np.ndarray:
  """[E] int, the group of each expert."""
  return np.arange(num_experts) // moe_config.group_size(num_experts, num_groups)


def _reachable(moe: moe_config.MoEConfig, device: int) -> dict[tuple[int, int], int]:
  """Counts the choices of M groups by (experts in them, those of them on `device`).

  Choices are counted group by group, not listed: there are C(160, 3) for some models.
  """
  group = _blocks(moe.num_experts, moe.num_expert_groups)
  here = _blocks(moe.num_experts, moe.num_virtual_devices) == device
  limit = moe.num_limited_groups if moe.num_expert_groups > 1 else 1
  ways = collections.Counter({(0, 0, 0): 1})
  for index in range(moe.num_expert_groups):
    size, on_device = int((group == index).sum()), int((here & (group == index)).sum())
    for (chosen, n, on), count in list(ways.items()):
      if chosen < limit:
        ways[chosen + 1, n + size, on + on_device] += count
  return {(n, on): count for (chosen, n, on), count in ways.items() if chosen == limit}
