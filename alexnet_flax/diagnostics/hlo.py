"""Counts what a program computes, moves and sends, from XLA's text of it (HLO).

XLA's own cost analysis exists for some devices only; a program's text exists for all. What is counted:

- Arithmetic: the multiplications and additions of convolutions and matrix products; padding costs none.
- Bytes: the operands and results of each instruction that runs as a kernel of its own (a fusion, a call of a
  library, a copy), each once. Values inside a fusion stay in registers. Arrays in memory spaces other than
  the device's main memory (S(1) of a TPU is on the chip) cost nothing.
- Collectives: the bytes that each device contributes, by kind.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

_BITS = {
  **dict.fromkeys(('pred', 's8', 'u8'), 8),
  **dict.fromkeys(('s16', 'u16', 'f16', 'bf16'), 16),
  **dict.fromkeys(('s32', 'u32', 'f32'), 32),
  **dict.fromkeys(('s64', 'u64', 'f64', 'c64'), 64),
  **dict.fromkeys(('s4', 'u4', 'f4e2m1fn'), 4),
  **dict.fromkeys(('s2', 'u2'), 2),
  'c128': 128,
}
_ARRAY = re.compile(r'([a-z]+\d*\w*)\[([\d,]*)\](?:\{([^}]*)\})?')
# They name, combine or describe arrays, and move nothing.
_FREE = {
  *('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all', 'opt-barrier', 'iota'),
  *('partition-id', 'replica-id', 'domain', 'add-dependency', 'get-dimension-size'),
}
COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')


@dataclasses.dataclass(frozen=True)
class Array:
  """An array's type, and the memory in which it lies; 0 is the device's main memory."""

  dtype: str
  shape: tuple[int, ...]
  memory_space: int = 0

  @property
  def bytes(self) -> int:
    """The size; 0 of a token or another type without one."""
    return math.prod(self.shape) * _BITS.get(self.dtype, 8 if self.dtype.startswith('f8') else 0) // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation."""

  name: str
  opcode: str
  arrays: tuple[Array, ...]  # the result; several if it is a tuple
  operands: tuple[str, ...]
  attributes: str

  def attribute(self, pattern: str) -> str | None:
    """Returns the first group of a pattern in the attributes, or None."""
    match = re.search(pattern, self.attributes)
    return match[1] if match else None

  @property
  def source(self) -> str:
    """The operation of the program in JAX that it was made for: 'jit(step)/conv1/conv_general_dilated'."""
    return self.attribute(r'op_name="([^"]*)"') or ''

  @property
  def target(self) -> str:
    """The library function of a custom call, or ''."""
    return self.attribute(r'custom_call_target="([^"]*)"') or ''


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Program:
  """The computations of a module by name, and the name of the one that runs."""

  computations: Mapping[str, Computation]
  entry: str

  def executed(
    self, name: str | None = None, times: int = 1
  ) -> Iterator[tuple[Instruction, Computation, int]]:
    """Yields the instructions that run as kernels, their computations, and how often they run."""
    computation = self.computations[name or self.entry]
    for one in computation.values():
      called = [
        inner
        for key in ('body', 'condition', 'to_apply', 'called_computations', 'branch_computations')
        for inner in re.findall(r'%?([\w.-]+)', one.attribute(rf'\b{key}=(\{{[^}}]*\}}|%?[\w.-]+)') or '')
      ]
      if one.opcode == 'while':
        rounds = int(one.attribute(r'known_trip_count\D*(\d+)') or 1)
        for inner in called:
          yield from self.executed(inner, times * rounds)
      elif one.opcode in ('call', 'conditional', 'async-start') and called:
        for inner in called:
          yield from self.executed(inner, times)
      elif one.opcode not in _FREE and not one.opcode.endswith('-done'):
        yield one, computation, times


@dataclasses.dataclass(frozen=True)
class Moved:
  """What one instruction moves.

  Attributes:
    opcode: Its kind; for a library's function, that function's name.
    source: The operation in JAX that it was made for.
    bytes: Operands and results together, in all its runs.
    is_collective: Whether the bytes also go to other devices.
  """

  opcode: str
  source: str
  bytes: int
  is_collective: bool = False


