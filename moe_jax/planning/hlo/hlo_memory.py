"""Which temporaries a compiled program holds when it holds most, and what made them.

A replay of the schedule: instructions in their order, every buffer from the instruction that makes
it to the last that reads it. Tuples, bitcasts and loops hand buffers on, and updates work in place
where the compiler says so. Its own assignment also moves buffers between memories and packs them
with gaps, so that its total differs: the planner shows both.
"""

import collections
import dataclasses
import re

from moe_jax.planning.hlo import hlo_text

_HAND_ON = ('bitcast', 'optimization-barrier', 'domain', 'add-dependency')


@dataclasses.dataclass(frozen=True, eq=False)
class Buffer:
  """One allocation in HBM; two are never equal."""

  bytes: int  # with the padding of the layout's tiles
  shape: hlo_text.Shape
  op_name: str  # named scopes of the instruction that made it
  name: str  # of that instruction


_Leaf = frozenset  # of buffers that an array may lie in: none for arguments of the program
_NOTHING = _Leaf()


def peak(text: str, scope: str = '') -> list[Buffer]:
  """The temporaries live at the program's peak, largest first.

  Args:
    text: `compiled.as_text()`.
    scope: only those made in this named scope, at the moment when most of them are alive; '' = all.
  """
  module = hlo_text.parse(text)
  most = _Replay(module, module.computations[module.entry], [], scope).most
  return sorted((b for b in most if b.bytes), key=lambda buffer: -buffer.bytes)


def scopes(op_name: str) -> set[str]:
  """The named scopes and functions on the path of an instruction."""
  return set(re.split(r'[/()]', op_name))


