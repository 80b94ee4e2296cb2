"""Completions that share their prompt in the passes of online RL: equal to TRL's pass, and where they are taken."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl.trainer.utils import add_fused_lm_head

from alignkit.errors import ConfigError, DataError, ModelError
from alignkit.losses.types import LossOutput, PolicyBatch
from alignkit.models._forward import support_packed_rows, use_packed_attention
from alignkit.models._layouts import ASKED_FOR, LayoutChoice
from alignkit.shapes import _policy_forward
from alignkit.shapes._policy_forward import PolicyForward, choose_policy_layout, rows_by_prompt
from tests.online import make, make_peer
from tests.supervised import model
from tests.trainers import flat_weights, logged

T, TEMPERATURE = 6, 0.7
HEAD = ("log_probs", "entropy", "log_sum_sq_probs")
SHARED, PADDED = LayoutChoice("packed", ASKED_FOR), LayoutChoice("padded", ASKED_FOR)
PROMPTS = ([5, 6, 7, 8], [9], [5, 6, 7, 8], [10, 11], [5, 6, 7, 8], [9], [5, 6, 7, 8])
LENGTHS = (6, 2, 3, 5, 0, 4, 1)
"""Of the completions. Those of the first prompt are not adjacent, and one of them is masked."""


def call(lengths: tuple[int, ...] = LENGTHS) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask as TRL hands them on; padding holds tokens that would show if anything read them."""
    draw = torch.Generator().manual_seed(0)
    width = max(map(len, PROMPTS))
    ids, mask = torch.full((len(PROMPTS), width + T), 3), torch.zeros(len(PROMPTS), width + T, dtype=torch.long)
    for i, (prompt, length) in enumerate(zip(PROMPTS, lengths, strict=True)):
        ids[i, width - len(prompt) : width] = torch.tensor(prompt)
        ids[i, width:] = torch.randint(5, 60, (T,), generator=draw)
        mask[i, width - len(prompt) : width + length] = 1
    return ids, mask


def mixture(**changes: Any) -> Qwen3MoeForCausalLM:
    """A tiny mixture of experts over the tokenizer of these tests."""
    dense = model().config.to_dict()
    kept = {key: dense[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "head_dim", "pad_token_id")}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_key_value_heads": 2}
    heads = {"num_attention_heads": 4, "intermediate_size": 64, "eos_token_id": dense["eos_token_id"]}
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**kept, **experts, **heads, initializer_range=0.3, **changes))


def forward(scored: Any, layout: LayoutChoice, most: int = 8) -> PolicyForward:
    """The passes of a model under a head that computes all there is."""
    add_fused_lm_head(scored, temperature=TEMPERATURE, outputs=HEAD)
    support_packed_rows(scored)
    if layout.layout == "packed":
        use_packed_attention(scored)
    return PolicyForward(layout, most)


def alone(scored: Any, ids: torch.Tensor, mask: torch.Tensor) -> list[list[torch.Tensor]]:
    """By the definitions, from the logits of every completion in a row of its own without padding."""
    rows = []
    for row, is_token in zip(ids, mask.bool(), strict=True):
        count = int(is_token[-T:].sum())
        logits = (
            scored(row[is_token][None]).logits[0, -count - 1 : -1] if count else scored(row[:1, None]).logits[0, :0]
        )
        logps = (logits / TEMPERATURE).log_softmax(-1)
        values = (
            logps.gather(-1, row[-T : -T + count or None, None])[:, 0] if count else logps.sum(-1),
            -(logps.exp() * logps).sum(-1),
            (2 * logps).logsumexp(-1),
        )
        rows.append([torch.nn.functional.pad(x, (0, T - count)) for x in values])
    return [torch.stack(x) for x in zip(*rows, strict=True)]


