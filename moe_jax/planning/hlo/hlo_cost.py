"""What a compiled program computes and moves between HBM and the chip, read from its text.

FLOPs are those of matrix products that XLA itself makes; kernels of our own (grouped products,
attention on TPU) are opaque to it and left out. Bytes are counted at the borders of fusions: every
operand and result that lies in HBM once per execution, of what is cut out of a larger array or
written into one only the part. Kernels count with all they are given, also rows that they skip.
"""

import dataclasses
import functools
import math
import re

from moe_jax.planning.hlo import hlo_text

# These hand on, describe, or are paid for by what they start or run.
_FREE = (
  *('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'call', 'iota'),
  *('conditional', 'after-all', 'partition-id', 'optimization-barrier', 'async-start', 'domain'),
)
_CUTS = ('dynamic-slice', 'slice', 'gather')


@dataclasses.dataclass(frozen=True)
class Cost:
  """Of one run of a program, per device."""

  dot_flops: float
  hbm_bytes: float
  kernels: int  # executions of kernels that the FLOPs leave out


def cost(text: str) -> Cost:
  """Counts a compiled program, loops multiplied out."""
  module = hlo_text.parse(text)
  flops = moved = kernels = 0
  for run in module.runs():
    for instruction in run.computation.instructions.values():
      flops += run.count * dot_flops(run.computation, instruction)
      if not run.in_fusion:
        moved += run.count * _moved(module, run.computation, instruction)
        kernels += run.count * ('tpu_custom_call' in instruction.attributes)
  return Cost(flops, moved, kernels)


def dot_flops(computation: hlo_text.Computation, instruction: hlo_text.Instruction) -> int:
  """2 FLOPs for each number of the result and each product that is added up in it."""
  if instruction.opcode == 'dot':
    (left,) = computation.shapes(instruction, 0)
    contracted = hlo_text.search(r'lhs_contracting_dims=\{([\d,]*)\}', instruction.attributes)[1]
    depth = math.prod(left.dims[int(i)] for i in contracted.split(',') if i)
    return 2 * instruction.shapes[0].size * depth
  return _convolution_flops(computation, instruction) if instruction.opcode == 'convolution' else 0


def _convolution_flops(computation: hlo_text.Computation, instruction: hlo_text.Instruction) -> int:
  """A convolution is what a product becomes on a TPU; its windows hold batches and second axes.

  Only the places of a window that lie on numbers count, not those on padding.
  """
  pattern = r'dim_labels=(\w+)_(\w+)->(\w+)'
  left, kernel, result = hlo_text.search(pattern, instruction.attributes).groups()
  (left_shape,), (kernel_shape,) = (computation.shapes(instruction, i) for i in (0, 1))

  def size(shape, labels, letter):
    return shape.dims[labels.index(letter)]

  window = dict(re.findall(r'(\w+)=([\dx_-]+)', _braces(instruction.attributes, 'window')))
  pairs = 1
  for place, letter in enumerate(sorted(set(result) - set('bf'))):
    option = functools.partial(_option, window, place)
    pairs *= _touching(
      size(instruction.shapes[0], result, letter),
      option('size', 1),
      size(left_shape, left, letter),
      option('pad', 0),
      option('stride', 1),
      option('lhs_dilate', 1),
    )
  outer = size(instruction.shapes[0], result, 'b') * size(instruction.shapes[0], result, 'f')
  return 2 * outer * size(kernel_shape, kernel, 'i') * pairs


def _touching(results: int, window: int, numbers: int, low: int, stride: int, dilate: int) -> int:
  """How many (result, place of the window) meet a number of the input along one dimension."""
  count = 0
  for result in range(results):
    first = result * stride - low
    count += sum(
      at % dilate == 0 and 0 <= at // dilate < numbers for at in range(first, first + window)
    )
  return count


def _option(window: dict[str, str], place: int, name: str, default: int) -> int:
  """A number of a window's description, of dimension `place`; of a padding the low side."""
  return int(window[name].split('x')[place].split('_')[0]) if name in window else default


def _braces(attributes: str, name: str) -> str:
  match = re.search(rf'{name}=\{{([^}}]*)\}}', attributes)
  return match[1] if match else ''


def _moved(
  module: hlo_text.Module, computation: hlo_text.Computation, instruction: hlo_text.Instruction
) -> int:
  if instruction.opcode in _FREE or instruction.opcode.endswith('-done'):
    return 0
  if instruction.opcode == 'custom-call' and 'AllocateBuffer' in instruction.attributes:
    return 0
  fused = module.computations[instruction.called[0]] if instruction.opcode == 'fusion' else None
  handed_on = set()
  if fused is not None and 'async_collective_fusion' in fused.name:
    # A piece of a collective rides along, whose buffers go through it.
    handed_on = {int(i) for i in re.findall(r'\}: \((\d+), \{', instruction.attributes)}
  read = 0
  for number, name in enumerate(instruction.operands):
    if number in handed_on:
      continue
    whole = _in_hbm(computation.instructions[name].shapes)
    if fused is not None:
      whole = min(whole, _read(module, fused, number, whole))
    elif instruction.opcode in _CUTS and number == 0:
      whole = _in_hbm(instruction.shapes)
    elif instruction.opcode == 'dynamic-update-slice' and number == 0:
      whole = 0
    read += whole
  if handed_on:
    return read + _in_hbm(instruction.shapes[:1])
  return read + _written(computation, instruction, fused)


def _in_hbm(shapes: tuple[hlo_text.Shape, ...]) -> int:
  return sum(shape.bytes for shape in shapes if not shape.on_chip)


def _read(module: hlo_text.Module, fused: hlo_text.Computation, number: int, whole: int) -> int:
  """Bytes that a fusion reads of an operand: what it cuts out, if it does nothing else with it."""
  name = next(
    i.name
    for i in fused.instructions.values()
    if i.opcode == 'parameter' and int(i.arguments) == number
  )
  return _used(module, fused, name, whole)


def _used(module: hlo_text.Module, fused: hlo_text.Computation, name: str, whole: int) -> int:
  total = 0
  for user in fused.instructions.values():
    if name not in user.operands:
      continue
    place = user.operands.index(name)
    if user.opcode in ('bitcast', 'copy', 'reshape'):
      total += _used(module, fused, user.name, whole)
    elif user.opcode == 'fusion':  # fusions nest
      total += _read(module, module.computations[user.called[0]], place, whole)
    elif user.opcode in _CUTS and place == 0:
      total += user.bytes
    elif user.opcode != 'dynamic-update-slice' or place:  # else written in place
      return whole
  return total


def _written(
  computation: hlo_text.Computation,
  instruction: hlo_text.Instruction,
  fused: hlo_text.Computation | None,
) -> int:
  """Bytes of the results; of an array that is updated in place, of the update."""
  whole = _in_hbm(instruction.shapes)
  if instruction.opcode == 'dynamic-update-slice':
    return min(whole, computation.instructions[instruction.operands[1]].bytes)
  if fused is None:
    return whole // 2 if instruction.opcode.endswith('-start') else whole
  roots = [fused.root]
  if fused.root.opcode == 'tuple':
    roots = [fused.instructions[name] for name in fused.root.operands]
  total = 0
  for root, shape in zip(roots, instruction.shapes):
    while root.opcode == 'bitcast':
      root = fused.instructions[root.operands[0]]
    size = _in_hbm((shape,))
    if root.opcode == 'dynamic-update-slice':
      size = min(size, fused.instructions[root.operands[1]].bytes)
    total += size
  return total
