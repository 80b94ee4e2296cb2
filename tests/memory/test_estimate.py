"""The memory estimate against transformers' own count of weights, sums by hand and real training steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from alignkit.errors import ModelError
from alignkit.memory.decoder import Decoder, Tokens, Trained
from alignkit.memory.estimate import Step, estimate
from alignkit.memory.ledger import Block, Leaf, Ledger, Value
from alignkit.memory.shape import FAMILIES, ModelShape
from scripts.validate_memory import TOLERANCE, Case, TrackedAllocations, estimated, measured

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
OWN_SIZES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [1]},
}
BILLIONS: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
"""The config of an 8B model."""


def step(**changes: Any) -> Step:
    """Eight pairs of 384 + 128 tokens with LoRA on bf16 weights, as GPUs are used."""
    how: dict[str, Any] = {
        "tokens": Tokens(16, 512, False, 16 * 128),
        "trained": Trained("lora", 2),
        "autocast": 2,
        "device": "cuda",
    }
    return Step(**how | changes)


# --- the ledger -------------------------------------------------------------------------------------------------------


def test_a_block_is_alive_as_long_as_something_refers_to_it() -> None:
    ledger = Ledger()
    first = ledger.block(100)
    second = ledger.block(20, "weights")
    del first
    third = ledger.block(30)
    assert (ledger.total, ledger.peak) == (50, 120)
    assert ledger.at_peak == {"activations": 100, "weights": 20}
    del second, third
    assert ledger.total == 0


def test_a_chain_keeps_what_it_saved_until_it_has_run_backwards() -> None:
    """Two products: the first saves its input of 10 bytes, the second the result of the first, 10 bytes too."""
    ledger, leaf, other = Ledger(), Leaf(), Leaf()
    seen = []

    def product(x: Value, weight: Leaf) -> Value:
        def backward(grad: Block, kept: Block = x.block) -> list[Block | None]:
            seen.append(ledger.total)
            return [ledger.block(10), ledger.block(7)]

        return ledger.apply([x, weight], ledger.value(10, 1), backward)

    result = product(product(ledger.value(10, 1), leaf), other)
    assert ledger.total == 30
    ledger.backward(result)
    del result
    # The gradient of the result is there; then a gradient of 10 in its place, one input less, and a weight's of 7.
    assert seen == [40, 37]
    assert ledger.peak == 40 + 10 + 7
    assert ledger.total == ledger.live["gradients"] == 14


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FAMILIES)
def test_weights_are_those_of_transformers(kind: str) -> None:
    config = transformers.AutoConfig.for_model(kind, **SIZES, **OWN_SIZES.get(kind, {}))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    counted = sum(weight.count for weight in Decoder(ModelShape.of(config.to_dict()), Trained()).weights())
    assert counted == sum(parameter.numel() for parameter in model.parameters())


def test_a_config_that_describes_no_decoder_is_refused_by_what_it_lacks() -> None:
    with pytest.raises(ModelError, match=r"memory of a gpt2 cannot be estimated: its config has no hidden_size"):
        ModelShape.of({"model_type": "gpt2", "n_embd": 32})


def test_an_unknown_mixture_of_experts_is_not_taken_for_dense() -> None:
    with pytest.raises(
        ModelError, match="memory of a deepseek_v3 cannot be estimated: its config has n_routed_experts"
    ):
        ModelShape.of({**BILLIONS, "model_type": "deepseek_v3", "n_routed_experts": 256})
    assert not ModelShape.of({**BILLIONS, "model_type": "new_kind"}).is_known


# --- whole steps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        Case("full, ragged, checkpointing, bf16", rank=None, checkpointing=True, bf16=True, completions=(60, 25)),
        Case("packed, K = 3", completions=(40, 25, 10), layout="packed"),
        Case("experts", "Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}),
        Case("supervised nf4", program="sft", completions=(90, 40), quantization="nf4", dtype="bfloat16", bf16=True),
    ],
    ids=lambda case: case.name,
)
def test_a_step_takes_what_is_estimated(case: Case) -> None:
    case = replace(case, sizes={"num_hidden_layers": 3} | case.sizes)
    found, expected = measured(case), estimated(case)
    assert expected.peak == pytest.approx(found.peak, rel=TOLERANCE)
    assert expected.saved == pytest.approx(found.saved, rel=TOLERANCE)


def test_tracked_allocations_are_those_alive() -> None:
    given = torch.zeros(100)
    with TrackedAllocations([given]) as tracked:
        kept = torch.zeros(1000)
        doubled = kept.view(10, 100) * 2
        del doubled
        del kept
        (given + 1).view(-1)
    assert tracked.live == 400
    assert tracked.peak == 400 + 2 * 4000


def test_an_8b_step_takes_what_an_h200_showed() -> None:
    """Measured there with TRL's trainer and with padded rows, checkpointing on: 20.6 GiB."""
    recomputed = estimate(ModelShape.of(BILLIONS), step(checkpointing=True, reference="adapter_disabled"))
    assert recomputed.peak / 2**30 == pytest.approx(20.6, rel=0.03)


