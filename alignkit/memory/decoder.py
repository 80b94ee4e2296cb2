"""The weights of a decoder, which of them train, and the tokens that a pass runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from alignkit.memory.ledger import Leaf
from alignkit.memory.operations import Linear, Quantization, Weight
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
        last_routers: Of how many layers the routers train, where only routers do; None is all of them.
    """

    kind: Literal["full", "lora", "routers", "nothing"] = "full"
    width: int = 4
    held: int = 4
    gradient_share: float = 1.0
    rank: int = 16
    targets: tuple[str, ...] | None = None
    saved_beside: tuple[str, ...] = ()
    quantization: Quantization = "none"
    last_routers: int | None = None


@dataclass(frozen=True)
class Tokens:
    """One micro-batch as the model sees it.

    Attributes:
        rows: Rows of the tensors.
        length: Their length, padding included.
        has_mask: Whether rows are padded, so that attention takes a mask.
        scored: Positions whose next token is trained or scored; the head skips the others on an accelerator.
        prompts: Of one packed row, without padding, the length of each prompt's prefix (0 where there is none) and
            those of the branches that go on from it; empty where rows are padded.
    """

    rows: int
    length: int
    has_mask: bool
    scored: int
    prompts: tuple[tuple[int, tuple[int, ...]], ...] = ()

    @property
    def count(self) -> int:
        """Positions that are computed."""
        return self.rows * self.length

    @property
    def is_packed(self) -> bool:
        """Whether it is one row of several behind one another."""
        return bool(self.prompts)

    def parts(self) -> list[tuple[int, int]]:
        """Queries and keys of every part of a packed row that attention is computed for by itself."""
        prefixes = [(prefix, prefix) for prefix, _ in self.prompts if prefix]
        return prefixes + [(own, prefix + own) for prefix, branches in self.prompts for own in branches if own]

    @classmethod
    def packed(cls, prompts: tuple[tuple[int, tuple[int, ...]], ...], scored: int | None = None) -> Tokens:
        """One row of prompts with their branches; every token of a branch is scored unless ``scored`` says how many."""
        branches = sum(own for _, each in prompts for own in each)
        whole = sum(prefix for prefix, _ in prompts) + branches
        return cls(1, whole, False, branches if scored is None else scored, prompts)


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
        in_full = trained.kind == "full" or name in trained.saved_beside
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
        layer.router = self._router(index)
        layer.gate_up = self._stack("gate_up_proj", shape.hidden, 2 * shape.expert_inner)
        layer.down = self._stack("down_proj", shape.expert_inner, shape.hidden)
        if shape.shared_inner:
            layer.shared = self._mlp(shape.shared_inner) | {"gate": self._linear("shared_expert_gate", shape.hidden, 1)}
        return layer

    def _router(self, index: int) -> Linear:
        shape, last = self.shape, self.trained.last_routers
        if self.trained.kind != "routers":
            return self._linear("gate", shape.hidden, shape.experts)
        trains = last is None or index in sorted(shape.expert_layers)[-last:]
        return Linear(shape.hidden, shape.experts, self._weight(shape.hidden * shape.experts, trains))

    def _stack(self, name: str, inputs: int, outputs: int) -> Linear:
        """A matrix of every expert, with factors for each where PEFT adapts all linear layers."""
        experts, trained = self.shape.experts, self.trained
        stack = Linear(inputs, outputs, self._weight(experts * inputs * outputs, trained.kind == "full"))
        if trained.kind == "lora" and trained.targets is None:
            rank = trained.rank * experts
            stack.down = self._weight(inputs * rank, True, sides=(rank, inputs))
            stack.up = self._weight(outputs * rank, True, sides=(outputs, rank))
        return stack
