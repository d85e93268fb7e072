"""What a compiled program sends between devices, read from its text.

Every collective is counted where it runs: inside loops as often as the loop turns, inside fusions
and called computations, asynchronous pairs once. Bytes are what one device puts on the wire in a
ring of the n devices of its group:

  all-gather           (n - 1) / n of the full result
  reduce-scatter       (n - 1) / n of the operand
  all-reduce           both of them: 2 (n - 1) / n of the operand
  all-to-all           (n - 1) / n of the operand
  ragged-all-to-all    (n - 1) / n of the operand or the result, whichever is smaller: one of them
                       is a buffer that some devices do not fill
  collective-permute   the operand

Between slices a TPU program has no collectives but transfers through the host, which carry the name
of the collective that they are a part of and are counted by the same rules.
"""

import collections
import dataclasses
import math
import re
from typing import Any

import numpy as np

from moe_jax.planning.hlo import hlo_text

KINDS = (
  'all-gather',
  'all-reduce',
  'all-to-all',
  'collective-broadcast',
  'collective-permute',
  'ragged-all-to-all',
  'reduce-scatter',
)
# Of the operand, for a group of n devices.
_ON_THE_WIRE = {
  'all-gather': lambda n: n - 1,
  'all-reduce': lambda n: 2 * (n - 1) / n,
  'all-to-all': lambda n: (n - 1) / n,
  'collective-broadcast': lambda n: 1,
  'collective-permute': lambda n: 1,
  'ragged-all-to-all': lambda n: (n - 1) / n,
  'reduce-scatter': lambda n: (n - 1) / n,
}
_BETWEEN_SLICES = {'ONE_TO_ONE': 'collective-permute'}
_SLICE = 100_000  # a multi-slice topology numbers its devices from here, and again for each slice


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective instruction."""

  kind: str  # one of KINDS
  axes: tuple[str, ...]  # mesh axes along which data moves, in the order of the mesh
  bytes: float  # that one device puts on the wire per execution
  count: int  # executions per run of the program
  op_name: str  # named scopes, '' where the compiler kept none
  is_known: bool = True  # False in a loop whose turns depend on data: counted once

  @property
  def total(self) -> float:
    """Bytes per device and run of the program."""
    return self.bytes * self.count


def collectives(text: str, mesh: Any) -> list[Collective]:
  """Every collective of a compiled program that moves data between devices.

  Args:
    text: `compiled.as_text()`.
    mesh: the `jax.sharding.Mesh` that it was compiled for.

  Returns:
    In the order of the text, one entry for each place that runs the instruction.
  """
  module = hlo_text.parse(text)
  groups = _Groups(mesh, module.num_partitions)
  result, chains = [], {}
  for run in module.runs():
    scatters = _scatters(run.computation) if run.in_fusion else False
    for instruction in run.computation.instructions.values():
      kind = _kind(instruction)
      if kind is None:
        continue
      group = groups.of(instruction)
      if len(group) < 2:
        continue
      operand = _operand_bytes(run.computation, instruction, kind)
      if kind == 'all-reduce' and scatters:
        kind = 'reduce-scatter'
      one = Collective(
        kind=kind,
        axes=groups.axes(group),
        bytes=operand * on_the_wire(kind, len(group)),
        count=run.count,
        op_name=instruction.op_name,
        is_known=run.is_known,
      )
      chain = _chain(instruction)
      if chain is None:
        result.append(one)
      elif chain not in chains:
        chains[chain] = len(result)
        result.append(one)
      elif one.count < result[chains[chain]].count:
        result[chains[chain]] = one
  return result


def _chain(instruction: hlo_text.Instruction) -> tuple[str, ...] | None:
  """What the pieces of one collective share that TPUs spread over fusions, to run beside them.

  Some of the fusions stand in a loop of their own: it runs as often as the piece that runs least.
  """
  chain = re.search(r'chain_id="(\d+)"', instruction.attributes)
  channel = re.search(r'channel_id=(\d+)', instruction.attributes)
  return (instruction.opcode, channel[1], chain[1]) if chain and channel else None


def summary(text: str, mesh: Any) -> str:
  """The collectives of a program in a few lines, the same for the same program.

  One line per (kind, mesh axes, how often), with the number of instructions and the bytes that one
  device puts on the wire per run of the program.
  """
  rows = collections.defaultdict(lambda: [0, 0.0])
  for one in collectives(text, mesh):
    where = 'once' if one.is_known and one.count == 1 else f'in loop x{one.count}'
    row = rows[one.kind, '+'.join(one.axes), where if one.is_known else 'in loop x?']
    row[0] += 1
    row[1] += one.total
  lines = [
    f'{kind:<18}  {axes:<24}  {where:<14}  {ops:>4} ops  {round(size):>16,} bytes'
    for (kind, axes, where), (ops, size) in sorted(rows.items())
  ]
  return '\n'.join(lines) if lines else 'no collectives'


def on_the_wire(kind: str, n: int) -> float:
  """Bytes that a device of a group of n sends for each byte of its operand."""
  return _ON_THE_WIRE[kind](n)


def bytes_by_axes(transfers: list[Collective]) -> dict[str, dict[str, float]]:
  """{'fsdp': {'all-gather': bytes}, 'data+fsdp': ...} per device and run of the program."""
  totals: dict[str, dict[str, float]] = {}
  for one in transfers:
    by_kind = totals.setdefault('+'.join(one.axes), {})
    by_kind[one.kind] = by_kind.get(one.kind, 0.0) + one.total
  return {axes: dict(sorted(by_kind.items())) for axes, by_kind in sorted(totals.items())}


def _kind(instruction: hlo_text.Instruction) -> str | None:
  """The kind of a collective; None for other instructions, and for the end of a pair."""
  if instruction.opcode == 'send':
    transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
    if transfer is None:
      return None
    return _BETWEEN_SLICES.get(transfer[1], transfer[1].lower().replace('_', '-'))
  kind = instruction.opcode.removesuffix('-start')
  return kind if kind in KINDS else None


def _operand_bytes(
  computation: hlo_text.Computation, instruction: hlo_text.Instruction, kind: str
) -> int:
  """Bytes of what is sent: all operands, or the first where the others only say how."""
  first = computation.instructions[instruction.operands[0]].bytes
  if instruction.opcode == 'send' or kind == 'collective-permute':
    return first
  if kind == 'ragged-all-to-all':
    return min(first, instruction.bytes)
  return computation.operand_bytes(instruction)


def _scatters(computation: hlo_text.Computation) -> bool:
  """Whether an all-reduce in this fusion keeps only the device's own part."""
  root = computation.root
  while root.opcode in ('bitcast', 'copy', 'reshape', 'convert'):
    root = computation.instructions[root.operands[0]]
  return root.opcode == 'dynamic-slice'