def parse(text: str) -> Program:
  """Reads a module as `compiled.as_text()` returns it."""
  computations: dict[str, Computation] = {}
  entry, current = '', None
  for line in text.splitlines():
    line = re.sub(r'/\*.*?\*/', '', line).strip()
    header = re.match(r'(ENTRY )?%?([\w.-]+) (?:\(.*\) -> .*)?\{$', line)
    if header and ' = ' not in line.partition('(')[0]:
      current = computations.setdefault(header[2], {})
      entry = header[2] if header[1] else entry
    elif line == '}':
      current = None
    elif current is not None and ' = ' in line:
      one = _instruction(line)
      current[one.name] = one
  return Program(computations, entry)


def moved(program: Program) -> list[Moved]:
  """Returns what each instruction moves, in the order in which they run."""
  return [
    Moved(
      one.target or one.opcode.removesuffix('-start'),
      one.source,
      times * _traffic(one, computation),
      one.opcode.removesuffix('-start') in COLLECTIVES,
    )
    for one, computation, times in program.executed()
  ]


def collectives(program: Program) -> dict[str, tuple[int, int]]:
  """Returns, by kind, how many collectives run, and the bytes that each device contributes to all of them."""
  found: dict[str, tuple[int, int]] = {}
  for one, own, times in _collectives(program):
    kind = one.opcode.removesuffix('-start')
    count, size = found.get(kind, (0, 0))
    found[kind] = count + times, size + times * own
  return found


def bytes_sent(program: Program, devices: int) -> float:
  """Returns the bytes that a device sends for all collectives, if each goes around a ring of its group."""
  total = 0.0
  for one, own, times in _collectives(program):
    size = _group_size(one) or devices
    around = (size - 1) / size
    turns = {'all-reduce': 2 * around, 'all-gather': size - 1, 'collective-permute': 1.0}
    total += times * own * turns.get(one.opcode.removesuffix('-start'), around)
  return total


def _collectives(program: Program) -> Iterator[tuple[Instruction, int, int]]:
  """Yields the collectives, the bytes that each device contributes to a run, and how often they run."""
  for one, computation, times in program.executed():
    if one.opcode.removesuffix('-start') in COLLECTIVES:
      operands = (computation[name] for name in one.operands if name in computation)
      own = sum(array.bytes for operand in operands for array in operand.arrays)  # in whatever memory
      yield one, own, times


def _group_size(one: Instruction) -> int | None:
  """Reads 'replica_groups={{0,1},{2,3}}' or, of 4 groups of 2, '[4,2]<=[8]'; None for all devices."""
  if listed := one.attribute(r'replica_groups=\{\{([\d,]+)\}'):
    return listed.count(',') + 1
  counted = one.attribute(r'replica_groups=\[\d+,(\d+)\]')
  return int(counted) if counted else None


def arithmetic(program: Program) -> int:
  """Returns the floating-point operations of all convolutions and matrix products, two per product term."""
  total = 0
  for one, computation, times in _all_instructions(program, program.entry, 1):
    if one.opcode == 'convolution':
      total += 2 * times * _convolution_terms(one, computation)
    elif one.opcode == 'dot':
      left = computation[one.operands[0]].arrays[0].shape
      axes = (one.attribute(r'lhs_contracting_dims=\{([\d,]*)\}') or '').split(',')
      contracted = math.prod(left[int(axis)] for axis in axes if axis)
      total += 2 * times * contracted * math.prod(one.arrays[0].shape)
  return total


def opcodes(program: Program) -> set[str]:
  """Returns the opcodes of all instructions, those inside fusions too."""
  return {one.opcode for computation in program.computations.values() for one in computation.values()}


def _all_instructions(
  program: Program, name: str, times: int
) -> Iterator[tuple[Instruction, Computation, int]]:
  """Yields the instructions of a computation and of all that it calls, fusions included."""
  computation = program.computations[name]
  for one in computation.values():
    yield one, computation, times
    rounds = int(one.attribute(r'known_trip_count\D*(\d+)') or 1) if one.opcode == 'while' else 1
    for key in ('body', 'calls', 'called_computations', 'branch_computations', 'to_apply'):
      for inner in re.findall(r'[\w.-]+', one.attribute(rf'\b{key}=(\{{[^}}]*\}}|%?[\w.-]+)') or ''):
        if inner in program.computations and one.opcode not in ('reduce', 'all-reduce', 'scatter', 'sort'):
          yield from _all_instructions(program, inner, times * rounds)


