"""What torch's operations allocate and what they keep for the backward pass, one function each.

``linear`` is PyTorch's under autocast as well, bitsandbytes' on quantised weights, and PEFT's where there are low-rank
factors. A backward function refers to what is saved and to numbers, never to a :class:`Value`, whose graph would then
outlive its use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from alignkit.memory.ledger import Block, Leaf, Ledger, Node, Value

Quantization = Literal["none", "nf4", "int8"]


@dataclass
class Weight:
    """A parameter on the device.

    Attributes:
        count: Numbers in it.
        width: Bytes of each as computed with; of a quantised one, those it is unpacked to.
        leaf: Its gradient, where it trains; the node behind it, where it is computed.
        quantization: How it is stored.
        block: Its memory, while it is there.
        sides: Rows and columns, of a matrix.
    """

    count: int
    width: int
    leaf: Leaf | Node | None = None
    quantization: Quantization = "none"
    block: Block | None = None
    sides: tuple[int, int] | None = None

    @property
    def stored(self) -> int:
        """Bytes as it lies in memory."""
        if self.quantization == "nf4":
            # 4 bits a number; a scale of 8 bits a block of 64, and of 32 bits for 256 of these (double quantisation).
            blocks = -(-self.count // 64)
            return self.count // 2 + blocks + 4 * -(-blocks // 256)
        return self.count * (1 if self.quantization == "int8" else self.width)


@dataclass
class Linear:
    """A linear layer, with low-rank factors where it is adapted."""

    inputs: int
    outputs: int
    weight: Weight
    bias: Weight | None = None
    down: Weight | None = None
    up: Weight | None = None

    def parts(self) -> list[Weight]:
        """All its parameters."""
        return [part for part in (self.weight, self.bias, self.down, self.up) if part is not None]


@dataclass(frozen=True)
class Arithmetic:
    """In what precision operations compute.

    Attributes:
        autocast: Bytes of a number under autocast; None without it.
        casts_adapter_inputs: Whether PEFT turns the input of every adapter into the adapter's precision.
        has_adapter: Whether adapters are switched on.
        is_fused: Whether norms, rotary positions and gates are Liger's kernels, or compiled.
    """

    autocast: int | None = None
    casts_adapter_inputs: bool = True
    has_adapter: bool = True
    is_fused: bool = False


@dataclass
class Machine:
    """The operations, on one ledger."""

    ledger: Ledger
    arithmetic: Arithmetic = field(default_factory=Arithmetic)
    casts: list[Block] = field(default_factory=list)
    """Weights that train in the precision of autocast, which keeps them until it is left."""

    # --- elementwise -----------------------------------------------------------------------------------------------

    def cast(self, x: Value, width: int) -> Value:
        """``x.to(dtype)``."""
        if x.width == width:
            return x
        ledger, size = self.ledger, x.size
        return ledger.apply([x], ledger.value(x.count, width), lambda grad: [ledger.block(size)])

    def add(self, a: Value, b: Value) -> Value:
        """``a + b``."""
        out = self.ledger.value(max(a.count, b.count), max(a.width, b.width))
        wide, widths, ledger = out.width, (a.width, b.width), self.ledger
        sizes = (a.size, b.size)

        def backward(grad: Block) -> Sequence[Block | None]:
            return [grad if width == wide else ledger.block(size) for width, size in zip(widths, sizes, strict=True)]

        return ledger.apply([a, b], out, backward)

    def pointwise(self, x: Value, *, saved: Block | None = None, width: int | None = None) -> Value:
        """A function of every number; ``saved`` is what its derivative needs."""
        ledger, size = self.ledger, x.size

        def backward(grad: Block, kept: Block | None = saved) -> Sequence[Block | None]:
            return [ledger.block(size)]

        return ledger.apply([x], ledger.value(x.count, x.width if width is None else width), backward)

    def mul(self, a: Value, b: Value) -> Value:
        """``a * b``; each is kept for the other's gradient."""
        ledger, sizes = self.ledger, (a.size, b.size)
        keep = (b.block if a.node else None, a.block if b.node else None)

        def backward(grad: Block, kept: tuple[Block | None, Block | None] = keep) -> Sequence[Block | None]:
            return [ledger.block(size) if other else None for size, other in zip(sizes, kept, strict=True)]

        return ledger.apply([a, b], ledger.value(a.count, max(a.width, b.width)), backward)

    def fused(self, x: Value, *, width: int, scratch: int, backward_scratch: int) -> Value:
        """Several operations of which nothing large is kept; scratch memory in bytes, beside input and output."""
        ledger, size = self.ledger, x.size
        temporary = ledger.block(scratch)
        out = ledger.value(x.count, width)
        del temporary

        def backward(grad: Block) -> Sequence[Block | None]:
            temporary = ledger.block(backward_scratch)
            found = ledger.block(size)
            del temporary
            return [found]

        return ledger.apply([x], out, backward)

    def scaled(self, x: Value, weight: Weight) -> Value:
        """``weight * x`` with a weight for every channel."""
        ledger, size, count = self.ledger, x.size, weight.count
        out_width = max(x.width, weight.width)
        kept_weight = weight.block if x.node else None
        kept_x = x.block if weight.leaf else None

        def backward(
            grad: Block, kept: tuple[Block | None, Block | None] = (kept_weight, kept_x)
        ) -> Sequence[Block | None]:
            found = [ledger.block(size) if kept[0] else None, None]
            if kept[1]:
                ledger.scratch(grad.size)
                found[1] = ledger.block(count * out_width)
            return found

        return ledger.apply([x, weight.leaf], ledger.value(x.count, out_width), backward)

    def norm(self, x: Value, weight: Weight) -> Value:
        """RMSNorm as transformers writes it: in float32, then the weight; fused, its input alone is kept."""
        if self.arithmetic.is_fused:
            return self._fused_norm(x, weight)
        high = self.cast(x, 4)
        self.ledger.scratch(high.size)  # the squares
        ledger, size = self.ledger, high.size

        def backward(grad: Block, kept: Block = high.block) -> Sequence[Block | None]:
            found = ledger.block(size)
            # The gradient of the mean, and what the derivative of the square is computed through.
            ledger.scratch(4 * size)
            return [found]

        normal = ledger.apply([high], ledger.value(high.count, 4), backward)
        del high
        low = self.cast(normal, x.width)
        del normal
        return self.scaled(low, weight)

    def _fused_norm(self, x: Value, weight: Weight) -> Value:
        """One kernel each way."""
        ledger, size, count = self.ledger, x.size, weight.count

        def backward(grad: Block, kept: Block = x.block) -> Sequence[Block | None]:
            return [ledger.block(size), ledger.block(count * 4)]

        return ledger.apply([x, weight.leaf], ledger.value(x.count, x.width), backward)

    def gated(self, gate: Value, up: Value) -> Value:
        """``silu(gate) * up`` in one kernel, which writes both gradients over what it kept."""

        def backward(grad: Block, kept: tuple[Block, Block] = (gate.block, up.block)) -> Sequence[Block | None]:
            return list(kept)

        return self.ledger.apply([gate, up], self.ledger.value(gate.count, gate.width), backward)

    # --- products --------------------------------------------------------------------------------------------------

    def linear(self, x: Value, layer: Linear) -> Value:
        """A linear layer, with its adapter's share."""
        result = self.product(x, layer.weight, layer.outputs, layer.inputs, layer.bias)
        if layer.down is None or layer.up is None or not self.arithmetic.has_adapter:
            return result
        width, rank = result.width, layer.down.count // layer.inputs
        if self.arithmetic.casts_adapter_inputs:
            x = self.cast(x, layer.down.width)
        inner = self.product(x, layer.down, rank, layer.inputs, part="LoRA inputs")
        update = self.product(inner, layer.up, layer.outputs, rank)
        del inner
        share = self.pointwise(update)
        del update
        result = self.add(result, share)
        return self.cast(result, width)

    def product(
        self,
        x: Value,
        weight: Weight,
        outputs: int,
        inputs: int,
        bias: Weight | None = None,
        *,
        part: str | None = None,
    ) -> Value:
        """``x @ weight.T + bias``; what is kept of ``x`` for the gradient of the weight counts to ``part``."""
        ledger, autocast = self.ledger, self.arithmetic.autocast
        width = autocast or max(x.width, weight.width)
        x = self.cast(x, width)
        if part is not None and ledger.recording:
            ledger.move(x.block, part)
        if weight.quantization != "none":
            return self._quantized(x, weight, outputs, inputs)
        assert weight.block is not None
        used = weight.block if weight.width == width else ledger.block(weight.count * width)
        if autocast and weight.width != width and isinstance(weight.leaf, Leaf):
            self.casts.append(used)
        keep = (used if x.node else None, x.block if weight.leaf else None)
        sizes, given = (x.size, weight.count * width), weight.count * weight.width
        own_bias = bias is not None and bias.leaf is not None
        bias_size = bias.count * width if bias is not None else 0

        def backward(grad: Block, kept: tuple[Block | None, Block | None] = keep) -> Sequence[Block | None]:
            found: list[Block | None] = [ledger.block(sizes[0]) if kept[0] else None, None, None]
            if kept[1]:
                found[1] = ledger.block(sizes[1])
                if sizes[1] != given:  # back to the precision it is held in
                    found[1] = ledger.block(given)
            if own_bias:
                found[2] = ledger.block(bias_size)
            return found

        out = ledger.value(x.count // inputs * outputs, width)
        return ledger.apply([x, weight.leaf, bias.leaf if bias else None], out, backward)

    def experts(self, x: Value, layer: Linear) -> Value:
        """Every row through the expert it goes to; PEFT adds the factors of all experts to all their weights first."""
        ledger, weight = self.ledger, layer.weight
        if layer.down is None or layer.up is None or not self.arithmetic.has_adapter:
            return self._grouped(x, weight, layer)
        sizes = (layer.up.count * weight.width, layer.down.count * weight.width)
        whole = Value(ledger.block(weight.count * weight.width), weight.count, weight.width)

        def backward(grad: Block) -> Sequence[Block | None]:
            return [ledger.block(size) for size in sizes]

        whole = ledger.apply([layer.up.leaf, layer.down.leaf], whole, backward)
        return self._grouped(x, Weight(weight.count, weight.width, whole.node, block=whole.block), layer)

    def _grouped(self, x: Value, weight: Weight, layer: Linear) -> Value:
        """Autocast leaves grouped products alone: they are computed in the precision of the weights."""
        x, ledger = self.cast(x, weight.width), self.ledger
        keep = (weight.block if x.node else None, x.block if weight.leaf else None)
        sizes = (x.size, weight.count * weight.width)

        def backward(grad: Block, kept: tuple[Block | None, Block | None] = keep) -> Sequence[Block | None]:
            return [ledger.block(size) if other else None for size, other in zip(sizes, kept, strict=True)]

        out = ledger.value(x.count // layer.inputs * layer.outputs, weight.width)
        return ledger.apply([x, weight.leaf], out, backward)

    def _quantized(self, x: Value, weight: Weight, outputs: int, inputs: int) -> Value:
        """Weights are unpacked for the product, and again for its gradient."""
        ledger, size, unpacked = self.ledger, x.size, weight.count * x.width
        temporary = ledger.block(unpacked)
        out = ledger.value(x.count // inputs * outputs, x.width)
        del temporary

        def backward(grad: Block) -> Sequence[Block | None]:
            temporary = ledger.block(unpacked)
            found = ledger.block(size)
            del temporary
            return [found]

        return ledger.apply([x], out, backward)
