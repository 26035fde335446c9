"""Compiled programs as XLA prints them (`compiled.as_text()`), read into instructions.

Text rather than a binding: it is the same for every backend, and shows layouts, memory spaces and
the names of scopes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re

# Memory space of a layout that names none: the device's main memory (HBM on TPUs and GPUs).
MAIN_MEMORY = 0

_ARRAY = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](?:\{([^}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")
# Order of the axes, the one that lies closest together first, and the tiles of TPUs.
_TILED = re.compile(r"([\d,]+):T\(([\d,]+)\)")
_NAME = re.compile(r"%([\w.\-]+)")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(
    r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<output>.*?) (?P<opcode>[a-z][\w\-]*)"
    r"\((?P<text>.*?)\)(?P<attributes>, .*)?$"
)
# Comments, and what a kernel of Pallas tells profilers, which alone is printed on lines of its own.
_COMMENT = re.compile(r"/\*.*?\*/|(?<=kernel_metadata=\{)\n.*\n(?=\})")
_BITS = re.compile(r"\d+")


@dataclasses.dataclass(frozen=True)
class Array:
    """Shape of an array and the memory it lies in.

    Attributes:
      dtype: XLA's name of it, such as f32 or pred.
      dims: The size of each axis.
      space: The memory space, 0 for the main memory.
      held: The size of each axis as `bytes` counts it; None for `dims`.
    """

    dtype: str
    dims: tuple[int, ...]
    space: int = MAIN_MEMORY
    held: tuple[int, ...] | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes of all that is held; 0 for tokens and the like."""
        bits = _BITS.search(self.dtype)
        size = math.prod(self.held or self.dims)
        if self.dtype == "pred":
            return size
        return math.ceil(size * int(bits.group()) / 8) if bits else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program.

    Attributes:
      name: Its name, unique in its computation.
      opcode: What it does, such as `fusion`.
      arrays: Its output, or the leaves of it.
      operands: The names of instructions, or of computations' parameters.
      text: The operands as printed: a constant's value or a parameter's number.
      attributes: All that follows the operands.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    text: str
    attributes: str

    @functools.cached_property
    def op_name(self) -> str:
        """The scopes and the operation of the source that it comes from; may be empty."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found.group(1) if found else ""

    def called(self, attribute: str) -> str | None:
        """Returns the computation that an attribute (`calls`, `body`, ...) names, if any."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return found.group(1) if found else None


@dataclasses.dataclass(frozen=True)
class Computation:
    """A list of instructions of which the last, or the one marked so, is the result.

    Attributes:
      instructions: The instructions by name, in order.
      root: The name of the result.
    """

    instructions: dict[str, Instruction]
    root: str

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Its parameters by number."""
        return {int(i.text): i for i in self.instructions.values() if i.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that read each one."""
        found = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                found.setdefault(operand, []).append(instruction)
        return found


@dataclasses.dataclass(frozen=True)
class Module:
    """A program.

    Attributes:
      computations: The computations by name.
      entry: The name of the one that runs.
    """

    computations: dict[str, Computation]
    entry: str


def parse(text: str, in_tiles: bool = False) -> Module:
    """Returns the program that a text prints.

    Args:
      text: The program.
      in_tiles: Whether arrays hold the padding to whole tiles that they have in a TPU's memory.

    Raises:
      ValueError: if it has no entry.
    """
    computations, entry, name, instructions, root = {}, None, None, {}, None
    for line in _COMMENT.sub("", text).splitlines():
        if name is None:
            header = _COMPUTATION.match(line)
            if header:
                name, instructions, root = header.group(2), {}, None
                entry = name if header.group(1) else entry
        elif line.startswith("}"):
            computations[name] = Computation(instructions, root or next(reversed(instructions)))
            name = None
        else:
            match = _INSTRUCTION.match(line)
            if match:
                instructions[match["name"]] = Instruction(
                    match["name"],
                    match["opcode"],
                    _arrays(match["output"], in_tiles),
                    tuple(_NAME.findall(match["text"])),
                    match["text"],
                    match["attributes"] or "",
                )
                root = match["name"] if match["root"] else root
    if entry is None:
        raise ValueError("the text has no ENTRY computation")
    return Module(computations, entry)


def branches(instruction: Instruction) -> list[str]:
    """Returns the computations that a conditional chooses from."""
    listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
    if listed:
        return [name.strip().lstrip("%") for name in listed.group(1).split(",")]
    return [instruction.called(f"{which}_computation") for which in ("true", "false")]


def trip_count(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Returns how often a loop runs, as XLA says, or as its condition compares a counter.

    Raises ValueError if neither can be read.
    """
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', instruction.attributes)
    if known:
        return int(known.group(1))
    condition = module.computations[instruction.called("condition")]
    compared = _comparison(module, condition)
    if compared is None:
        raise ValueError(f"{instruction.name}: the loop's trip count cannot be read")
    index, limit = compared
    start = _initial_value(computation, instruction.operands[0], index)
    return max(limit - start, 0)


def _comparison(module, condition):
    """Returns the number of the counter in the loop's state, and what it stays below."""
    for instruction in condition.instructions.values():
        inner, names = condition, instruction.operands
        if instruction.opcode == "fusion":
            inner = module.computations[instruction.called("calls")]
            instruction = inner.instructions[inner.root]
            by_name = {p.name: names[number] for number, p in inner.parameters.items()}
            names = tuple(by_name.get(name, name) for name in instruction.operands)
        if instruction.opcode != "compare" or "direction=LT" not in instruction.attributes:
            continue
        known = {**inner.instructions, **condition.instructions}
        counter, limit = (known[name] for name in names)
        if counter.opcode == "get-tuple-element" and limit.opcode == "constant":
            index = int(re.search(r"index=(\d+)", counter.attributes).group(1))
            return index, int(limit.text)
    return None


def _initial_value(computation, name, index):
    state = computation.instructions[name]
    if state.opcode == "tuple":
        value = computation.instructions[state.operands[index]]
        while value.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
            value = computation.instructions[value.operands[0]]
        if value.opcode == "constant":
            return int(value.text)
    return 0


def _arrays(text, in_tiles):
    found = []
    for dtype, dims, layout in _ARRAY.findall(text):
        space = _SPACE.search(layout)
        sizes = tuple(int(size) for size in dims.split(",") if size)
        held = _padded(sizes, layout) if in_tiles else None
        found.append(Array(dtype, sizes, int(space.group(1)) if space else MAIN_MEMORY, held))
    return tuple(found)


def _padded(sizes, layout):
    """Returns the sizes rounded up to whole tiles, which lie along the closest axes."""
    tiled = _TILED.match(layout)
    if tiled is None:
        return sizes
    axes, tile = ([int(number) for number in group.split(",")] for group in tiled.groups())
    held = list(sizes)
    for axis, length in zip(axes, reversed(tile), strict=False):
        held[axis] = -(-held[axis] // length) * length
    return tuple(held)