class _Replay:
  """One computation, run once; `most` is what it holds at its worst besides its parameters."""

  def __init__(
    self,
    module: hlo_text.Module,
    computation: hlo_text.Computation,
    parameters: list[list[_Leaf]],
    scope: str,
  ):
    self._module, self._computation, self._parameters = module, computation, parameters
    self._scope = scope
    self._values: dict[str, list[_Leaf]] = {}  # leaves of each instruction's result, flat
    self._made: dict[Buffer, int] = {}
    self._last_use = {}
    self._inner: dict[int, tuple[Buffer, ...]] = {}
    instructions = list(computation.instructions.values())
    readers = {name: n for n, i in enumerate(instructions) for name in i.operands}
    for now, instruction in enumerate(instructions):
      self._values[instruction.name] = self._run(now, instruction, readers)
      for name in (*instruction.operands, instruction.name):
        for leaf in self._values[name]:
          self._last_use |= dict.fromkeys(leaf, now)
    # What a computation returns lies where its caller wants it, and is counted there.
    self.results = self._values[computation.root.name]
    returned = set().union(*self.results)
    self.most = self._most(len(instructions), [b for b in self._made if b not in returned])

  def _run(
    self, now: int, instruction: hlo_text.Instruction, readers: dict[str, int]
  ) -> list[_Leaf]:
    """The leaves of an instruction's result."""
    operands = [self._values[name] for name in instruction.operands]
    opcode = instruction.opcode
    if opcode == 'parameter':
      number = int(instruction.arguments)
      given = self._parameters[number] if number < len(self._parameters) else []
      return given or [_NOTHING] * len(instruction.shapes)
    if opcode == 'tuple':
      return [leaf for operand in operands for leaf in operand]
    if opcode == 'get-tuple-element':
      return self._element(instruction, operands[0])
    if opcode in _HAND_ON:
      return operands[0]
    if opcode.endswith('-done'):
      return self._done(instruction, operands)
    if opcode == 'while':
      body = self._module.computations[hlo_text.attribute(instruction, 'body')]
      empty = [_NOTHING] * len(operands[0])
      self._inner[now] = tuple(_Replay(self._module, body, [empty], self._scope).most)
      return operands[0]  # updated in place
    if opcode in ('call', 'conditional', 'async-start'):
      return self._call(now, instruction, operands)
    return self._allocate(now, instruction, operands, readers)

  def _element(self, instruction: hlo_text.Instruction, leaves: list[_Leaf]) -> list[_Leaf]:
    place = int(hlo_text.attribute(instruction, 'index'))
    if len(instruction.shapes) == 1 and place < len(leaves):
      return [leaves[place]]
    return [_Leaf().union(*leaves)] * len(instruction.shapes)  # of a nested tuple: any of them

  def _done(self, instruction: hlo_text.Instruction, operands: list) -> list[_Leaf]:
    """What the start of an asynchronous pair has allocated, or handed on."""
    leaves = operands[0] if operands else []
    own = [b for leaf in leaves for b in leaf if b.name == instruction.operands[0]]
    shapes = instruction.shapes
    if len(own) == len(shapes):
      return [_Leaf([buffer]) for buffer in own]
    return [_Leaf() if shape.on_chip else _Leaf().union(*leaves) for shape in shapes]

  def _call(self, now: int, instruction: hlo_text.Instruction, operands: list) -> list[_Leaf]:
    """Runs what is called, the branches of a conditional one as good as the other."""
    arguments = operands[1:] if instruction.opcode == 'conditional' else operands
    best: tuple[Buffer, ...] = ()
    for number, name in enumerate(instruction.called):
      given = [arguments[number]] if instruction.opcode == 'conditional' else arguments
      ran = _Replay(self._module, self._module.computations[name], given, self._scope).most
      best = max(best, tuple(ran), key=lambda some: sum(b.bytes for b in some))
    self._inner[now] = best
    return self._allocate(now, instruction, operands, {})

  def _allocate(
    self,
    now: int,
    instruction: hlo_text.Instruction,
    operands: list[list[_Leaf]],
    readers: dict[str, int],
  ) -> list[_Leaf]:
    """New buffers, but for what may lie in an operand that nobody else reads later."""
    shared = _shared(instruction)
    leaves = []
    for number, shape in enumerate(instruction.shapes):
      held = shape.on_chip or shape.on_host or not shape.padded_bytes
      operand = shared.get(number)
      if held or instruction.opcode in ('constant', 'iota', 'partition-id'):
        leaves.append(_NOTHING)
      elif operand is not None and self._is_free(instruction, operand, now, readers):
        leaves.append(operands[operand][0])
      elif instruction.opcode.endswith('-start') and shape in self._shapes(instruction):
        leaves.append(operands[0][0])
      else:
        counts = not self._scope or self._scope in scopes(instruction.op_name)
        buffer = Buffer(counts * shape.padded_bytes, shape, instruction.op_name, instruction.name)
        self._made[buffer] = now
        leaves.append(_Leaf([buffer]))
    return leaves

  def _shapes(self, instruction: hlo_text.Instruction) -> tuple[hlo_text.Shape, ...]:
    """Of the operand that an asynchronous start carries along."""
    return self._computation.instructions[instruction.operands[0]].shapes

  def _is_free(
    self, instruction: hlo_text.Instruction, operand: int, now: int, readers: dict[str, int]
  ) -> bool:
    """Whether the operand is an array of one buffer that this instruction is the last to read."""
    name = instruction.operands[operand]
    return len(self._values[name]) == 1 and readers.get(name) == now

  def _most(self, length: int, buffers: list[Buffer]) -> list[Buffer]:
    begins, ends = collections.defaultdict(list), collections.defaultdict(list)
    for buffer in buffers:
      begins[self._made[buffer]].append(buffer)
      ends[self._last_use[buffer]].append(buffer)
    alive, size, best, best_size = {}, 0, [], 0
    for now in range(length):
      for buffer in begins[now]:
        alive[buffer] = None
        size += buffer.bytes
      inner = self._inner.get(now, ())
      total = size + sum(b.bytes for b in inner)
      if total > best_size:
        best, best_size = [*alive, *inner], total
      for buffer in ends[now]:
        del alive[buffer]
        size -= buffer.bytes
    return best


def _shared(instruction: hlo_text.Instruction) -> dict[int, int]:
  """Result -> operand that may lie in the same buffer."""
  if instruction.opcode == 'dynamic-update-slice':
    return {0: 0}
  pairs = re.findall(
    r'\{(\d*)\}: \((\d+), \{\}', _between(instruction.attributes, 'output_to_operand_aliasing')
  )
  operand_of = {int(result or 0): int(operand) for result, operand in pairs}
  count = len(instruction.operands)
  lists = _between(instruction.attributes, '"aliasing_operands"')
  for indices in re.findall(r'"indices":\[([^\]]*)\]', lists):
    numbers = [int(i) for i in re.findall(r'\d+', indices)]
    operands, results = [n for n in numbers if n < count], [n for n in numbers if n >= count]
    if operands and results:
      operand_of.setdefault(results[0] - count, operands[0])
  return operand_of


def _between(attributes: str, name: str) -> str:
  """What follows an attribute's name, up to where its value must have ended."""
  start = attributes.find(name)
  return attributes[start : start + 2000] if start >= 0 else ''
