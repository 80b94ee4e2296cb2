"""A pass of a decoder in the operations of ``operations.py``, in the order transformers' code computes, and its head.

Local variables live as long as they do there, which decides what is alive at the peak.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from alignkit.memory.decoder import Decoder, Layer, Tokens
from alignkit.memory.ledger import Block, Leaf, Value
from alignkit.memory.operations import Linear, Machine
from alignkit.memory.shape import ModelShape


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
        positions = tokens.count if tokens.is_packed else tokens.length
        tables = [ledger.block(positions * shape.head * hidden.width) for _ in range(2)]
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
        if machine.arithmetic.is_fused:
            product = machine.gated(gate, machine.linear(x, linear["up_proj"]))
            del gate
            return machine.linear(product, linear["down_proj"])
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
        kernel = self._kernel
        if self.tokens.is_packed:
            # The kernels for parts of varying length know half precision alone.
            in_half = (machine.arithmetic.autocast or query.width) == 2
            kernel = self._parts_at_once if self.device == "cuda" and in_half else self._parts_apart
        out = kernel(query, key, value)
        del query, key, value
        return machine.linear(out, layer.linear["o_proj"])

    def _rotated(self, x: Value, table: int) -> Value:
        if self.machine.arithmetic.is_fused:
            return x  # turned where it lies
        # Forward: the product with the cosine, the halves exchanged, the product with the sine.
        width = max(x.width, table)
        size = x.count * width
        return self.machine.fused(x, width=width, scratch=2 * size, backward_scratch=3 * size)

    def _kernel(self, query: Value, key: Value, value: Value) -> Value:
        ledger, shape, tokens = self.machine.ledger, self.model.shape, self.tokens
        groups = shape.heads // shape.key_heads
        mask: Block | None = None
        is_eager = self.attention == "eager"
        if self.has_dense_mask and not is_eager:
            # A boolean mask is made one of numbers in every layer, which each keeps.
            mask = ledger.block(tokens.rows * tokens.length**2 * query.width)
        if groups > 1 and (self.has_dense_mask or is_eager):
            key, value = self._repeated(key, groups), self._repeated(value, groups)
        if is_eager:
            return self._written_out(query, key, value)
        out = ledger.value(query.count, query.width)
        lse = ledger.block(tokens.count * shape.heads * 4)
        kept = (query.block, key.block, value.block, out.block, lse, mask)
        sizes = (query.size, key.size, value.size)

        def backward(grad: Block, saved: tuple[Block | None, ...] = kept) -> list[Block | None]:
            return [ledger.block(size) for size in sizes]

        return ledger.apply([query, key, value], out, backward)

    def _written_out(self, query: Value, key: Value, value: Value) -> Value:
        """Eager attention: a number for every pair of positions and head, several times over."""
        ledger, shape, tokens = self.machine.ledger, self.model.shape, self.tokens
        pairs, width = tokens.rows * shape.heads * tokens.length**2, query.width
        # Scores, scaled scores, masked scores; the softmax in float32, and in the precision of the values.
        scores = [ledger.block(pairs * width) for _ in range(2)]
        ledger.scratch(pairs * width)
        softmax = ledger.block(pairs * 4)
        weights = softmax if width == 4 else ledger.block(pairs * width)
        del scores
        out = ledger.value(query.count, width)
        sizes = (query.size, key.size, value.size)

        def backward(
            grad: Block, kept: tuple[Block, ...] = (query.block, key.block, value.block, softmax, weights)
        ) -> list[Block | None]:
            ledger.scratch(pairs * (4 + max(width, 4)))
            return [ledger.block(size) for size in sizes]

        joined = ledger.apply([query, key, value], out, backward)
        return self.machine.pointwise(joined)  # heads and positions change places

    def _parts_at_once(self, query: Value, key: Value, value: Value) -> Value:
        """A packed row through a kernel for rows of varying length, over keys gathered for every part."""
        ledger, shape = self.machine.ledger, self.model.shape
        gathered = sum(keys for _, keys in self.tokens.parts()) * shape.key_heads * shape.head
        keys, values = (ledger.block(gathered * key.width) for _ in range(2))
        out = ledger.value(query.count, query.width)
        lse = ledger.block(self.tokens.count * shape.heads * 4)
        sizes = (query.size, key.size, value.size)

        def backward(
            grad: Block, kept: tuple[Block, ...] = (query.block, keys, values, out.block, lse)
        ) -> list[Block | None]:
            found: list[Block | None] = [ledger.block(sizes[0])]
            parts = [ledger.block(gathered * key_width) for _ in range(2)]
            found += [ledger.block(size) for size in sizes[1:]]
            del parts
            return found

        key_width = key.width
        return ledger.apply([query, key, value], out, backward)

    def _parts_apart(self, query: Value, key: Value, value: Value) -> Value:
        """A packed row part by part, those of one shape together; keys of a branch are copied behind its prefix's."""
        ledger, shape, width = self.machine.ledger, self.model.shape, query.width
        groups = Counter(self.tokens.parts())
        saved: list[tuple[tuple[int, ...], tuple[Block, ...]]] = []
        for (queries, keys), count in groups.items():
            # With a mask, keys are repeated for every query head before kernels of CUDA.
            key_heads = shape.key_heads if queries == keys or self.device == "cpu" else shape.heads
            sizes = tuple(
                count * length * heads * shape.head * width
                for length, heads in ((queries, shape.heads), (keys, key_heads), (keys, key_heads))
            )
            copies = [ledger.block(size) for size in sizes]
            mask = [ledger.block(queries * keys * width)] if queries != keys else []
            out, lse = ledger.block(sizes[0]), ledger.block(count * queries * shape.heads * 4)
            saved.append((sizes, (*copies, *mask, out, lse) if ledger.recording else (out,)))
            del copies, mask, out, lse
        whole = (query.size, key.size, value.size)

        def backward(grad: Block, kept: list[Any] = saved) -> list[Block | None]:
            pieces = []
            while kept:
                sizes, blocks = kept.pop()
                pieces.append([ledger.block(size) for size in sizes])
                del blocks
            found: list[Block | None] = []
            for size in whole:
                found.append(ledger.block(size))
                for piece in pieces:
                    piece.pop(0)
            return found

        joined = ledger.value(query.count, width)
        return ledger.apply([query, key, value], joined, backward)

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
        ledger, sizes = self.machine.ledger, (out.size, chances.size)
        saved = (out.block if chances.node else None, chances.block, order)

        def backward(grad: Block, kept: tuple[Block | None, ...] = saved) -> list[Block | None]:
            return [ledger.block(size) for size in sizes]

        return ledger.apply([out, chances], ledger.value(out.count, out.width), backward)

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