def _traffic(one: Instruction, computation: Computation) -> int:
  results = sum(array.bytes for array in one.arrays if not array.memory_space)
  operands = sum(_size(computation, name) for name in one.operands)
  if one.opcode == 'dynamic-update-slice':  # in place: what it writes, and the read of that
    return 2 * _size(computation, one.operands[1])
  if one.opcode in ('copy-start', 'slice-start'):  # (to, from, context) and ((from), to, context)
    to, source = one.arrays[:2] if one.opcode == 'copy-start' else one.arrays[1::-1]
    return _main((to,)) + (0 if source.memory_space else to.bytes)
  if one.opcode.endswith('-start'):  # its result holds the operands once more
    return 2 * operands
  return results + operands


def _main(arrays: tuple[Array, ...]) -> int:
  return sum(array.bytes for array in arrays if not array.memory_space)


def _size(computation: Computation, name: str) -> int:
  return _main(computation[name].arrays) if name in computation else 0


def _convolution_terms(one: Instruction, computation: Computation) -> int:
  """Returns how many products a convolution sums up; XLA's cost analysis counts the same way."""
  image, kernel = (computation[name].arrays[0].shape for name in one.operands[:2])
  labels = re.match(r'(\w+)_(\w+)->(\w+)', one.attribute(r'dim_labels=(\S+?)(?:,|$)') or '')
  assert labels is not None
  input_labels, kernel_labels, output_labels = labels.groups()
  result = one.arrays[0].shape
  terms = kernel[kernel_labels.index('i')] * math.prod(result[output_labels.index(axis)] for axis in 'bf')
  window = one.attribute(r'window=\{([^}]*)\}') or ''
  for axis in sorted(set(output_labels) - {'b', 'f'}):
    number = int(axis)
    stride, low, dilation, kernel_dilation = (
      _entry(window, key, number, default)
      for key, default in (('stride', 1), ('pad', 0), ('lhs_dilate', 1), ('rhs_dilate', 1))
    )
    side = image[input_labels.index(axis)]
    last = (side - 1) * dilation
    places = [
      output * stride + tap * kernel_dilation - low
      for output in range(result[output_labels.index(axis)])
      for tap in range(kernel[kernel_labels.index(axis)])
    ]
    terms *= sum(0 <= place <= last and place % dilation == 0 for place in places)
  return terms


def _entry(window: str, key: str, axis: int, default: int) -> int:
  """Returns the number of an axis in 'size=3x3 pad=1_1x1_1'; of a pair, the first."""
  match = re.search(rf'{key}=(\S+)', window)
  return int(match[1].split('x')[axis].partition('_')[0]) if match else default


def _instruction(line: str) -> Instruction:
  """Reads '[ROOT] %name = type opcode(operands), attributes'."""
  left, _, right = line.partition(' = ')
  shape, rest = _split_type(right)
  opcode, _, after = rest.partition('(')
  end = _closing(after)
  names = re.findall(r'%([\w.-]+)', after[:end]) or re.findall(r'[A-Za-z_][\w.-]*', after[:end])
  operands = () if opcode.strip() in ('constant', 'parameter') else tuple(names)
  name = left.removeprefix('ROOT ').lstrip('%')
  return Instruction(name, opcode.strip(), _arrays(shape), operands, after[end + 1 :])


def _split_type(text: str) -> tuple[str, str]:
  """Splits a type, which may be a tuple, from what follows it."""
  end = _closing(text[1:]) + 2 if text.startswith('(') else text.index(' ')
  return text[:end], text[end:].lstrip()


def _closing(text: str) -> int:
  """Returns the index of the parenthesis that closes one opened before the text."""
  depth = 0
  for index, character in enumerate(text):
    depth += (character == '(') - (character == ')')
    if depth < 0:
      return index
  return len(text)


def _arrays(text: str) -> tuple[Array, ...]:
  return tuple(
    Array(
      dtype,
      tuple(int(side) for side in sides.split(',') if side),
      int(match[1]) if (match := re.search(r'S\((\d+)\)', layout)) else 0,
    )
    for dtype, sides, layout in _ARRAY.findall(text)
  )