class _Groups:
  """Groups of devices in the spellings of compiled programs, and the mesh axes that they run along.

  Devices are numbered in the order of the mesh; with several slices, from 0 in each slice.
  """

  def __init__(self, mesh: Any, num_partitions: int):
    self._names, sizes = tuple(mesh.shape), tuple(mesh.shape.values())
    self._ids = np.array([getattr(d, 'id', i) for i, d in enumerate(_devices(mesh))])
    self._sizes = sizes
    outer = 0
    while math.prod(sizes[outer:]) > num_partitions:
      outer += 1
    self._inner = (1,) * outer + sizes[outer:]  # the mesh of one slice

  def of(self, instruction: hlo_text.Instruction) -> list[tuple[int, ...]]:
    """Places on the mesh of the devices of the first group, or of the ends of a permutation."""
    if instruction.opcode == 'send':
      return self._of_slices(instruction.attributes)
    pairs = re.search(r'source_target_pairs=\{(.*?)\}\}', instruction.attributes)
    if pairs:
      ends = [tuple(map(int, p)) for p in re.findall(r'(\d+),(\d+)', pairs[1])]
      return self._of_pairs([self._place(end) for pair in ends for end in pair])
    group = _first_group(instruction.attributes, math.prod(self._inner))
    return [self._place(number) for number in group]

  def axes(self, group: list[tuple[int, ...]]) -> tuple[str, ...]:
    """Axes along which the members of a group differ."""
    different = (np.array(group) != group[0]).any(axis=0)
    return tuple(name for name, differs in zip(self._names, different) if differs)

  def _place(self, number: int) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(number, self._inner))

  def _of_pairs(self, ends: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """A group that differs along every axis along which any pair does; [] if none does."""
    places = np.array(ends).reshape(-1, 2, len(self._names))
    moved = (places[:, 0] != places[:, 1]).any(axis=0)
    origin = (0,) * len(self._names)
    return [origin, tuple(int(m) for m in moved)] if moved.any() else []

  def _of_slices(self, attributes: str) -> list[tuple[int, ...]]:
    """Transfers between slices name devices by id, or as {slices}x{first:last device}."""
    product = re.search(r'_xla_megascale_target="\{([\d,]+)\}x\{(\d+)', attributes)
    if product:
      ids = [int(s) * _SLICE + int(product[2]) for s in product[1].split(',')]
      return self._places_of(ids)
    target = hlo_text.search(r'_xla_megascale_target=\{\{(.*?)\}\}', attributes)[1]
    if '->' in target:
      pairs = re.findall(r'(\d+)->(\d+)', target.replace('{', '').replace('}', ''))
      return self._of_pairs(self._places_of([int(end) for pair in pairs for end in pair]))
    return self._places_of([int(i) for i in target.split('}')[0].split(',')])

  def _places_of(self, ids: list[int]) -> list[tuple[int, ...]]:
    number = {int(i): place for place, i in enumerate(self._ids)}
    return [tuple(int(i) for i in np.unravel_index(number[i], self._sizes)) for i in ids]


def _devices(mesh: Any) -> list[Any]:
  """Its devices in order; numbers for an abstract mesh."""
  devices = getattr(mesh, 'devices', None)
  if devices is None:
    return list(range(math.prod(mesh.shape.values())))
  return list(devices.flat)


def _first_group(attributes: str, num_devices: int) -> list[int]:
  """The first group of devices of a collective.

  Spellings: {{0,1},{2,3}}, [2,4]<=[8], [2,4]<=[2,4]T(1,0), and mesh['a'=2,'b'=4] {'b'} with the
  devices in another order after `device_ids=`. Empty: all devices are one group.
  """
  explicit = re.search(r'replica_groups=\{(?:\{([\d,]*)\}|\})', attributes)
  if explicit:
    return [int(i) for i in explicit[1].split(',')] if explicit[1] else list(range(num_devices))
  iota = re.search(r'replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)', attributes)
  if iota:
    return [int(i) for i in _iota(iota[1])[0]]
  named = re.search(
    r'replica_groups=@?\w*mesh\w*\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{(.*?)\}', attributes
  )
  if named is None:
    raise ValueError(f'unknown spelling of replica groups: {attributes[:200]}')
  return _group_of_mesh(named[1], named[2], named[3])


def _iota(text: str) -> np.ndarray:
  """[2,4]<=[4,2]T(1,0): 0..7 as 4 x 2, transposed, as 2 x 4."""
  pattern = r'^\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?$'
  shape, source, order = hlo_text.search(pattern, text).groups()

  def numbers(part):
    return [int(i) for i in part.split(',')]

  shape, source = numbers(shape), numbers(source or shape)
  ids = np.arange(math.prod(source)).reshape(source)
  return (ids.transpose(numbers(order)) if order else ids).reshape(shape)


def _group_of_mesh(sizes: str, device_ids: str | None, along: str) -> list[int]:
  """The group of device 0 in a mesh that the compiler named, along some of its axes.

  An axis may be split: 'a':(2)4 is the part of size 4 inside of one of size 2.
  """
  size_of = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", sizes)}
  ids = np.arange(math.prod(size_of.values()))
  if device_ids:
    ids = _device_order(device_ids)
  shape, kept = [], []
  parts = {
    name: (pre, size) for name, pre, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", along)
  }
  for name, size in size_of.items():
    if name not in parts:
      shape, kept = [*shape, size], [*kept, False]
    elif not parts[name][0]:
      shape, kept = [*shape, size], [*kept, True]
    else:
      pre, own = map(int, parts[name])
      shape, kept = [*shape, pre, own, size // pre // own], [*kept, False, True, False]
  index = tuple(slice(None) if keep else 0 for keep in kept)
  return [int(i) for i in ids.reshape(shape)[index].flat]


def _device_order(text: str) -> np.ndarray:
  """`[2,2,2]T(1,0,2)` or a list of numbers, flat."""
  return _iota(text).reshape(-1) if '[' in text else np.array([int(i) for i in text.split(',')])