def test_zero_shares_what_it_says() -> None:
    """Bytes a weight (arXiv 1910.02054, section 3.1): 2, 2 of gradient, 12 of states; an eighth of what is shared."""
    shape, count = ModelShape.of(BILLIONS), 8.19e9
    layer, embedding = 2 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12288), 2 * 151936 * 4096
    shared = {1: (16, 2 * count, 2 * count), 2: (12, 2 * count, 2 * count / 8)}
    shared[3] = (12, 2 * count / 8 + 2 * layer + embedding, 2 * count / 8)
    for stage, (states, weights, gradients) in shared.items():
        trained = Trained("full", 2, held=2, gradient_share=1 / 8 if stage > 1 else 1.0)
        found = estimate(shape, step(trained=trained, checkpointing=True, zero_stage=stage, processes=8))
        # Where the peak is the optimizer's, the square roots of the variances are there as well: 4 bytes more.
        assert (found.where == "optimizer step") == (states == 16)
        assert found.parts["optimizer"] == pytest.approx(states * count / 8, rel=0.01)
        assert found.parts["weights"] == pytest.approx(weights, rel=0.01)
        if states == 16:
            assert found.parts["gradients"] == pytest.approx(gradients, rel=0.01)


# --- forms of a pass --------------------------------------------------------------------------------------------------


def test_fused_kernels_keep_inputs_alone() -> None:
    """A norm keeps its input in bf16 in place of float32; a gate its two inputs, and not the activation as well."""
    shape, trained = ModelShape.of(BILLIONS), Trained("lora", 2, targets=("q_proj",))
    apart, fused = (
        estimate(shape, step(trained=trained, casts_adapter_inputs=False, is_fused=on)).saved for on in (False, True)
    )
    norms, head_norms, activation = 2 * 2 * 4096, 2 * (32 + 8) * 128, 2 * 12288
    # The last norm more; but no gradient flows to the embedding, nor to the keys of the first layer.
    others = 2 * 4096 - (2 * 4096 + 2 * 8 * 128)
    assert apart - fused == 16 * 512 * (36 * (norms + head_norms + activation) + others)


def test_a_packed_row_holds_its_prompt_once() -> None:
    """Attention keeps keys and values of the prefix once more for every branch; all else goes by the tokens."""
    shape = ModelShape.of(BILLIONS)
    alone = Tokens.packed(((0, (512,)),) * 16)
    together = Tokens.packed(((384, (128, 128)),) * 8)
    assert (alone.count, together.count, together.scored) == (16 * 512, 8 * 640, 8 * 256)
    assert together.parts() == [(384, 384)] * 8 + [(128, 512)] * 16
    saved = {each: estimate(shape, step(tokens=each)).saved for each in (alone, together)}
    keys = {alone: 16 * 512, together: 8 * (384 + 2 * 512)}
    cache = {each: 36 * keys[each] * 2 * 8 * 128 * 2 for each in keys}
    by_token = {each: (saved[each] - cache[each]) / each.count for each in keys}
    assert by_token[alone] == pytest.approx(by_token[together], rel=0.001)
