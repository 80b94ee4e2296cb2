"""The memory of one training step and one evaluation, part by part."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from alignkit.memory.decoder import Decoder, Tokens, Trained
from alignkit.memory.forward import Pass
from alignkit.memory.ledger import Block, Leaf, Ledger
from alignkit.memory.operations import Arithmetic, Machine, Weight
from alignkit.memory.shape import ModelShape

_EIGHT_BITS = 1 + 4 / 256
"""A number of 8 bits, and its share of the scale of 32 bits that a block of 256 has."""
STATE_BYTES = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "paged_adamw_32bit"), 8.0),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit"), 2 * _EIGHT_BITS),
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit", "adagrad", "rmsprop", "schedule_free_sgd"), 4.0),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit"), _EIGHT_BITS),
    **dict.fromkeys(("schedule_free_adamw", "schedule_free_radam"), 8.0),
    "ademamix": 12.0,
    "ademamix_8bit": 3 * _EIGHT_BITS,
    # Of hidden matrices; embeddings and norms, which it leaves to AdamW, are few where adapters train.
    "muon": 4.0,
    "sgd": 0.0,
}
"""What an optimizer keeps for every trained number; Adafactor keeps rows and columns."""
SMALL_FOR_8_BIT = 4096
"""Tensors below this many numbers keep 32-bit states under an 8-bit optimizer."""
PARTS = (
    "weights",
    "adapters",
    "gradients",
    "optimizer",
    "reference",
    "activations",
    "LoRA inputs",
    "head",
    "evaluation",
)


@dataclass(frozen=True)
class Step:
    """What is trained, and how.

    Attributes:
        tokens: The fullest micro-batch.
        trained: What trains, and in what precision the rest is held.
        autocast: Bytes of a number under mixed precision; None without.
        checkpointing: Whether activations are computed again in the backward pass.
        accumulates: Whether gradients of earlier micro-batches are there.
        optimizer: The key ``optim``.
        reference: ``none`` (or precomputed), the policy with its adapter off, or a copy of the model in ``width``.
        evaluation: The fullest micro-batch of an evaluation; None where nothing is evaluated.
        attention: ``sdpa``, ``eager`` or ``flash_attention_2``.
        outputs: What the head computes beside log-probs.
        device: Whose kernels.
        casts_adapter_inputs: Whether PEFT casts what adapters are given.
        is_fused: Whether norms, rotary positions and gates are Liger's kernels, or layers are compiled.
        processes: How many share a step.
        zero_stage: What of DeepSpeed's ZeRO is switched on; 0 is plain data parallelism.
        offload_optimizer, offload_parameters: What ZeRO holds in the host's memory.
    """

    tokens: Tokens
    trained: Trained = Trained()
    autocast: int | None = None
    checkpointing: bool = False
    accumulates: bool = False
    optimizer: str = "adamw_torch"
    reference: Literal["none", "adapter_disabled", "copy"] = "none"
    evaluation: Tokens | None = None
    attention: str = "sdpa"
    outputs: tuple[str, ...] = ("entropy", "is_top1")
    device: Literal["cpu", "cuda"] = "cpu"
    casts_adapter_inputs: bool = True
    is_fused: bool = False
    processes: int = 1
    zero_stage: int = 0
    offload_optimizer: bool = False
    offload_parameters: bool = False


@dataclass(frozen=True)
class Estimate:
    """Bytes on one device at the highest point of a step, part by part.

    Attributes:
        peak: All of it.
        where: What is being done then.
        parts: What is alive then, by the names of ``PARTS``.
        saved: Activations kept for the backward pass, when the last layer has been computed.
        evaluation: Highest point of an evaluation.
        is_exact: Whether the architecture is one that is known.
    """

    peak: int
    where: str
    parts: dict[str, int]
    saved: int
    evaluation: int
    is_exact: bool


def estimate(shape: ModelShape, step: Step) -> Estimate:
    """What a step takes.

    Args:
        shape: The model.
        step: The run.
    """
    return _Run(shape, step).estimate()


@dataclass
class _Run:
    shape: ModelShape
    step: Step
    ledger: Ledger = field(default_factory=Ledger)
    held: list[Block] = field(default_factory=list)

    def estimate(self) -> Estimate:
        step, ledger = self.step, self.ledger
        policy = Decoder(self.shape, step.trained)
        self._place(policy)
        self._shared_among_processes(policy)
        copy = None
        if step.reference == "copy":
            copy = Decoder(self.shape, Trained("nothing", step.trained.width))
            for weight in copy.weights():
                weight.block = ledger.block(weight.stored, "reference")
        self._optimizer_states(policy)
        saved = self._step(policy, copy)
        peak, parts, where = ledger.peak, ledger.at_peak, ledger.peak_phase
        evaluation = self._evaluate(policy, copy)
        if ledger.peak > peak:
            peak, parts, where = ledger.peak, ledger.at_peak, ledger.peak_phase
        return Estimate(
            peak, where, {name: parts[name] for name in PARTS if parts[name]}, saved, evaluation, self.shape.is_known
        )

    def _place(self, model: Decoder) -> None:
        step, share = self.step, 1.0
        if step.zero_stage == 3:
            share = 0.0 if step.offload_parameters else 1 / step.processes
        for weight in model.weights():
            is_factor = step.trained.kind == "lora" and weight.leaf is not None
            part = "adapters" if is_factor else "weights"
            weight.block = self.ledger.block(int(weight.stored * share), part)

    def _shared_among_processes(self, model: Decoder) -> None:
        """What data parallelism and ZeRO hold beside the model."""
        step, ledger = self.step, self.ledger
        trained = sum(weight.count for weight in model.weights() if weight.leaf is not None)
        if step.zero_stage == 0 and step.processes > 1:
            # Gradients are sent in buckets, which are copies.
            self.held.append(ledger.block(trained * step.trained.held, "gradients"))
        if step.zero_stage and not step.offload_optimizer:
            # The optimizer steps float32 copies.
            self.held.append(ledger.block(4 * trained // step.processes, "optimizer"))
        if step.zero_stage == 3:
            layers = [sum(weight.stored for weight in layer.weights()) for layer in model.layers]
            # A layer is put together while it computes, with the next one on its way, and so is the embedding.
            self.held.append(ledger.block(2 * max(layers) + model.embedding.stored, "weights"))

    def _optimizer_states(self, model: Decoder) -> None:
        step = self.step
        if step.offload_optimizer or step.optimizer.startswith("paged"):
            return  # in the host's memory
        share = 1 / step.processes if step.zero_stage else 1.0
        self.held += [
            self.ledger.block(int(state_bytes(step.optimizer, weight) * share), "optimizer")
            for weight in model.weights()
            if weight.leaf is not None
        ]

    def _pass(self, model: Decoder, tokens: Tokens, *, adapter: bool = True) -> Pass:
        step = self.step
        arithmetic = Arithmetic(step.autocast, step.casts_adapter_inputs, adapter, step.is_fused)
        machine = Machine(self.ledger, arithmetic)
        return Pass(machine, model, tokens, step.checkpointing, step.device, step.attention, step.outputs)

    def _step(self, policy: Decoder, copy: Decoder | None) -> int:
        ledger, step = self.ledger, self.step
        inputs = ledger.block(3 * 8 * step.tokens.count)
        trained = [(weight, weight.leaf) for weight in policy.weights() if isinstance(weight.leaf, Leaf)]
        if step.accumulates:
            for weight, leaf in trained:
                size = int(weight.count * weight.width * leaf.share)
                leaf.grad = ledger.block(size, "gradients")
        before = ledger.total
        with ledger.doing("forward pass"):
            forward = self._pass(policy, step.tokens)
            states = forward.states()
            saved = ledger.total - before
            scores = forward.log_probs(states)
            del states
        forward.machine.casts.clear()
        self._refer(policy, copy, step.tokens, "reference")
        forward.mask = None
        with ledger.doing("backward pass"):
            ledger.backward(scores)
        del scores, forward, inputs
        with ledger.doing("optimizer step", "optimizer"):
            ledger.scratch(step_scratch(step, [weight.count * 4 for weight, _ in trained]))  # in float32
        for _, leaf in trained:
            leaf.grad = None
        return saved

    def _refer(self, policy: Decoder, copy: Decoder | None, tokens: Tokens, part: str) -> None:
        """Score a micro-batch under the reference."""
        if self.step.reference == "none":
            return
        with self.ledger.doing("forward pass of the reference", part), self.ledger.no_grad():
            scoring = self._pass(copy or policy, tokens, adapter=False)
            scoring.log_probs(scoring.states())

    def _evaluate(self, policy: Decoder, copy: Decoder | None) -> int:
        ledger, tokens = self.ledger, self.step.evaluation
        if tokens is None:
            return 0
        peak, ledger.peak = ledger.peak, 0
        with ledger.doing("evaluation", "evaluation"), ledger.no_grad():
            scoring = self._pass(policy, tokens)
            scoring.log_probs(scoring.states())
            del scoring
            self._refer(policy, copy, tokens, "evaluation")
        highest, ledger.peak = ledger.peak, max(peak, ledger.peak)
        return highest


def state_bytes(optimizer: str, weight: Weight) -> int:
    """What an optimizer keeps for a trained tensor."""
    if optimizer == "adafactor":
        return 4 * (weight.sides[0] + weight.sides[1]) if weight.sides else 4 * weight.count
    if optimizer.endswith("8bit") and weight.count < SMALL_FOR_8_BIT:
        return 4 * round(STATE_BYTES[optimizer]) * weight.count
    return int(STATE_BYTES[optimizer] * weight.count)


def step_scratch(step: Step, sizes: list[int]) -> int:
    """What an optimizer needs while it steps: a tensor at a time on a CPU, all at once where kernels take lists."""
    largest, whole = max(sizes, default=0), sum(sizes) // (step.processes if step.zero_stage else 1)
    if step.optimizer == "adafactor":
        return 3 * largest
    if step.optimizer == "adamw_torch":
        return whole if step.device == "cuda" and not step.offload_optimizer else 2 * largest
    return 0
