"""Classic BPF programs over ``struct seccomp_data``, built as a graph of tests.

A program is a decision graph: tests on 32-bit words of seccomp_data, with a successor for either
outcome, and returns. Equal nodes exist once. Laying the graph out as instructions inserts the
loads, keeps every jump forward, and bridges what the eight bits of a jump cannot reach.

Sources: bpf(4) of FreeBSD for the machine, seccomp(2) and linux/filter.h for what the kernel
accepts: loads at aligned offsets, at most 4096 instructions, a return at the end of every path.
"""

from __future__ import annotations

import struct

__all__ = ["ARCH", "MAX_INSTRUCTIONS", "NR", "Graph", "argument"]

MAX_INSTRUCTIONS = 4096
MAX_JUMP = 255
WORD = 0xFFFFFFFF

# Offsets into struct seccomp_data (linux/seccomp.h): int nr; u32 arch; u64 ip; u64 args[6].
NR = 0
ARCH = 4
_ARGS = 16

LD_W_ABS = 0x20
JA = 0x05
JEQ = 0x15
JGT = 0x25
JGE = 0x35
JSET = 0x45
AND_K = 0x54
RET_K = 0x06

_NOTHING = -1


def argument(index: int, *, high: bool = False) -> int:
    """Offset of one half of an argument on a little-endian machine."""
    return _ARGS + 8 * index + 4 * high


class Graph:
    """A decision graph under construction. Nodes are numbers; make the successors first."""

    def __init__(self) -> None:
        # (opcode, word, mask, constant, yes, no); a return has only the constant.
        self._nodes: list[tuple[int, int, int, int, int, int]] = []
        self._known: dict[tuple[int, int, int, int, int, int], int] = {}

    def _node(self, *node: int) -> int:
        opcode, word, mask, constant, yes, no = node
        key = (opcode, word, mask, constant, yes, no)
        if key not in self._known:
            self._known[key] = len(self._nodes)
            self._nodes.append(key)
        return self._known[key]

    def answer(self, value: int) -> int:
        """The node that ends the program with a value."""
        return self._node(RET_K, _NOTHING, 0, value, 0, 0)

    def equal(self, word: int, value: int, yes: int, no: int, mask: int = WORD) -> int:
        """Goes on at `yes` if the masked word at an offset equals a value, else at `no`."""
        if yes == no:
            return yes
        if value & ~mask:
            return no
        if mask == 0:
            return yes
        if mask != WORD and value == 0:
            # One instruction, and the word stays loaded.
            return self._node(JSET, word, WORD, mask, no, yes)
        if value == mask and mask.bit_count() == 1:
            return self._node(JSET, word, WORD, mask, yes, no)
        return self._node(JEQ, word, mask, value, yes, no)

    def greater(
        self, word: int, value: int, yes: int, no: int, mask: int = WORD, *, equal: bool = False
    ) -> int:
        """Goes on at `yes` if the masked word is greater than a value (or equal), else at `no`."""
        if yes == no:
            return yes
        if value >= mask + (1 if equal else 0):
            return no
        if equal and value == 0:
            return yes
        return self._node(JGE if equal else JGT, word, mask, value, yes, no)

    def assemble(self, root: int) -> bytes:
        """Lays the graph out from a node as ``struct sock_filter[]`` in native byte order.

        Raises:
            ValueError: It takes more than `MAX_INSTRUCTIONS`.
        """
        return _Layout(self._nodes).run(root)


class _Layout:
    """Writes a graph backwards, so that the distance to a successor is known when it is needed.

    A place is a node with what the accumulator holds on arrival: a test that is reached with its
    word already loaded is entered behind the load.
    """

    def __init__(self, nodes: list[tuple[int, int, int, int, int, int]]) -> None:
        self._nodes = nodes
        self._code: list[tuple[int, int, int, int]] = []
        self._at: dict[tuple[int, int], int] = {}

    def run(self, root: int) -> bytes:
        start = self._place(root, _NOTHING)
        reached = {start}
        # Stacks of our own: a chain of rules may be longer than Python's recursion limit.
        todo = [start]
        while todo:
            new = [place for place in self._successors(todo.pop()) if place not in reached]
            reached.update(new)
            todo += new
        path = [(start, False)]
        while path:
            place, ready = path.pop()
            if place in self._at:
                continue
            successors = self._successors(place)
            if ready or not successors:
                self._write(place, successors, reached)
            else:
                path += [(place, True), *((successor, False) for successor in successors)]
            if len(self._code) > MAX_INSTRUCTIONS:
                raise ValueError(f"more than {MAX_INSTRUCTIONS} instructions")
        return b"".join(struct.pack("=HBBI", *instruction) for instruction in reversed(self._code))

    def _place(self, node: int, loaded: int) -> tuple[int, int]:
        # What is loaded matters only to a test of the same word.
        return node, loaded if self._nodes[node][1] == loaded else _NOTHING

    def _successors(self, place: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        """Where a place leads to: nowhere, or on yes and on no."""
        opcode, word, mask, _, yes, no = self._nodes[place[0]]
        if opcode == RET_K:
            return ()
        loaded = word if mask == WORD else _NOTHING
        return self._place(yes, loaded), self._place(no, loaded)

    def _write(
        self,
        place: tuple[int, int],
        successors: tuple[tuple[int, int], ...],
        reached: set[tuple[int, int]],
    ) -> None:
        opcode, word, mask, constant, _, _ = self._nodes[place[0]]
        for successor in reversed(successors):
            # The other successor may yet get a bridge, which moves this one by one.
            if self._distance(successor) + 1 > MAX_JUMP:
                self._bridge(successor)
        if not successors:
            self._code.append((RET_K, 0, 0, constant))
            self._at[place] = len(self._code) - 1
            return
        yes, no = successors
        self._code.append((opcode, self._distance(yes), self._distance(no), constant))
        if mask != WORD:
            self._code.append((AND_K, 0, 0, mask))
        self._at[place[0], word] = len(self._code) - 1
        if (place[0], _NOTHING) in reached:
            self._code.append((LD_W_ABS, 0, 0, word))
            self._at[place[0], _NOTHING] = len(self._code) - 1

    def _distance(self, place: tuple[int, int]) -> int:
        return len(self._code) - 1 - self._at[place]

    def _bridge(self, place: tuple[int, int]) -> None:
        node = self._nodes[place[0]]
        if node[0] == RET_K:
            self._code.append((RET_K, 0, 0, node[3]))
        else:
            self._code.append((JA, 0, 0, self._distance(place)))
        self._at[place] = len(self._code) - 1
