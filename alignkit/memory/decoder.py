"""A decoder in the operations of ``operations.py``, in the order transformers' code computes, with its fused head.

Local variables live as long as they do there, which decides what is alive at the peak. Numbers in comments count whole
tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from alignkit.memory.ledger import Block, Leaf, Value
from alignkit.memory.operations import Linear, Machine, Quantization, Weight
from alignkit.memory.shape import ModelShape

ATTENTION_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_LINEAR = ("gate_proj", "up_proj", "down_proj")
LINEAR_PLACES: Mapping[str, str] = {
    **{name: f"self_attn.{name}" for name in ATTENTION_LINEAR},
    **{name: f"mlp.{name}" for name in MLP_LINEAR},
}
"""Linear layers of a decoder layer and where they stand in it, for patterns over full names."""


@dataclass(frozen=True)
class Trained:
    """Which weights train, and how the others are held.

    Attributes:
        kind: Every weight, low-rank factors on frozen ones, routers alone, or nothing (a reference).
        width: Bytes of a number of what is frozen.
        held: Bytes of a number of what trains: 4, whatever the model was loaded in, except under DeepSpeed.
        gradient_share: How much of the gradients a process keeps.
        rank: Of the factors.
        targets: Linear layers that have factors, by the last part of their name; None is all of them.
        saved_beside: Modules that train in full beside the factors.
        quantization: Of the frozen linear layers.
    """

    kind: Literal["full", "lora", "routers", "nothing"] = "full"
    width: int = 4
    held: int = 4
    gradient_share: float = 1.0
    rank: int = 16
    targets: tuple[str, ...] | None = None
    saved_beside: tuple[str, ...] = ()
    quantization: Quantization = "none"


@dataclass(frozen=True)
class Tokens:
    """One micro-batch as the model sees it.

    Attributes:
        rows: Rows of the tensors.
        length: Their length, padding included.
        has_mask: Whether rows are padded, so that attention takes a mask.
        scored: Positions whose next token is trained or scored; the head skips the others on an accelerator.
        is_packed: Whether it is one row of several behind one another, without padding.
    """

    rows: int
    length: int
    has_mask: bool
    scored: int
    is_packed: bool = False

    @property
    def count(self) -> int:
        """Positions that are computed."""
        return self.rows * self.length


@dataclass
class Layer:
    """The weights of one decoder layer."""

    norms: list[Weight]
    head_norms: list[Weight]
    linear: dict[str, Linear]
    router: Linear | None = None
    gate_up: Linear | None = None
    down: Linear | None = None
    shared: dict[str, Linear] = field(default_factory=dict)

    def weights(self) -> Iterator[Weight]:
        """All its parameters."""
        yield from self.norms
        yield from self.head_norms
        for linear in (*self.linear.values(), *self.shared.values(), self.router, self.gate_up, self.down):
            if linear is not None:
                yield from linear.parts()


class Decoder:
    """The weights of a model.

    Args:
        shape: Its sizes.
        trained: What of it trains.
    """

    def __init__(self, shape: ModelShape, trained: Trained) -> None:
        self.shape, self.trained = shape, trained
        in_full = trained.kind == "full"
        words = (shape.vocabulary, shape.hidden)
        self.embedding, own = (
            self._weight(words[0] * words[1], in_full or name in trained.saved_beside, sides=words)
            for name in ("embed_tokens", "lm_head")
        )
        self.head = self.embedding if shape.tied and "lm_head" not in trained.saved_beside else own
        self.last_norm = self._weight(shape.hidden, in_full)
        self.layers = [self._layer(i) for i in range(shape.layers)]

    def weights(self) -> Iterator[Weight]:
        """All parameters, each once."""
        yield self.embedding
        if self.head is not self.embedding:
            yield self.head
        yield self.last_norm
        for layer in self.layers:
            yield from layer.weights()

    def _weight(
        self, count: int, trains: bool, quantization: Quantization = "none", sides: tuple[int, int] | None = None
    ) -> Weight:
        width = self.trained.held if trains else self.trained.width
        leaf = Leaf(share=self.trained.gradient_share) if trains else None
        return Weight(count, width, leaf, quantization, sides=sides)

    def _linear(self, name: str, inputs: int, outputs: int, *, bias: bool = False) -> Linear:
        trained = self.trained
        in_full = trained.kind == "full" or name in trained.saved_beside or (trained.kind, name) == ("routers", "gate")
        quantization = "none" if in_full else trained.quantization
        weight = self._weight(inputs * outputs, in_full, quantization, sides=(outputs, inputs))
        linear = Linear(inputs, outputs, weight, self._weight(outputs, in_full) if bias else None)
        if trained.kind == "lora" and (trained.targets is None or name in trained.targets):
            linear.down = self._weight(inputs * trained.rank, True, sides=(trained.rank, inputs))
            linear.up = self._weight(outputs * trained.rank, True, sides=(outputs, trained.rank))
        return linear

    def _mlp(self, inner: int) -> dict[str, Linear]:
        shape = self.shape
        sides = ((shape.hidden, inner), (shape.hidden, inner), (inner, shape.hidden))
        named = zip(MLP_LINEAR, sides, strict=True)
        return {name: self._linear(name, *side, bias=shape.mlp_bias) for name, side in named}

    def _layer(self, index: int) -> Layer:
        shape, full = self.shape, self.trained.kind == "full"
        queries, keys = shape.heads * shape.head, shape.key_heads * shape.head
        sides = ((shape.hidden, queries), (shape.hidden, keys), (shape.hidden, keys), (queries, shape.hidden))
        # Qwen2 has no bias behind its attention, only before it.
        behind = shape.attention_bias and not shape.family.qkv_bias
        linear = {
            name: self._linear(name, *side, bias=shape.attention_bias if name != "o_proj" else behind)
            for name, side in zip(ATTENTION_LINEAR, sides, strict=True)
        }
        widths = {"head": (shape.head, shape.head), "all": (queries, keys), None: ()}[shape.family.head_norm]
        layer = Layer(
            norms=[self._weight(shape.hidden, full) for _ in range(shape.family.norms)],
            head_norms=[self._weight(width, full) for width in widths],
            linear=linear,
        )
        if index not in shape.expert_layers:
            linear |= self._mlp(shape.inner)
            return layer
        layer.router = self._linear("gate", shape.hidden, shape.experts)
        layer.gate_up = self._stack("gate_up_proj", shape.hidden, 2 * shape.expert_inner)
        layer.down = self._stack("down_proj", shape.expert_inner, shape.hidden)
        if shape.shared_inner:
            layer.shared = self._mlp(shape.shared_inner) | {"gate": self._linear("shared_expert_gate", shape.hidden, 1)}
        return layer

    def _stack(self, name: str, inputs: int, outputs: int) -> Linear:
        """A matrix of every expert, with factors for each where PEFT adapts all linear layers."""
        experts, trained = self.shape.experts, self.trained
        stack = Linear(inputs, outputs, self._weight(experts * inputs * outputs, trained.kind == "full"))
        if trained.kind == "lora" and trained.targets is None:
            rank = trained.rank * experts
            stack.down = self._weight(inputs * rank, True, sides=(rank, inputs))
            stack.up = self._weight(outputs * rank, True, sides=(outputs, rank))
        return stack


@dataclass
class Pass:
    """One pass of a decoder over a micro-batch.

    Attributes:
        machine: The operations.
        model: The weights.
        tokens: The micro-batch.
        checkpointing: Whether a layer keeps its input alone, and computes the rest again when it is needed.
        device: ``cpu`` or ``cuda``: their attention kernels and heads differ.
        attention: ``sdpa``, ``eager`` or ``flash_attention_2``.
        outputs: What the head computes beside log-probs.
    """

    machine: Machine
    model: Decoder
    tokens: Tokens
    checkpointing: bool = False
    device: Literal["cpu", "cuda"] = "cpu"
    attention: str = "sdpa"
    outputs: tuple[str, ...] = ("entropy", "is_top1")
    mask: Block | None = None

    def states(self) -> Value:
        """The hidden states behind the last norm."""
        ledger, shape, tokens = self.machine.ledger, self.model.shape, self.tokens
        embedding = self.model.embedding
        size = embedding.count * embedding.width
        out = ledger.value(tokens.count * shape.hidden, embedding.width)
        hidden = ledger.apply([embedding.leaf], out, lambda grad: [ledger.block(size)])
        del out
        if self.checkpointing and hidden.node is None and ledger.recording:
            hidden = Value(hidden.block, hidden.count, hidden.width, Leaf("activations"))
        if self.has_dense_mask:
            self.mask = ledger.block(tokens.rows * tokens.length**2)
        # The tables of the position encoding, which every layer reads.
        tables = [ledger.block(tokens.count * shape.head * hidden.width) for _ in range(2)]
        for layer in self.model.layers:
            hidden = self._checkpointed(hidden, layer) if self.checkpointing else self.layer(hidden, layer)
        del tables
        return self.machine.norm(hidden, self.model.last_norm)

    @property
    def has_dense_mask(self) -> bool:
        """Whether attention takes a mask of a number for every pair of positions."""
        return self.tokens.has_mask and not self.tokens.is_packed and self.attention != "flash_attention_2"

    def _checkpointed(self, hidden: Value, layer: Layer) -> Value:
        ledger = self.machine.ledger
        with ledger.no_grad():
            out = self.layer(hidden.detached(), layer)
        if not ledger.recording:
            return out
        count, width = hidden.count, hidden.width

        def backward(grad: Block, kept: Block = hidden.block) -> list[Block | None]:
            inside = Leaf("activations")
            before, self.machine.casts = self.machine.casts, []
            again = self.layer(Value(kept, count, width, inside), layer)
            self.machine.casts = before
            del kept
            ledger.backward(again, grad)
            return [inside.grad]

        return ledger.apply([hidden], out, backward)

    # --- a layer ---------------------------------------------------------------------------------------------------

    def layer(self, hidden: Value, layer: Layer) -> Value:
        """One decoder layer."""
        machine, post = self.machine, len(layer.norms) == 4
        normal = machine.norm(hidden, layer.norms[0])
        attended = self._attention(normal, layer)
        del normal
        if post:
            attended = machine.norm(attended, layer.norms[2])
        hidden = machine.add(hidden, attended)
        del attended
        normal = machine.norm(hidden, layer.norms[1])
        fed = self._experts(normal, layer) if layer.router else self._mlp(normal, layer.linear)
        del normal
        if post:
            fed = machine.norm(fed, layer.norms[3])
        return machine.add(hidden, fed)

    def _mlp(self, x: Value, linear: Mapping[str, Linear]) -> Value:
        machine = self.machine
        gate = machine.linear(x, linear["gate_proj"])
        active = machine.pointwise(gate, saved=gate.block)
        del gate
        up = machine.linear(x, linear["up_proj"])
        product = machine.mul(active, up)
        del active, up
        return machine.linear(product, linear["down_proj"])

    def _attention(self, x: Value, layer: Layer) -> Value:
        machine = self.machine
        query = machine.linear(x, layer.linear["q_proj"])
        if layer.head_norms:
            query = machine.norm(query, layer.head_norms[0])
        key = machine.linear(x, layer.linear["k_proj"])
        if layer.head_norms:
            key = machine.norm(key, layer.head_norms[1])
        value = machine.linear(x, layer.linear["v_proj"])
        table = x.width
        query, key = self._rotated(query, table), self._rotated(key, table)
        width = machine.arithmetic.autocast or query.width
        query, key, value = (machine.cast(part, width) for part in (query, key, value))
        out = self._kernel(query, key, value)
        del query, key, value
        return machine.linear(out, layer.linear["o_proj"])

    def _rotated(self, x: Value, table: int) -> Value:
        # Forward: the product with the cosine, the halves exchanged, the product with the sine.
        width = max(x.width, table)
        size = x.count * width
        return self.machine.fused(x, width=width, scratch=2 * size, backward_scratch=3 * size)

    def _kernel(self, query: Value, key: Value, value: Value) -> Value:
        ledger, shape, tokens = self.machine.ledger, self.model.shape, self.tokens
        groups = shape.heads // shape.key_heads
        mask: Block | None = None
        if self.has_dense_mask:
            # A boolean mask is made one of numbers in every layer, which each keeps.
            mask = ledger.block(tokens.rows * tokens.length**2 * query.width)
        if groups > 1 and self.has_dense_mask:
            key, value = self._repeated(key, groups), self._repeated(value, groups)
        out = ledger.value(query.count, query.width)
        lse = ledger.block(tokens.count * shape.heads * 4)
        kept = (query.block, key.block, value.block, out.block, lse, mask)
        sizes = (query.size, key.size, value.size)

        def backward(grad: Block, saved: tuple[Block | None, ...] = kept) -> list[Block | None]:
            return [ledger.block(size) for size in sizes]

        return ledger.apply([query, key, value], out, backward)

    def _repeated(self, x: Value, groups: int) -> Value:
        ledger, size = self.machine.ledger, x.size
        out = ledger.value(x.count * groups, x.width)
        return ledger.apply([x], out, lambda grad: [ledger.block(size)])

    def _experts(self, x: Value, layer: Layer) -> Value:
        machine, shape = self.machine, self.model.shape
        assert layer.router and layer.gate_up and layer.down
        ledger, chosen, size = machine.ledger, shape.chosen, x.size
        scores = machine.linear(x, layer.router)
        chances = machine.pointwise(machine.cast(scores, 4))
        # Which row goes where: numbers of 64 bits for every row and expert it goes to.
        order = ledger.block(5 * 8 * self.tokens.count * chosen)
        picked = ledger.apply([x], ledger.value(x.count * chosen, x.width), lambda grad: [ledger.block(size)])
        both = machine.experts(picked, layer.gate_up)
        del picked
        half = Value(both.block, both.count // 2, both.width, both.node)
        active = machine.pointwise(half, saved=both.block)
        inner = machine.mul(active, half)
        del both, half, active
        out = machine.experts(inner, layer.down)
        del inner
        weighted = self._weighted(out, chances, order)
        del out, order, scores, chances
        ordered = machine.pointwise(weighted)
        del weighted
        ordered_size = ordered.size
        total = ledger.apply([ordered], ledger.value(x.count, x.width), lambda grad: [ledger.block(ordered_size)])
        del ordered
        return total

    def _weighted(self, out: Value, chances: Value, order: Block) -> Value:
        """What the experts put out, each by its weight."""
        ledger, size = self.machine.ledger, out.size
        saved = (out.block, chances.block, order)

        def backward(grad: Block, kept: tuple[Block, ...] = saved) -> list[Block | None]:
            return [ledger.block(size)]

        return ledger.apply([out], ledger.value(out.count, out.width), backward)

    # --- the head --------------------------------------------------------------------------------------------------

    def log_probs(self, states: Value) -> Value:
        """TRL's fused head: log-probs of the next tokens, in tiles of 4,096 tokens and 32,768 words."""
        ledger, shape = self.machine.ledger, self.model.shape
        with ledger.doing("head", "head"):
            return self._head(states, shape)

    def _head(self, states: Value, shape: ModelShape) -> Value:
        ledger, tokens, head = self.machine.ledger, self.tokens, self.model.head
        on_cpu = self.device == "cpu"
        count = tokens.scored if not on_cpu or tokens.is_packed else tokens.rows * (tokens.length - 1)
        compute = self.machine.arithmetic.autocast or states.width
        hidden_size = states.size
        # All but the last position of every row, copied.
        used = ledger.value(count * shape.hidden, states.width)
        columns, n = min(shape.vocabulary, 32768), min(count, 4096)
        tile = n * columns * 4
        buffer = n * 32768 * compute
        piece = columns * shape.hidden * compute if compute != head.width else 0
        statistics = ledger.block(7 * count * 4)
        work = ledger.block(buffer + piece + (n * shape.hidden * compute if compute != states.width else 0))
        if on_cpu:
            # Beside the scaled tile: which words come before the target, and the exponentials.
            ledger.scratch(int(tile * 3.25))
        del work, statistics
        out = ledger.value(count, 4)
        entropy = ledger.block(count * 4)
        needs_hidden, needs_weight = states.node is not None, head.leaf is not None
        sizes = (count * shape.hidden, head.count, states.width, head.width)

        def backward(grad: Block, kept: tuple[Block, ...] = (used.block, entropy)) -> list[Block | None]:
            with ledger.doing("backward pass of the head", "head"):
                high = ledger.block(sizes[0] * 4) if needs_hidden else None
                high_weight = ledger.block(sizes[1] * 4) if needs_weight else None
                work = ledger.block(buffer + piece)
                if on_cpu:
                    ledger.scratch(int(tile * 7.25))
                del work
                found = [high, high_weight if sizes[3] == 4 or not needs_weight else ledger.block(sizes[1] * sizes[3])]
                if needs_hidden and sizes[2] != 4:
                    found[0] = ledger.block(sizes[0] * sizes[2])
                if needs_hidden and on_cpu:
                    # The gradient of the slice, and of the positions left out.
                    found[0] = ledger.block(hidden_size)
            return found

        return ledger.apply([states, head.leaf], out, backward)
