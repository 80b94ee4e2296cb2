"""Tensors that have a size and no values: what is alive, what a backward pass still needs, and where the peak is.

A model is written once more in these (``decoder.py``), in the order its code computes. Memory then follows the rules it
follows in torch: a block is alive while a variable, a node of the graph or the ledger's owner refers to it, and nodes
run backwards in the reverse order of their creation. The garbage collector has no part in it: nothing here refers to
itself in a circle, so that a block goes the moment its last reference does.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field


class Block:
    """Memory of one tensor, given back when nothing refers to it any more."""

    __slots__ = ("_ledger", "part", "size")

    def __init__(self, ledger: Ledger, size: int, part: str) -> None:
        self.size, self.part, self._ledger = size, part, ledger
        ledger._take(self)

    def __del__(self) -> None:
        self._ledger._give_back(self)


Backward = Callable[[Block], Sequence["Block | None"]]


class Node:
    """What one operation keeps for the backward pass."""

    __slots__ = ("backward", "inputs", "number")

    def __init__(self, number: int, inputs: Sequence[Node | Leaf | None], backward: Backward) -> None:
        self.number, self.inputs = number, inputs
        self.backward: Backward | None = backward


class Leaf:
    """A parameter that trains: its gradient stays until the optimizer has stepped.

    Attributes:
        part: What the gradient counts to.
        share: How much of it this process keeps, once it is summed over processes.
    """

    __slots__ = ("grad", "part", "share")

    def __init__(self, part: str = "gradients", share: float = 1.0) -> None:
        self.grad: Block | None = None
        self.part, self.share = part, share


@dataclass(frozen=True)
class Value:
    """A tensor: its memory, how many numbers of how many bytes, and what computed it (None: no gradient flows)."""

    block: Block
    count: int
    width: int
    node: Node | Leaf | None = None

    @property
    def size(self) -> int:
        """Bytes."""
        return self.count * self.width

    def detached(self) -> Value:
        """The same memory outside the graph."""
        return Value(self.block, self.count, self.width)


@dataclass
class Ledger:
    """What is alive, by part, and the most there was.

    Attributes:
        part: What new blocks belong to.
        phase: What the step is doing, for the name of the peak.
        recording: Whether operations are kept for a backward pass.
        live: Bytes now, by part.
        peak: Bytes at the highest point.
        at_peak: Bytes then, by part.
        peak_phase: What the step was doing then.
    """

    part: str = "activations"
    phase: str = ""
    recording: bool = True
    live: Counter[str] = field(default_factory=Counter)
    total: int = 0
    peak: int = 0
    at_peak: Counter[str] = field(default_factory=Counter)
    peak_phase: str = ""
    _created: int = 0

    def block(self, size: int, part: str | None = None) -> Block:
        """New memory of ``size`` bytes."""
        return Block(self, int(size), self.part if part is None else part)

    def scratch(self, size: int) -> None:
        """Memory that one operation needs while it runs."""
        self.block(size)

    def value(self, count: int, width: int, node: Node | Leaf | None = None) -> Value:
        """A new tensor."""
        return Value(self.block(count * width), count, width, node)

    @contextmanager
    def doing(self, phase: str, part: str | None = None) -> Iterator[None]:
        """Name what happens inside, and what its new blocks belong to."""
        before = self.phase, self.part
        self.phase, self.part = phase, self.part if part is None else part
        try:
            yield
        finally:
            self.phase, self.part = before

    @contextmanager
    def no_grad(self) -> Iterator[None]:
        """Keep nothing for a backward pass inside."""
        before, self.recording = self.recording, False
        try:
            yield
        finally:
            self.recording = before

    def apply(self, inputs: Sequence[Value | Node | Leaf | None], out: Value, backward: Backward) -> Value:
        """``out`` as the result of an operation on ``inputs``.

        Args:
            inputs: What a gradient may flow to.
            backward: Turns the gradient of ``out`` into one of every input; what it refers to is what is saved.
        """
        nodes = [given.node if isinstance(given, Value) else given for given in inputs]
        if not self.recording or not any(node is not None for node in nodes):
            return out
        self._created += 1
        return Value(out.block, out.count, out.width, Node(self._created, nodes, backward))

    def backward(self, result: Value, grad: Block | None = None) -> None:
        """Run the graph behind ``result`` backwards.

        Args:
            grad: The gradient of ``result``; None makes one.
        """
        root = result.node
        if not isinstance(root, Node):
            return
        waiting: dict[int, tuple[Node, Block]] = {
            root.number: (root, self.block(result.size) if grad is None else grad)
        }
        order = [-root.number]
        del result, grad, root
        while order:
            node, given = waiting.pop(-heapq.heappop(order))
            function, node.backward = node.backward, None
            if function is None:
                raise RuntimeError("a graph is run backwards once")
            found = list(function(given))
            del function, given
            for index, target in enumerate(node.inputs):
                flowing, found[index] = found[index], None
                if target is None or flowing is None:
                    continue
                if isinstance(target, Leaf):
                    self._accumulate(target, flowing)
                elif target.number not in waiting:
                    # A second gradient is added into the first.
                    waiting[target.number] = (target, flowing)
                    heapq.heappush(order, -target.number)
                del flowing
            del node

    def _accumulate(self, leaf: Leaf, grad: Block) -> None:
        if leaf.grad is None:
            self.move(grad, leaf.part)
            leaf.grad = grad if leaf.share == 1.0 else self.block(int(grad.size * leaf.share), leaf.part)

    def move(self, block: Block, part: str) -> None:
        """Count a block to another part from now on."""
        self.live[block.part] -= block.size
        self.live[part] += block.size
        block.part = part

    def _take(self, block: Block) -> None:
        self.live[block.part] += block.size
        self.total += block.size
        if self.total > self.peak:
            self.peak, self.at_peak, self.peak_phase = self.total, self.live.copy(), self.phase

    def _give_back(self, block: Block) -> None:
        self.live[block.part] -= block.size
        self.total -= block.size
