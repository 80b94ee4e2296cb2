"""The invariants of the method card for every rule, through the real preference trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import IA3Config
from torch import Tensor

from alignkit.gradients._family import norm
from alignkit.parts.method import load_method
from alignkit.parts.rule import load_rule
from alignkit.shapes._candidates import METRICS as BRIDGE_METRICS
from alignkit.shapes._candidates import BridgeSettings
from tests.gradients.conftest import DISPLACING, EDITING, RULES, chosen, lora, weights
from tests.gradients.steps import expected_gradients, gradients, micro_batches, step_gradients, trainable
from tests.trainers import flat_weights, logged

RHO = 0.3
OPTIONS: dict[str, dict[str, Any]] = {name: {"rho": RHO} for name in DISPLACING}
NOTHING: dict[str, dict[str, Any]] = {name: {"rho": 0.0} for name in DISPLACING} | {
    "sagm": {"rho": 0.0, "sagm_alpha": 0.0},
    "l2_sp": {"l2_sp_coef": 0.0},
    "decay_to_init": {"decay_coef": 0.0},
}
KINDS = ["full", "lora"]
NEVER = 10**6
STATELESS = [name for name in EDITING if not load_rule(name).needs_start]
"""Rules that a single micro-batch is enough to judge; tests/gradients/test_pulls.py judges the others."""


def adapter(kind: str, **changes: Any) -> Any:
    return lora(**changes) if kind == "lora" else None


def assert_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-6)


# --- a rule of strength 0 is no rule -----------------------------------------------------------------------------


def trained(make_trainer: Any, rule: Any, kind: str) -> Any:
    trainer = make_trainer(
        "flex_dpo",
        load_method("flex_dpo").options(eta=0.2),
        gradient_rule=rule,
        arguments={
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "disable_dropout": False,
            "weight_decay": 0.1,
            "warmup_steps": 1,
        },
        peft_config=adapter(kind, lora_dropout=0.3),
    )
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def without_rule() -> dict[str, Any]:
    """Finished runs without a rule, by parametrisation."""
    return {}


def compare_with_no_rule(make_trainer: Any, without_rule: dict[str, Any], rule: Any, kind: str) -> None:
    if kind not in without_rule:
        plain = trained(make_trainer, None, kind)
        without_rule[kind] = flat_weights(plain.model), plain.state.log_history, torch.get_rng_state()
    expected, history, state = without_rule[kind]
    ours = trained(make_trainer, rule, kind)
    assert torch.equal(flat_weights(ours.model), expected)
    assert torch.equal(torch.get_rng_state(), state), "the random state is that after one pass"
    for entry, theirs in zip(ours.state.log_history[:-1], history[:-1], strict=True):
        assert {key: entry[key] for key in theirs} == theirs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NOTHING)
def test_strength_zero_is_bitwise_no_rule(
    make_trainer: Any, without_rule: dict[str, Any], name: str, kind: str
) -> None:
    compare_with_no_rule(make_trainer, without_rule, chosen(name, **NOTHING[name]), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_mix_zero_is_bitwise_no_rule(make_trainer: Any, without_rule: dict[str, Any], kind: str) -> None:
    compare_with_no_rule(make_trainer, without_rule, chosen("gnp", rho=RHO, mix=0.0), kind)


def test_perpgrad_changes_a_run(make_trainer: Any, without_rule: dict[str, Any]) -> None:
    """It has no strength; the runs above would be equal too if no rule were ever applied."""
    with pytest.raises(AssertionError):
        compare_with_no_rule(make_trainer, without_rule, chosen("perpgrad"), "lora")


# --- one micro-batch -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", STATELESS)
def test_gradient_equals_the_one_computed_by_writing_weights(
    make_trainer: Any, watched: Any, name: str, kind: str
) -> None:
    rule, seen = watched(name, **OPTIONS.get(name, {}))
    trainer = make_trainer("flex_dpo", gradient_rule=rule, peft_config=adapter(kind, init_lora_weights=False))
    batches, counts = micro_batches(trainer)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    ours = step_gradients(trainer, batches, counts)
    assert all(torch.equal(p, old) for p, old in zip(trainer.model.parameters(), before, strict=True))
    assert all(p.grad is None for p in trainer.model.parameters() if not p.requires_grad)
    assert_close(ours, expected_gradients(trainer, rule, batches[0], counts, seen.evaluations[0][0].seed))
    if name in DISPLACING:
        first, second = seen.evaluations[0]
        if name not in ("asam", "sagm"):
            assert second.displacement_norm.item() == pytest.approx(RHO, rel=1e-5)
        if name != "random_perturbation":
            assert second.loss > first.loss + 1e-3


@pytest.mark.parametrize("name", ["glad", "perpgrad"])
def test_parameters_in_containers_that_are_never_called_are_displaced_and_edited(
    make_trainer: Any, watched: Any, name: str
) -> None:
    """PEFT keeps those of IA3 in a ``ParameterDict``."""
    rule, seen = watched(name, **OPTIONS.get(name, {}))
    peft = IA3Config(task_type="CAUSAL_LM", target_modules=["v_proj"], feedforward_modules=[])
    trainer = make_trainer("flex_dpo", gradient_rule=rule, peft_config=peft)
    batches, counts = micro_batches(trainer)
    ours = step_gradients(trainer, batches, counts)
    assert len(ours) == 2 and all(x.norm() > 0 for x in ours)
    assert_close(ours, expected_gradients(trainer, rule, batches[0], counts, seen.evaluations[0][0].seed))


@pytest.mark.parametrize("name", STATELESS)
def test_accumulation_adds_the_edited_gradients_of_its_micro_batches(
    make_trainer: Any, watched: Any, name: str
) -> None:
    rule, seen = watched(name, **OPTIONS.get(name, {}))
    trainer = make_trainer(
        "flex_dpo",
        load_method("flex_dpo").options(eta=0.2),
        gradient_rule=rule,
        arguments={"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        peft_config=lora(),
    )
    batches, counts = micro_batches(trainer, 4)
    ours = step_gradients(trainer, batches, counts)
    seeds = [evaluations[0].seed for evaluations in seen.evaluations]
    assert len(set(seeds)) == 4
    parts = [expected_gradients(trainer, rule, batch, counts, s) for batch, s in zip(batches, seeds, strict=True)]
    assert_close(ours, [sum(column[1:], column[0]) for column in zip(*parts, strict=True)])


def test_sagm_aligns_with_the_mean_loss_of_a_short_micro_batch_too(
    make_trainer: Any, rows: Dataset, watched: Any
) -> None:
    """Three rows in batches of two: alpha multiplies the gradient of the mean over the rows of each batch, 2 or 1."""
    rule, seen = watched("sagm", rho=0.05, sagm_alpha=0.02)
    trainer = make_trainer(
        gradient_rule=rule,
        train_dataset=rows.select(range(3)),
        arguments={"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    )
    batches, counts = micro_batches(trainer, 2)
    assert [len(batch["scores"]) for batch in batches] == [2, 1]
    step_gradients(trainer, batches, counts)
    for batch, displacement, (first, _) in zip(batches, seen.displacements, seen.evaluations, strict=True):
        trainer.model.zero_grad()
        # Without counts a batch is divided by its own.
        trainer.batch_loss(trainer.model, batch, None, record=False).backward()
        mean = gradients(trainer)
        length = torch.cat([x.flatten() for x in first.gradient]).norm()
        for ours, g, g_mean in zip(displacement, first.gradient, mean, strict=True):
            torch.testing.assert_close(ours, 0.05 * g / length - 0.02 * g_mean, rtol=2e-5, atol=2e-7)


def test_lora_at_the_start_is_displaced_in_b_alone(make_trainer: Any, watched: Any) -> None:
    rule, seen = watched("sam", rho=RHO)
    trainer = make_trainer(gradient_rule=rule, peft_config=lora())
    step_gradients(trainer, *micro_batches(trainer))
    first, second = seen.evaluations[0]
    names = [n for n, p in trainer.model.named_parameters() if p.requires_grad]
    for name, g, g_s, moved in zip(names, first.gradient, second.gradient, seen.displacements[0], strict=True):
        if "lora_A" in name:
            assert not g.any() and not moved.any() and g_s.any()
        else:
            assert g.any() and moved.any()


def test_both_passes_draw_the_same_dropout(make_trainer: Any, watched: Any) -> None:
    difference = {}
    for rho in (1e-4, 0.0):
        rule, seen = watched("sam", rho=rho)
        trainer = make_trainer(
            gradient_rule=rule, arguments={"disable_dropout": False}, peft_config=lora(lora_dropout=0.5)
        )
        batches, counts = micro_batches(trainer)
        state = torch.get_rng_state()
        step_gradients(trainer, batches, counts)
        after = torch.get_rng_state()
        first, second = seen.evaluations[0]
        difference[rho] = norm([y - x for x, y in zip(first.gradient, second.gradient, strict=True)]) / norm(
            first.gradient
        )
        torch.set_rng_state(state)
        trainer.batch_loss(trainer.model, dict(batches[0]), counts, record=False)
        assert torch.equal(torch.get_rng_state(), after), "as after one pass"
        one, two = (expected_gradients(trainer, chosen("perpgrad"), batches[0], counts) for _ in range(2))
        assert norm([y - x for x, y in zip(one, two, strict=True)]) > 0.1 * norm(one), "another mask, another gradient"
    assert difference[0.0] == 0 and 0 < difference[1e-4] < 1e-2


def test_the_reference_is_scored_once_a_micro_batch(make_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(gradient_rule=chosen("sam", rho=RHO), peft_config=lora())
    batches, counts = micro_batches(trainer, 2)
    scored, original = [], trainer.reference.token_logps
    monkeypatch.setattr(trainer.reference, "token_logps", lambda inputs: scored.append(inputs) or original(inputs))
    step_gradients(trainer, batches, counts)
    assert len(scored) == 2
    assert all("ref_token_logps" not in batch for batch in batches)


def test_only_targets_are_displaced_and_edited(make_trainer: Any, watched: Any) -> None:
    """A module saved beside the adapter keeps its plain gradient."""
    rule, seen = watched("glad", rho=RHO, rule_targets="lora")
    trainer = make_trainer(gradient_rule=rule, peft_config=lora(modules_to_save=["q_norm"]))
    batches, counts = micro_batches(trainer)
    step_gradients(trainer, batches, counts)
    ours = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert len(seen.edited[0]) == sum("lora_" in n for n in ours) < len(ours)
    trainer.gradient_rule = None
    step_gradients(trainer, batches, counts)
    for name, p in trainer.model.named_parameters():
        if p.requires_grad and "lora_" not in name:
            torch.testing.assert_close(ours[name], p.grad, rtol=1e-6, atol=1e-8)


# --- what is logged ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
def test_exactly_the_documented_metrics_are_logged_and_the_loss_is_that_of_the_weights(
    make_trainer: Any, name: str
) -> None:
    logs = []
    for rule in (None, chosen(name, **OPTIONS.get(name, {}))):
        trainer = make_trainer(
            gradient_rule=rule,
            arguments={"max_steps": 1, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
            peft_config=lora(),
        )
        trainer.train()
        logs.append(trainer.state.log_history[0])
    plain, ruled = logs
    assert set(ruled) - set(plain) == set(load_rule(name).metrics)
    for key in {"loss", "loss/preference", *BRIDGE_METRICS, *load_method("dpo").metrics}:
        assert ruled[key] == plain[key], key


def test_metrics_say_what_was_done(make_trainer: Any, watched: Any) -> None:
    rule, seen = watched("sam", rho=RHO)
    trainer = make_trainer(
        gradient_rule=rule,
        arguments={"max_steps": 1, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        peft_config=lora(),
    )
    trainer.train()
    entry = trainer.state.log_history[0]
    flat = [[torch.cat([x.flatten() for x in e.gradient]) for e in pair] for pair in seen.evaluations]
    cosines = [torch.nn.functional.cosine_similarity(g, g_s, dim=0).item() for g, g_s in flat]
    assert entry["gradient/cosine"] == pytest.approx(sum(cosines) / 2, abs=1e-6)
    conflicts = [(x * y).sum() < 0 for a, b in seen.evaluations for x, y in zip(a.gradient, b.gradient, strict=True)]
    assert entry["gradient/conflict_rate"] == pytest.approx(sum(map(float, conflicts)) / len(conflicts))
    assert entry["gradient/displacement_norm"] == pytest.approx(RHO, rel=1e-5)
    assert entry["gradient/weight_norm"] == pytest.approx(norm(list(seen.evaluations[0][0].weights)).item(), rel=1e-6)
    gaps = [(b.loss - a.loss).item() for a, b in seen.evaluations]
    assert entry["gradient/sharpness_gap"] == pytest.approx(sum(gaps), rel=1e-4), "halves of a step's mean loss add up"
    assert sum(a.loss.item() for a, _ in seen.evaluations) == pytest.approx(entry["loss"], abs=1e-6)


# --- when --------------------------------------------------------------------------------------------------------


def steps_with_rule(trainer: Any) -> list[int]:
    return [entry["step"] for entry in trainer.state.log_history if "gradient/cosine" in entry]


@pytest.mark.parametrize(
    ("options", "warmup_steps", "expected"),
    [
        ({}, 0, [1, 2, 3, 4, 5, 6]),
        ({}, 2, [3, 4, 5, 6]),
        ({"rule_in_warmup": True}, 2, [1, 2, 3, 4, 5, 6]),
        ({"every_k": 2}, 0, [1, 3, 5]),
        ({"every_k": 4}, 2, [5]),
        ({"every_k": NEVER, "rule_in_warmup": True}, 2, [1]),
    ],
)
def test_steps_in_which_the_rule_is_applied(make_trainer: Any, options: Any, warmup_steps: int, expected: Any) -> None:
    arguments = {"max_steps": 6, "warmup_steps": warmup_steps}
    trainer = make_trainer(gradient_rule=chosen("glad", rho=RHO, **options), arguments=arguments, peft_config=lora())
    trainer.train()
    assert steps_with_rule(trainer) == expected


def test_evaluation_knows_no_rule(make_trainer: Any, rows: Dataset) -> None:
    results = []
    for rule in (None, chosen("sam", rho=1.0)):
        trainer = make_trainer(gradient_rule=rule, peft_config=lora(), eval_dataset=rows)
        results.append({k: v for k, v in trainer.evaluate().items() if not k.endswith(("time", "second"))})
    assert results[0] == results[1]


# --- memory and precision ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["glad", "perpgrad"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_number(make_trainer: Any, name: str, reentrant: bool) -> None:
    results = []
    for enabled in (False, True):
        trainer = make_trainer(
            gradient_rule=chosen(name, **OPTIONS.get(name, {})),
            settings=BridgeSettings(layout="packed"),
            arguments={
                "gradient_checkpointing": enabled,
                "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
                "max_steps": 3,
            },
            peft_config=lora(),
        )
        trainer.train()
        results.append(weights(trainer))
    torch.testing.assert_close(results[0], results[1], atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_autocast_follows_float32(make_trainer: Any, kind: str) -> None:
    entries = {}
    for bf16 in (False, True):
        trainer = make_trainer(
            "flex_dpo",
            load_method("flex_dpo").options(eta=0.5),
            gradient_rule=chosen("sam", rho=0.1),
            arguments={"bf16": bf16, "max_steps": 2},
            peft_config=adapter(kind),
        )
        trainer.train()
        entries[bf16] = trainer.state.log_history[0]
        assert all(p.dtype == torch.float32 for p in trainable(trainer))
    for key in ("grad_norm", "gradient/cosine", "gradient/sharpness_gap"):
        assert entries[True][key] == pytest.approx(entries[False][key], rel=0.05)
    assert entries[True]["gradient/displacement_norm"] == pytest.approx(0.1, rel=0.02)


def test_a_displacement_that_rounding_swallows_is_seen(make_trainer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights stored in bfloat16 stand on its grid; autocast rounds small displacements back to it."""
    found = {}
    for on_grid in (False, True):
        trainer = make_trainer(
            gradient_rule=chosen("sam", rho=3e-3), arguments={"bf16": True, "max_steps": 1, "learning_rate": 0.0}
        )
        with torch.no_grad():
            for p in trainable(trainer):
                p.copy_(p.bfloat16() if on_grid else p + 1e-3 * torch.rand_like(p))
        trainer.train()
        found[on_grid] = trainer.state.log_history[0]
        printed = capsys.readouterr().out
        assert (printed.count("rounding leaves") == 1) == on_grid
    assert found[False]["gradient/displacement_norm"] == pytest.approx(3e-3, rel=0.1)
    assert found[True]["gradient/displacement_norm"] < 1.5e-3
    assert found[True]["gradient/sharpness_gap"] < 0.7 * found[False]["gradient/sharpness_gap"]