@pytest.mark.parametrize("family", [model, mixture], ids=["dense", "mixture"])
@pytest.mark.parametrize(
    ("layout", "most", "size"),
    [(PADDED, 8, None), (SHARED, 8, None), (SHARED, 2, None), (SHARED, 8, 3)],
    ids=["padded", "shared", "two a row", "three a pass"],
)
def test_values_and_gradients_are_those_of_each_completion_alone(
    family: Any, layout: LayoutChoice, most: int, size: int | None
) -> None:
    ids, mask = call()
    oracle, ours = family(), family()
    weights = torch.randn(2, len(ids), T, generator=torch.Generator().manual_seed(1))
    expected = alone(oracle, ids, mask)
    found = forward(ours, layout, most)(ours, ids, mask, T, batch_size=size)
    values = (found.token_logps, found.entropies, found.log_sum_sq_probs)
    for value, wanted in zip(values, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5)
    # Log-probs and entropies carry a gradient, the sum of squares none.
    (weights[0] * expected[0] + weights[1] * expected[1]).sum().backward()
    (weights[0] * found.token_logps + weights[1] * found.entropies).sum().backward()
    assert not found.log_sum_sq_probs.requires_grad
    for (name, one), other in zip(oracle.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


def test_completions_of_a_prompt_share_a_row_wherever_they_stand() -> None:
    ids, mask = call()
    rows, places = rows_by_prompt(ids, mask, T, 8)
    assert [row["prompt_ids"] for row in rows] == [[5, 6, 7, 8], [9], [10, 11]]
    assert [[len(c) for c in row["completion_ids"]] for row in rows] == [[6, 3, 1], [2, 4], [5]]
    for number, row, branch in places:
        assert rows[row]["completion_ids"][branch] == ids[number, -T:][: LENGTHS[number]].tolist()
    assert [len(row["completion_ids"]) for row in rows_by_prompt(ids, mask, T, 2)[0]] == [2, 2, 1, 1]


def test_a_call_without_a_token_gives_zeros_that_still_reach_every_weight() -> None:
    ids, mask = call((0,) * len(PROMPTS))
    scored = model()
    found = forward(scored, SHARED)(scored, ids, mask, T)
    assert found.token_logps.shape == found.entropies.shape == (len(ids), T)
    assert not found.token_logps.any() and not found.entropies.any()
    found.token_logps.sum().backward()
    assert all(weight.grad is not None and not weight.grad.any() for weight in scored.parameters())


# Of plain gradient descent: weights differ as gradients do. Adam makes a whole step of a gradient that is rounding.
STEPS = {"optim": "sgd", "learning_rate": 1e-2, "max_steps": 4}
REUSED = {"num_iterations": 2, "beta": 0.1, "entropy_coef": 0.01, "temperature": 0.7}
RUNS: dict[str, tuple[bool, dict[str, Any], int]] = {
    "full": (False, REUSED, 4 + 2 + 2),
    "lora": (True, REUSED | {"gradient_checkpointing": True}, 4 + 2 + 2),
    "accumulation": (
        False,
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_iterations": 2},
        8 + 2 * 2,
    ),
    "cut completions masked": (
        False, {"mask_truncated_completions": True, "loss_type": "grpo", "max_completion_length": 48}, 3,
    ),
}  # fmt: skip
"""Whether an adapter is trained, how, and the packed passes: of every micro-batch, and of the old policy and the
reference for every draw. Where cut completions are masked, one of the four steps has no token at all."""


@pytest.mark.parametrize("name", RUNS)
def test_runs_follow_those_of_trl(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peft, changes, passes = RUNS[name]
    theirs = make_peer(tmp_path / "theirs", peft, **STEPS, **changes)
    theirs.train()
    ours = make(tmp_path / "ours", peft, layout="packed", **STEPS, **changes)
    packed, counted = _policy_forward.packed_pass, []
    monkeypatch.setattr(_policy_forward, "packed_pass", lambda *given: counted.append(1) or packed(*given))
    ours.train()
    assert len(counted) == passes
    assert list(ours._logs["completion"]) == list(theirs._logs["completion"])
    for key in ("loss", "grad_norm"):
        assert logged(ours, key) == pytest.approx(logged(theirs, key), rel=1e-5, abs=1e-6), key
    assert sum(norm > 0 for norm in logged(ours, "grad_norm")) >= 3
    torch.testing.assert_close(flat_weights(ours.model), flat_weights(theirs.model), rtol=0, atol=1e-6)


@pytest.mark.shared
def test_a_trained_mixture_of_experts_gives_the_same_in_both_layouts(shared: Path, tmp_path: Path) -> None:
    folder = shared / "models" / "gsm-tiny-moe"
    losses = []
    for layout in ("padded", "packed"):
        trained = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        given = {"model": trained, "processing_class": AutoTokenizer.from_pretrained(folder)}
        run = make(tmp_path / layout, layout=layout, num_iterations=2, router_aux_loss_coef=0.0, **STEPS, **given)
        run.train()
        losses.append((logged(run, "loss"), logged(run, "grad_norm"), flat_weights(run.model)))
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-5, abs=1e-6)
    assert losses[1][1] == pytest.approx(losses[0][1], rel=1e-5) and min(losses[0][1]) > 0
    torch.testing.assert_close(losses[1][2], losses[0][2], rtol=0, atol=1e-5)


# --- where rows are shared -------------------------------------------------------------------------------------------


def test_what_cannot_share_is_refused_or_padded() -> None:
    def choose(requested: Any, policy: Any = None, **changes: Any) -> LayoutChoice:
        known = {"others": {}, "longest": 40, "aux_loss": False, "keeps_attention": False} | changes
        return choose_policy_layout(requested, policy or model(), **known)

    window = model()
    window.config.attention_chunk_size = 32
    for changes, reason in (
        ({"policy": window}, "attention chunk size of 32 tokens is shorter than a row of 40"),
        ({"others": {"the reference": window}}, "the reference: the attention chunk size"),
        ({"aux_loss": True}, "load-balancing loss"),
        ({"keeps_attention": True}, "continuous batching"),
    ):
        assert reason in choose("auto", **changes).reason and choose("auto", **changes).layout == "padded"
        with pytest.raises(ModelError, match="layout: packed cannot be used: .*padded"):
            choose("packed", **changes)
    assert choose("padded") == PADDED
    assert choose("packed") == SHARED and choose("auto").layout == "packed"


def test_policy_and_reference_are_compared_before_they_run_packed_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int, bool]] = []

    def problem(run: Any, row: Any) -> str | None:
        with run.scoring():
            adapter = [m for m in run.model.modules() if type(m).__name__ == "Linear" and hasattr(m, "lora_A")]
            seen.append((run.name, len(row["completion_ids"]), any(not m.disable_adapters for m in adapter)))
        return "it does not fit" if run.name == "the reference" else None

    monkeypatch.setattr("alignkit.models._layouts.layout_problem", problem)
    for peft in (False, True):
        trainer = make(tmp_path / str(peft), peft, layout="auto", beta=0.1)
        assert trainer.layout.layout == "padded" and trainer.layout.reason == "it does not fit"
    assert seen == [
        ("the policy", 4, False), ("the policy", 1, False), ("the reference", 4, False),
        ("the policy", 4, True), ("the policy", 1, True), ("the reference", 4, False),
    ]  # fmt: skip
    with pytest.raises(ModelError, match=r"layout: packed cannot be used: it does not fit"):
        make(tmp_path / "asked", layout="packed", beta=0.1)


