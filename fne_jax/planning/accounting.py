"""Work of a compiled program: floating-point operations, bytes of main memory, collectives.

XLA's own figures count a loop's body once; here it counts as often as it runs. Operations are
those of one device. All are told apart by the scope (`jax.named_scope`) that they come from.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re

from fne_jax.planning import hlo

# One operation for each element of the output; other opcodes only move data.
_ELEMENTWISE = frozenset(
    """
    abs add and atan2 cbrt ceil clamp compare cosine divide erf exponential exponential-minus-one
    floor log log-plus-one logistic maximum minimum multiply negate not or power remainder
    round-nearest-afz round-nearest-even rsqrt select shift-left shift-right-arithmetic
    shift-right-logical sign sine sqrt subtract tan tanh xor
    """.split()  # noqa: SIM905 a list of fifty strings is not easier to read
)
# Neither read nor write: they name, group or wait for what is there.
_FREE = frozenset(
    """
    parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id
    opt-barrier while conditional call async-start async-update async-done copy-done slice-done
    all-gather-done all-reduce-done collective-permute-done send-done recv-done add-dependency
    """.split()  # noqa: SIM905
)
_FREE_TARGETS = ("AllocateBuffer", "AsyncCollectiveStart", "AsyncCollectiveDone", "ConcatBitcast")
_SLICES = frozenset(("dynamic-slice", "slice", "gather"))
# Opcodes that write a part of their first operand in place, and which operand the part is.
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)


@dataclasses.dataclass
class Work:
    """What one scope costs a device in a step.

    Attributes:
      flops: operations, a multiplication and an addition as two.
      matrix_passes: operations of matrix products alone, each as often as a matrix unit of
        bfloat16 takes it: six times at the highest precision of float32.
      bytes: read and written of the main memory.
    """

    flops: float = 0.0
    matrix_passes: float = 0.0
    bytes: float = 0.0


@dataclasses.dataclass(frozen=True)
class Collective:
    """A communication.

    Attributes:
      kind: one of COLLECTIVES.
      scope: that it comes from.
      bytes: of what it gives each device (of what it takes, for a reduce-scatter), each time.
      count: of its runs in a step.
    """

    kind: str
    scope: str
    bytes: int
    count: int


@dataclasses.dataclass
class Account:
    """The work of a program.

    Attributes:
      work: by scope.
      collectives: all that it holds.
    """

    work: dict[str, Work]
    collectives: list[Collective]


def account(text: str, scopes: tuple[str, ...], other: str = "other") -> Account:
    """Returns the work of a compiled program.

    Where a scope lies within another, the inner one counts. An instruction that XLA made up, and
    so has no name, belongs to what reads it.

    Args:
      text: of `compiled.as_text()`.
      scopes: names to tell apart.
      other: name of all else.

    Raises:
      ValueError: if a loop's trip count cannot be read.
    """
    counter = _Counter(hlo.parse(text), scopes, other)
    counter.visit(counter.module.entry, 1, other)
    return Account(dict(counter.work), counter.collectives)


class _Counter:
    def __init__(self, module, scopes, other):
        self.module, self.other = module, other
        self.scope_pattern = re.compile("|".join(rf"(?<!\w){re.escape(s)}(?!\w)" for s in scopes))
        self.work = collections.defaultdict(Work)
        self.collectives, self.channels = [], set()

    def visit(self, name, times, outer):
        """Adds what a computation does when it runs so many times within a scope."""
        computation = self.module.computations[name]
        scopes = self.scopes_of(computation, outer)
        for instruction in computation.instructions.values():
            scope, opcode = scopes[instruction.name], instruction.opcode
            work = self.work[scope]
            if opcode not in _FREE:
                work.bytes += times * self.traffic(instruction, computation)
            if opcode == "fusion":
                self.add_operations(instruction.called("calls"), times, scope)
            else:
                self.add_operation(instruction, computation, times, scope)
            if opcode == "while":
                trips = self.trip_count(instruction, computation)
                self.visit(instruction.called("body"), times * trips, scope)
            for attribute in ("to_apply",) if opcode == "call" else ():
                self.visit(instruction.called(attribute), times, scope)
            if opcode == "async-start":
                self.visit(instruction.called("calls"), times, scope)
            if opcode == "conditional":
                for branch in self.branches(instruction):
                    self.visit(branch, times, scope)

    def add_operations(self, name, times, outer):
        """Adds the operations of a fused computation; its memory is counted at the fusion."""
        computation = self.module.computations[name]
        scopes = self.scopes_of(computation, outer)
        for instruction in computation.instructions.values():
            scope = scopes[instruction.name]
            if instruction.opcode == "fusion":
                self.add_operations(instruction.called("calls"), times, scope)
            else:
                self.add_operation(instruction, computation, times, scope)

    def add_operation(self, instruction, computation, times, scope):
        opcode, work = instruction.opcode, self.work[scope]
        kind = opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            self.add_collective(kind, instruction, computation, times, scope)
        elif opcode in ("dot", "convolution"):
            operands = [self.arrays_of(computation, name)[0] for name in instruction.operands[:2]]
            count = _dot_flops if opcode == "dot" else _convolution_flops
            flops = times * count(instruction, *operands)
            work.flops += flops
            work.matrix_passes += flops * (6 if "highest" in instruction.attributes else 1)
        elif opcode in _ELEMENTWISE:
            work.flops += times * instruction.arrays[0].size
        elif opcode in ("reduce", "reduce-window"):
            # Of windows too: they are cumulative sums, and sums that are broadcast again.
            work.flops += times * self.arrays_of(computation, instruction.operands[0])[0].size

    def add_collective(self, kind, instruction, computation, times, scope):
        channel = re.search(r"channel_id=(\d+)", instruction.attributes)
        if channel:
            # A collective that overlaps with other work is written into each of its fusions.
            if channel.group(1) in self.channels:
                return
            self.channels.add(channel.group(1))
        taken = collections.Counter()
        scopes = self.scopes_of(computation, scope)
        for operand in instruction.operands:
            # XLA joins small collectives under the name of one of them.
            source = scope if len(instruction.operands) == 1 else scopes[operand]
            taken[source] += sum(a.bytes for a in self.arrays_of(computation, operand))
        given = sum(array.bytes for array in instruction.arrays)
        if instruction.opcode.endswith("-start"):
            given -= taken.total()  # its output lists what it takes as well
        gathers = kind == "all-gather" and taken.total()
        for source, size in taken.items():
            size = size * given // taken.total() if gathers else size
            self.collectives.append(Collective(kind, source, size, times))

    def traffic(self, instruction, computation):
        """Returns the bytes of the main memory that an instruction reads and writes."""
        opcode = instruction.opcode
        if opcode == "fusion":
            return self.fusion_traffic(instruction, computation)
        if opcode == "custom-call" and any(t in instruction.attributes for t in _FREE_TARGETS):
            return 0
        operands = [self.arrays_of(computation, name) for name in instruction.operands]
        if opcode in ("copy-start", "slice-start"):
            # Their outputs are the destination, the source and a flag.
            moved = min(a.bytes for a in instruction.arrays[:2])
            return sum(moved for a in instruction.arrays[:2] if a.space == hlo.MAIN_MEMORY)
        if opcode in _SLICES:
            read = _main_bytes(operands[0]) and instruction.arrays[0].bytes
            return read + _main_bytes(instruction.arrays)
        if opcode in _UPDATES:
            update = operands[_UPDATES[opcode]]
            return _main_bytes(update) + (_main_bytes(operands[0]) and update[0].bytes)
        return sum(map(_main_bytes, operands)) + _main_bytes(instruction.arrays)

    def fusion_traffic(self, instruction, computation):
        fused = self.module.computations[instruction.called("calls")]
        total = 0
        for number, name in enumerate(instruction.operands):
            arrays = self.arrays_of(computation, name)
            if _main_bytes(arrays):
                read = self.read_bytes(fused, fused.parameters[number].name)
                total += arrays[0].bytes if read is None else min(read, arrays[0].bytes)
        root = fused.instructions[fused.root]
        written = [root.name] if root.opcode != "tuple" else list(root.operands)
        if len(written) != len(instruction.arrays):
            return total + _main_bytes(instruction.arrays)
        for name, array in zip(written, instruction.arrays, strict=True):
            if array.space == hlo.MAIN_MEMORY:
                total += min(self.written_bytes(fused, name), array.bytes)
        return total

    def read_bytes(self, computation, name):
        """Returns what a fused computation reads of an operand; None for all of it."""
        if name == computation.root:
            return None
        total = 0
        for user in computation.users[name]:
            part = None
            if user.opcode in _SLICES and user.operands[0] == name:
                part = user.arrays[0].bytes
            elif user.opcode in _UPDATES and user.operands.index(name) == 0:
                part = 0  # written in place
            elif user.opcode == "bitcast":
                part = self.read_bytes(computation, user.name)
            elif user.opcode == "fusion":
                inner = self.module.computations[user.called("calls")]
                parameter = inner.parameters[user.operands.index(name)].name
                renamed = _source_of_bitcasts(inner, inner.root) == parameter
                part = self.read_bytes(
                    *((computation, user.name) if renamed else (inner, parameter))
                )
            if part is None:
                return None
            total += part
        return total

    def written_bytes(self, computation, name):
        """Returns what a fused computation writes of one of its results."""
        instruction = computation.instructions[name]
        if instruction.opcode in _UPDATES:
            update = instruction.operands[_UPDATES[instruction.opcode]]
            return self.arrays_of(computation, update)[0].bytes
        if instruction.opcode == "bitcast":
            return self.written_bytes(computation, instruction.operands[0])
        if instruction.opcode == "fusion":
            inner = self.module.computations[instruction.called("calls")]
            if inner.instructions[inner.root].opcode != "tuple":
                return self.written_bytes(inner, inner.root)
        return instruction.arrays[0].bytes

    def arrays_of(self, computation, name):
        return computation.instructions[name].arrays

    def branches(self, instruction):
        listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
        if listed:
            return [name.strip().lstrip("%") for name in listed.group(1).split(",")]
        return [instruction.called(f"{which}_computation") for which in ("true", "false")]

    def trip_count(self, instruction, computation):
        """Returns how often a loop runs, as XLA says, or as its condition compares a counter."""
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', instruction.attributes)
        if known:
            return int(known.group(1))
        condition = self.module.computations[instruction.called("condition")]
        compared = self._comparison(condition)
        if compared is None:
            raise ValueError(f"{instruction.name}: the loop's trip count cannot be read")
        index, limit = compared
        start = self._initial_value(computation, instruction.operands[0], index)
        return max(limit - start, 0)

    def _comparison(self, condition):
        """Returns the number of the counter in the loop's state, and what it stays below."""
        for instruction in condition.instructions.values():
            inner, names = condition, instruction.operands
            if instruction.opcode == "fusion":
                inner = self.module.computations[instruction.called("calls")]
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

    def _initial_value(self, computation, name, index):
        state = computation.instructions[name]
        if state.opcode == "tuple":
            value = computation.instructions[state.operands[index]]
            while value.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
                value = computation.instructions[value.operands[0]]
            if value.opcode == "constant":
                return int(value.text)
        return 0

    def scopes_of(self, computation, outer):
        """Returns the scope of each instruction of a computation."""
        named = {i.name: self.scope_of_name(i.op_name) for i in computation.instructions.values()}
        # Backwards, so that a chain of unnamed instructions takes what reads its end.
        for instruction in reversed(list(computation.instructions.values())):
            if named[instruction.name] is None:
                readers = (named[user.name] for user in computation.users[instruction.name])
                named[instruction.name] = next(filter(None, readers), None)
        for instruction in computation.instructions.values():
            if named[instruction.name] is None:
                read = (named.get(operand) for operand in instruction.operands)
                named[instruction.name] = next(filter(None, read), None)
        return {name: scope or outer for name, scope in named.items()}

    def scope_of_name(self, op_name):
        found = self.scope_pattern.findall(op_name)
        return found[-1] if found else None