def test_a_rule_that_never_acts_is_announced(make_trainer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Once each time training begins, and nothing of the rule is logged."""
    arguments = {"max_steps": 2, "warmup_steps": 2}
    trainer = make_trainer("dpo", gradient_rule=chosen("glad", rho=RHO), arguments=arguments)
    for _ in range(2):
        trainer.train()
        assert capsys.readouterr().out.count("gradient_rule: glad never acts in this run") == 1
    assert logged(trainer, "loss") and not logged(trainer, "gradient/cosine")


def test_a_tensor_the_loss_does_not_reach_gets_no_gradient(make_trainer: Any) -> None:
    trainer = make_trainer(gradient_rule=chosen("glad", rho=RHO), peft_config=lora())
    trainer.model.register_parameter("unused", torch.nn.Parameter(torch.ones(3)))
    step_gradients(trainer, *micro_batches(trainer))
    assert trainer.model.unused.grad is None
    assert all(g.any() for g in gradients(trainer)[1:])


def test_losses_fall_with_every_rule(make_trainer: Any, rows: Dataset) -> None:
    for name in RULES:
        trainer = make_trainer(
            gradient_rule=chosen(name, **OPTIONS.get(name, {})),
            arguments={"max_steps": 25, "learning_rate": 1e-2, "per_device_train_batch_size": 8},
            train_dataset=rows.select(range(8)),
            peft_config=lora(),
        )
        trainer.train()
        assert logged(trainer, "loss")[-1] < 0.75 * logged(trainer, "loss")[0], name