# --- what statistics of the old policy are made of -------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("iterations", [1, 2], ids=["on-policy", "reused"])
def test_a_method_gets_the_old_policys_entropies_and_squared_probabilities(
    layout: str, iterations: int, tmp_path: Path
) -> None:
    trainer = make(
        tmp_path, method="grpo_guard", step_axis="entropy", scale="fisher", layout=layout, num_iterations=iterations,
        max_steps=2, learning_rate=1e-2, temperature=0.7,
    )  # fmt: skip
    start, batches = model(), []
    method, objective = trainer.method, trainer.method.objective

    def keep(batch: PolicyBatch, options: Any) -> LossOutput:
        batches.append(batch)
        return objective(batch, options)

    inputs = []
    evaluate = trainer.evaluate_objective
    trainer.method = replace(method, objective=keep)
    trainer.evaluate_objective = lambda run, given: inputs.append(given) or evaluate(run, given)
    trainer.train()
    assert len(batches) == 2
    checked = batches if iterations == 2 else batches[:1]  # the second on-policy step has another old policy
    for batch, given in zip(checked, inputs, strict=False):
        assert (batch.old_token_logps is None) == (iterations == 1)
        for i, mask in enumerate(given["completion_mask"].bool()):
            prompt = given["prompt_ids"][i][given["prompt_mask"][i].bool()]
            logits = start(torch.cat([prompt, given["completion_ids"][i][mask]])[None]).logits[0]
            logps = (logits[len(prompt) - 1 : -1] / 0.7).log_softmax(-1)
            entropy, squares = -(logps.exp() * logps).sum(-1), logps.exp().square().sum(-1)
            torch.testing.assert_close(batch.old_entropies[i][mask], entropy, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(batch.old_sum_sq_probs[i][mask], squares, rtol=1e-4, atol=1e-5)
    assert not batches[0].old_entropies.requires_grad and not batches[0].old_sum_sq_probs.requires_grad


def test_the_whole_old_distribution_is_refused_with_what_to_write_instead(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"center: exact_kl.*Write center: k3"):
        make(tmp_path, method="grpo_guard", center="exact_kl")


def test_prompts_with_images_are_refused(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    with pytest.raises(DataError, match="Remove the column of images"):
        trainer._get_per_token_logps_and_entropies(
            trainer.model, *call(), T, pixel_values=torch.zeros(1), num_images=[1]
        )
