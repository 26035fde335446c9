"""Work of a compiled program: floating-point operations, bytes of main memory, collectives.

XLA's own figures count a loop's body once; here it counts as often as it runs. Operations are
those of one device. All are told apart by the scope (`jax.named_scope`) that they come from.
"""

from __future__ import annotations

import collections
import dataclasses
import re

from fne_jax.planning import hlo, operations, traffic
from fne_jax.planning.traffic import COLLECTIVES


@dataclasses.dataclass
class Work:
    """What one scope costs a device in a step.

    Attributes:
      flops: Operations, a multiplication and an addition as two.
      matrix_passes: Operations of matrix products alone, by the time that they take: as many as the
        device does of bfloat16 meanwhile.
      bytes: Bytes of the main memory read and written.
    """

    flops: float = 0.0
    matrix_passes: float = 0.0
    bytes: float = 0.0


@dataclasses.dataclass(frozen=True)
class Collective:
    """A communication.

    Attributes:
      kind: One of COLLECTIVES.
      scope: The scope that it comes from.
      bytes: The size of what it gives each device (of what it takes, for a reduce-scatter), each
        time.
      count: How often it runs in a step.
    """

    kind: str
    scope: str
    bytes: int
    count: int


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A call of code that the program does not show.

    Attributes:
      name: Its name, such as `__cudnn$fmhaSoftmax`.
      scope: The scope that it comes from.
      flops: Operations of its matrix products, each time; None if they are not known, and so are in
        no sum.
      count: How often it runs in a step.
    """

    name: str
    scope: str
    flops: int | None
    count: int


class Account:
    """The work of a compiled program.

    Where a scope lies within another, the inner one counts. An instruction that XLA made up, and
    so has no name, belongs to what reads it.

    Args:
      text: The program, as `compiled.as_text()` returns it.
      scopes: The names to tell apart.
      other: The name of all else.
      float32: How long the device takes over matrix products of float32.
      in_tiles: Whether bytes are those of arrays padded to whole tiles, as TPUs hold them.

    Attributes:
      work: The work of each scope.
      collectives: All collectives of the program.
      kernels: All calls of kernels.

    Raises ValueError if a loop's trip count cannot be read.
    """

    def __init__(
        self,
        text: str,
        scopes: tuple[str, ...],
        other: str = "other",
        float32: operations.Float32 = operations.TPU_FLOAT32,
        in_tiles: bool = False,
    ):
        self.work: dict[str, Work] = collections.defaultdict(Work)
        self.collectives: list[Collective] = []
        self.kernels: list[Kernel] = []
        self._module, self._float32, self._chains = hlo.parse(text, in_tiles), float32, set()
        self._scopes = re.compile("|".join(rf"(?<!\w){re.escape(s)}(?!\w)" for s in scopes))
        self._visit(self._module.entry, 1, other)

    def _visit(self, name, times, outer, fused=False):
        """Adds what a computation does when it runs so many times within a scope.

        The memory of a fused one is counted at its fusion.
        """
        computation = self._module.computations[name]
        scopes = self._scopes_of(computation, outer)
        for instruction in computation.instructions.values():
            scope, opcode = scopes[instruction.name], instruction.opcode
            moved = {} if fused else traffic.main_memory(self._module, computation, instruction)
            for source, size in moved.items():
                self.work[self._scope_of_name(source) or scope].bytes += times * size
            if opcode == "fusion":
                self._visit(instruction.called("calls"), times, scope, fused=True)
                continue
            self._add_operation(instruction, computation, times, scope)
            if opcode == "while":
                trips = hlo.trip_count(self._module, computation, instruction)
                self._visit(instruction.called("body"), times * trips, scope)
            elif opcode in ("call", "async-start"):
                called = instruction.called("to_apply" if opcode == "call" else "calls")
                self._visit(called, times, scope)
            elif opcode == "conditional":
                for branch in hlo.branches(instruction):
                    self._visit(branch, times, scope)

    def _add_operation(self, instruction, computation, times, scope):
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            self._add_collective(kind, instruction, computation, times, scope)
            return
        work = self.work[scope]
        flops, passes = operations.count(computation, instruction, self._float32)
        kernel = operations.kernel(instruction)
        if kernel is not None:
            self.kernels.append(Kernel(kernel, scope, flops or None, times))
        work.flops += times * flops
        work.matrix_passes += times * passes

    def _add_collective(self, kind, instruction, computation, times, scope):
        # One that overlaps with other work is written into each of its fusions. Its channel tells
        # nothing: all collectives of a `shard_map` share one.
        chain = re.search(r'chain_id="(\d+)"', instruction.attributes)
        if chain:
            if chain.group(1) in self._chains:
                return
            self._chains.add(chain.group(1))
        taken = collections.Counter()
        scopes = self._scopes_of(computation, scope)
        for operand in instruction.operands:
            # XLA joins small collectives under the name of one of them.
            source = scope if len(instruction.operands) == 1 else scopes[operand]
            taken[source] += sum(a.bytes for a in computation.instructions[operand].arrays)
        given = sum(array.bytes for array in instruction.arrays)
        if instruction.opcode.endswith("-start"):
            given -= taken.total()  # its output lists what it takes as well
        gathers = kind == "all-gather" and taken.total()
        for source, size in taken.items():
            size = size * given // taken.total() if gathers else size
            self.collectives.append(Collective(kind, source, size, times))

    def _scopes_of(self, computation, outer):
        """Returns the scope of each instruction of a computation."""
        named = {i.name: self._scope_of_name(i.op_name) for i in computation.instructions.values()}
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

    def _scope_of_name(self, op_name):
        found = self._scopes.findall(op_name)
        return found[-1] if found else None
