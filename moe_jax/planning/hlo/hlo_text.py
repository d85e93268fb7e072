"""Reads the text of a compiled program (`compiled.as_text()`): computations, instructions, loops.

Only what the accounting of `hlo` and `hlo_cost` needs. A loop's trip count is the one that XLA
recorded, or else follows from the loop's condition: TPU programs do not record it.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

BITS = {
  'pred': 8,
  **{f'{kind}{bits}': bits for kind in 'su' for bits in (2, 4, 8, 16, 32, 64)},
  **{'f16': 16, 'bf16': 16, 'f32': 32, 'f64': 64, 'c64': 64, 'c128': 128, 'f4e2m1fn': 4},
}

_COMPUTATION = re.compile(r'(ENTRY )?%?([\w.-]+) \(.*\{$')
# The type ends at the first ` opcode(`, the operands at the first `)` before an attribute.
_INSTRUCTION = re.compile(
  r'\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*?)\)(?:, ([a-z_]+=.*))?$'
)
_SHAPE = re.compile(r'([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?')
_BRANCHES = re.compile(
  r'(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=(%?[\w.-]+))'
)


@dataclasses.dataclass(frozen=True)
class Shape:
  """One array."""

  dtype: str
  dims: tuple[int, ...]
  layout: str  # what stands in braces: order of the dimensions, tiles, memory space

  @property
  def on_chip(self) -> bool:
    """In a memory of its own (TPU's VMEM and SMEM), not in HBM."""
    return bool(re.search(r'S\([1-4]\)', self.layout))

  @property
  def on_host(self) -> bool:
    return 'S(5)' in self.layout

  @property
  def size(self) -> int:
    return math.prod(self.dims)

  @property
  def bytes(self) -> int:
    """Without the padding of the device's layout; 0 for tokens and the like."""
    return -(-self.size * self._bits // 8)

  @property
  def padded_bytes(self) -> int:
    """With it: a tile T(8,128) rounds the two minor dimensions up."""
    order, _, tiles = self.layout.partition(':')
    tile = re.match(r'T\(([\d,]+)\)', tiles)
    if not self.dims or tile is None:
      return self.bytes
    sizes = [self.dims[int(i)] for i in order.split(',')]  # minor dimension first
    for place, unit in enumerate(reversed(tile[1].split(','))):
      if place < len(sizes):
        sizes[place] = -(-sizes[place] // int(unit)) * int(unit)
    return -(-math.prod(sizes) * self._bits // 8)

  @property
  def _bits(self) -> int:
    return 8 if self.dtype.startswith('f8') else BITS.get(self.dtype, 0)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation."""

  name: str
  opcode: str
  type: str
  arguments: str  # between the parentheses, unparsed
  attributes: str  # behind them, unparsed
  is_root: bool

  @functools.cached_property
  def shapes(self) -> tuple[Shape, ...]:
    """Of its results, flat."""
    return shapes_of(self.type)

  @functools.cached_property
  def operands(self) -> tuple[str, ...]:
    """Names of its operands."""
    return tuple(re.findall(r'%([\w.-]+)', self.arguments))

  @property
  def bytes(self) -> int:
    return sum(shape.bytes for shape in self.shapes)

  @property
  def op_name(self) -> str:
    """The path of named scopes that made it; '' without one."""
    match = re.search(r'op_name="([^"]*)"', self.attributes)
    return match[1] if match else ''

  @functools.cached_property
  def called(self) -> tuple[str, ...]:
    """Computations that it runs: of a fusion, call, conditional or asynchronous start.

    Not the body of a loop, which runs many times, and not the scalar function of a reduction.
    """
    if self.opcode in ('fusion', 'async-start', 'call'):
      names = re.findall(r'(?:calls|to_apply)=%?([\w.-]+)', self.attributes)
    elif self.opcode == 'conditional':
      branches = _BRANCHES.findall(self.attributes)
      names = [name.strip() for some in branches for part in some for name in part.split(',')]
    else:
      names = []
    return tuple(name.lstrip('%') for name in names if name)


def shapes_of(text: str) -> tuple[Shape, ...]:
  """The arrays of a type, `f32[2,3]{1,0}` or a tuple of such."""
  return tuple(
    Shape(
      dtype,
      tuple(int(d.lstrip('<=')) for d in dims.split(',') if d),
      layout,
    )
    for dtype, dims, layout in _SHAPE.findall(text)
  )


class Computation:
  """A named list of instructions."""

  def __init__(self, name: str):
    self.name = name
    self.instructions: dict[str, Instruction] = {}

  @functools.cached_property
  def root(self) -> Instruction:
    return next(i for i in self.instructions.values() if i.is_root)

  def shapes(self, instruction: Instruction, number: int) -> tuple[Shape, ...]:
    """Of one of the operands of an instruction."""
    return self.instructions[instruction.operands[number]].shapes

  def operand_bytes(self, instruction: Instruction) -> int:
    """Of all operands together."""
    return sum(self.instructions[name].bytes for name in instruction.operands)


@dataclasses.dataclass(frozen=True)
class Module:
  """A whole program."""

  computations: dict[str, Computation]
  entry: str
  num_partitions: int  # devices that the program addresses

  def runs(self) -> Iterator['Run']:
    """Every computation that is run from the entry, once for each place that it is run from."""
    yield from _runs(self, self.computations[self.entry], 1, False, True)


@dataclasses.dataclass(frozen=True)
class Run:
  """A computation in one of the places that run it."""

  computation: Computation
  count: int  # how often in one execution of the program, all loops around it multiplied out
  in_fusion: bool  # its values stay in registers
  is_known: bool  # False inside a loop whose trip count depends on data: counted once


def _runs(
  module: Module, computation: Computation, count: int, in_fusion: bool, is_known: bool
) -> Iterator[Run]:
  yield Run(computation, count, in_fusion, is_known)
  for instruction in computation.instructions.values():
    if instruction.opcode == 'while':
      trips = trip_count(module, computation, instruction)
      known = is_known and trips is not None
      turns = count * (1 if trips is None else trips)
      # The condition runs once more than the body, and does nothing worth that care.
      for part in ('body', 'condition'):
        inner = module.computations[attribute(instruction, part)]
        yield from _runs(module, inner, turns, in_fusion, known)
    inside = in_fusion or instruction.opcode == 'fusion'
    for name in instruction.called:
      yield from _runs(module, module.computations[name], count, inside, is_known)


def parse(text: str) -> Module:
  """The computations of a program's text."""
  computations, entry, current = {}, '', None
  for line in text.splitlines():
    if line[:1] not in (' ', '}', ''):
      match = _COMPUTATION.match(line)
      if match:
        current = computations[match[2]] = Computation(match[2])
        entry = match[2] if match[1] else entry
    elif current is not None and line[:1] == ' ':
      match = _INSTRUCTION.match(line)
      if match:
        root, name, type_, opcode, arguments, attributes = match.groups()
        current.instructions[name] = Instruction(
          name, opcode, type_, arguments, attributes or '', bool(root)
        )
  partitions = re.search(r'num_partitions=(\d+)', text[: text.find('\n')])
  return Module(computations, entry, int(partitions[1]) if partitions else 1)


def search(pattern: str, text: str) -> re.Match[str]:
  """The first match of a regular expression.

  Raises:
    ValueError: there is none, as when the compiler has changed its spelling.
  """
  match = re.search(pattern, text)
  if match is None:
    raise ValueError(f'no {pattern} in {text[:200]!r}')
  return match


def attribute(instruction: Instruction, name: str) -> str:
  """The name or number behind `name=` in the attributes of an instruction."""
  return search(rf'{name}=%?([\w.-]+)', instruction.attributes)[1]


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
  """How often the body of the `while` instruction `loop` of `computation` runs.

  Returns:
    None if it depends on data.
  """
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
  if known:
    return int(known[1])
  condition = module.computations[attribute(loop, 'condition')]
  compared = _compared(module, condition)
  if compared is None:
    return None
  counter, bound, direction = compared
  start = _constant(computation, loop.operands[0], counter)
  step = _step(module.computations[attribute(loop, 'body')], counter)
  limit = bound if isinstance(bound, int) else _constant(computation, loop.operands[0], bound[0])
  if start is None or limit is None or not step:
    return None
  distance = (limit - start) * (1 if step > 0 else -1)
  if direction in ('LE', 'GE'):
    distance += 1
  return max(0, -(-distance // abs(step)))


def _compared(module: Module, condition: Computation) -> tuple[int, int | tuple[int], str] | None:
  """(place of the counter, its bound or the bound's (place,), direction) of a loop's condition."""
  root, scope, arguments = condition.root, condition, None
  if root.opcode == 'fusion':  # CPU and GPU wrap the comparison
    scope, arguments = module.computations[root.called[0]], root.operands
    root = scope.root
  if root.opcode != 'compare':
    return None
  sides = [_resolve(condition, scope, arguments, name) for name in root.operands]
  direction = search(r'direction=(\w+)', root.attributes)[1]
  left, right = sides
  if isinstance(left, tuple) and right is not None:
    return left[0], right, direction
  return None


def _resolve(
  condition: Computation, scope: Computation, arguments: tuple[str, ...] | None, name: str
) -> int | tuple[int] | None:
  """A constant's value, or (place,) of an element of the loop's state."""
  instruction = scope.instructions[name]
  if instruction.opcode == 'parameter' and arguments is not None:
    name = arguments[int(instruction.arguments)]
    return _resolve(condition, condition, None, name)
  if instruction.opcode == 'constant':
    return int(instruction.arguments) if re.fullmatch(r'-?\d+', instruction.arguments) else None
  if instruction.opcode in ('copy', 'bitcast'):
    return _resolve(condition, scope, arguments, instruction.operands[0])
  if instruction.opcode == 'get-tuple-element':
    return (int(attribute(instruction, 'index')),)
  return None


def _constant(computation: Computation, state: str, place: int) -> int | None:
  """The value that an element of a loop's state starts with, if it is a constant."""
  instruction = computation.instructions[state]
  if instruction.opcode == 'tuple':
    instruction = computation.instructions[instruction.operands[place]]
  while instruction.opcode in ('copy', 'bitcast', 'copy-start', 'copy-done'):
    instruction = computation.instructions[instruction.operands[0]]
  is_number = instruction.opcode == 'constant' and re.fullmatch(r'-?\d+', instruction.arguments)
  return int(instruction.arguments) if is_number else None


def _step(body: Computation, place: int) -> int | None:
  """What a loop's body adds to an element of its state."""
  if body.root.opcode != 'tuple':
    return None
  instruction = body.instructions[body.root.operands[place]]
  while instruction.opcode in ('copy', 'bitcast'):
    instruction = body.instructions[instruction.operands[0]]
  if instruction.opcode not in ('add', 'fusion'):
    return None
  values = [body.instructions[name] for name in instruction.operands]
  steps = [int(v.arguments) for v in values if v.opcode == 'constant']
  # A fused addition has its constant inside; loops of the kind that scans make count by one.
  return steps[0] if instruction.opcode == 'add' and steps else 1