def _source_of_bitcasts(computation, name):
    while computation.instructions[name].opcode == "bitcast":
        name = computation.instructions[name].operands[0]
    return name


def _main_bytes(arrays):
    return sum(array.bytes for array in arrays if array.space == hlo.MAIN_MEMORY)


def _dot_flops(instruction, left, right):
    del right
    dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    contracted = math.prod(left.dims[int(d)] for d in dims.group(1).split(",") if d) if dims else 1
    return 2 * instruction.arrays[0].size * contracted


def _convolution_flops(instruction, left, right):
    """Counts the products of a convolution; TPUs write every matrix product as one.

    Positions in padding or between dilated inputs are no work: a batched product is written as a
    dilated window of which one position holds an input.
    """
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    fields = dict(part.split("=") for part in window.group(1).split()) if window else {}
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    left_labels, right_labels, out_labels = labels.groups()
    output = instruction.arrays[0]
    features = right.dims[right_labels.index("i")]
    total = output.dims[out_labels.index("b")] * output.dims[out_labels.index("f")] * features
    for place, label in enumerate(sorted(c for c in out_labels if c.isdigit())):

        def of(name, default, place=place):
            return int(fields[name].split("x")[place]) if name in fields else default

        low = int(fields["pad"].split("x")[place].split("_")[0]) if "pad" in fields else 0
        total *= _pairs_in_window(
            inputs=left.dims[left_labels.index(label)],
            outputs=output.dims[out_labels.index(label)],
            window=of("size", 1),
            stride=of("stride", 1),
            low=low,
            input_dilation=of("lhs_dilate", 1),
            window_dilation=of("rhs_dilate", 1),
        )
    return 2 * total


def _pairs_in_window(*, inputs, outputs, window, stride, low, input_dilation, window_dilation):
    extent = (inputs - 1) * input_dilation + 1
    pairs = 0
    for output in range(outputs):
        start = output * stride - low
        positions = range(start, start + window * window_dilation, window_dilation)
        pairs += sum(0 <= p < extent and p % input_dilation == 0 for p in positions)
    return pairs
