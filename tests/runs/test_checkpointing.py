"""``gradient_checkpointing: auto``: the decision, what it is told, and that looking changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset

from alignkit.memory.decoder import Trained
from alignkit.memory.shape import ModelShape
from alignkit.models.choices import PINNED, Choice
from alignkit.runs import checkpointing
from alignkit.runs.checkpointing import KEY, Decision, decide, longest_rows, peak_of_longest_rows
from alignkit.runs.memory import GIB, Launch, Plan, knobs
from alignkit.runs.run import train
from tests.scripts.tiny import save_model
from tests.shapes.building import config_of
from tests.trainers import logged, random_rows

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


@pytest.mark.parametrize(
    ("kept", "free", "on_cpu", "expected"),
    [
        (48, 139, False, (False, False)),
        (120, 139, False, (False, True)),
        (150, 139, False, (False, True)),
        (180, 139, False, (True, False)),
        (48, None, False, (True, False)),
        (48, None, True, (False, False)),
        (10, 11, True, (False, False)),
        (12, 11, True, (True, False)),
    ],
)
def test_the_decision(kept: int, free: int | None, on_cpu: bool, expected: tuple[bool, bool]) -> None:
    found = decide(kept * GIB, free and free * GIB, on_cpu=on_cpu)
    assert (found.value, found.is_near) == expected


def preference(folder: Path, model: str, **keys: Any) -> Any:
    return config_of("preference", model, folder, gradient_checkpointing="auto", bf16=False, **keys)


def test_the_longest_rows_decide_and_not_the_others(tmp_path: Path, model_path: str) -> None:
    config = preference(tmp_path, model_path, per_device_train_batch_size=2)
    shapes = [(10, (5, 5))] * 50 + [(100, (60, 20)), (90, (70, 70)), (20, (30, 30))]
    plan = Plan.of(config, Launch("cpu"), Dataset.from_list(random_rows(shapes)))
    padded = plan.tokens(plan.train, 2)
    assert (padded.rows, padded.length, padded.has_mask) == (4, 160, True)
    packed = replace(plan, packed=True).tokens(plan.train, 2)
    assert (packed.rows, packed.length) == (1, (99 + 80) + (89 + 140))
    assert packed.prompts == ((89, (70, 70)), (99, (60, 20)))
    filled = replace(plan, packed=True, config=replace(config, tokens_per_batch=300)).tokens(plan.train, 2)
    assert filled.count == 229, "two would be more"


def test_rows_that_are_not_here_are_as_long_as_they_may_be(tmp_path: Path, model_path: str) -> None:
    config = preference(tmp_path, model_path, per_device_train_batch_size=3)
    tokens = Plan.of(config, Launch("cpu")).tokens(None, 3)
    assert (tokens.rows, tokens.length) == (6, config.max_length)
    online = config_of("online", model_path, tmp_path, max_prompt_length=20)
    drawn = Plan.of(online, Launch("cpu"), packed=True).tokens(None, 8)
    assert drawn.prompts == ((19, (8, 8, 8, 8)),) * 2, "two prompts with four completions each"


def test_a_plan_says_what_trains(tmp_path: Path, model_path: str) -> None:
    lora = Plan.of(preference(tmp_path, model_path, parametrization="lora", lora_r=4), Launch())
    assert lora.trained() == Trained("lora", 4, 4, 1.0, 4)
    assert lora.reference() == "adapter_disabled"
    some = preference(tmp_path, model_path, parametrization="lora", lora_target_modules=r".*self_attn\.[qv]_proj")
    assert Plan.of(some, Launch()).trained().targets == ("q_proj", "v_proj")
    full = preference(tmp_path, model_path, parametrization="full")
    assert Plan.of(full, Launch("cuda", 4, 2)).trained().gradient_share == 0.25
    assert Plan.of(full, Launch()).reference() == "copy"


def test_knobs_fit_and_the_cheapest_comes_first(tmp_path: Path, model_path: str) -> None:
    keys = {"parametrization": "lora", "max_length": 1024, "per_device_train_batch_size": 8}
    shape = replace(ModelShape.of(BILLIONS), layers=6)
    plan = replace(Plan.of(preference(tmp_path, model_path, **keys), Launch()), shape=shape)
    kept, recomputed = (plan.estimate(checkpointing=on).peak for on in (False, True))
    limit = (kept + recomputed) // 2
    found = knobs(plan, limit, checkpointing=False)
    assert found[0].keys == {"gradient_checkpointing": True}
    assert all(knob.peak <= limit for knob in found)
    weights = plan.estimate(checkpointing=True).parts["weights"]
    small = knobs(plan, weights, checkpointing=True)
    assert [dict(knob.keys) for knob in small] == [{"quantization": "nf4", "per_device_train_batch_size": 1}]
    assert knobs(plan, weights // 10, checkpointing=True) == []


# --- a real micro-batch -----------------------------------------------------------------------------------------------


def state_of(trainer: Any) -> tuple[Any, ...]:
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    return weights, torch.get_rng_state(), trainer.model.training, trainer.state.global_step


def same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    weights = all(torch.equal(value, other[0][name]) for name, value in one[0].items())
    return weights and torch.equal(one[1], other[1]) and one[2:] == other[2:]


def test_measuring_changes_nothing(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(arguments={"disable_dropout": False})
    before = state_of(trainer)
    seen = []
    trainer.model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    assert peak_of_longest_rows(trainer) is not None
    assert seen, "a pass was made"
    assert same(before, state_of(trainer))
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert not trainer._sums["train"].means(trainer.accelerator), "nothing is recorded"


def test_what_was_measured_is_not_measured_again(
    make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ALIGNKIT_CACHE", str(tmp_path))
    counted = []
    monkeypatch.setattr(checkpointing, "peak_of_longest_rows", lambda trainer: counted.append(1) or 3 * GIB)
    near = Decision(False, "", is_near=True)
    first = checkpointing._measured(make_trainer(), near, optimizer=GIB, free=5 * GIB)
    again = checkpointing._measured(make_trainer(), near, optimizer=GIB, free=5 * GIB)
    assert first == again and not first.value and len(counted) == 1
    assert checkpointing._measured(make_trainer(), near, optimizer=3 * GIB, free=5 * GIB).value, "of less there is"
    checkpointing._measured(make_trainer(arguments={"per_device_train_batch_size": 1}), near, 0, 5 * GIB)
    assert len(counted) == 2, "other rows"


def test_rows_that_do_not_fit_are_told_and_leave_nothing_behind(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer()
    before = state_of(trainer)

    def exhausted(*unused: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    handle = trainer.model.model.layers[0].mlp.register_full_backward_pre_hook(exhausted)
    assert peak_of_longest_rows(trainer) is None
    handle.remove()
    assert same(before, state_of(trainer))
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_the_measured_rows_are_the_longest(make_trainer: Callable[..., Any]) -> None:
    rows = Dataset.from_list(random_rows([(5, (4, 4)), (30, (9, 2)), (6, (3, 3)), (20, (9, 9)), (5, (6, 6))]))
    trainer = make_trainer(arguments={"per_device_train_batch_size": 2}, train_dataset=rows)
    lengths = [len(row["prompt_ids"]) for row in longest_rows(trainer)]
    assert sorted(lengths) == [20, 30]


@pytest.mark.parametrize(
    ("peak", "value", "told"),
    [(50, False, "the longest rows took 50.0 of 100.0 GiB"), (None, True, "did not fit"), (101, True, "did not fit")],
)
def test_a_near_estimate_is_measured(
    make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, peak: int | None, value: bool, told: str
) -> None:
    """Switched on late, the trainer makes the numbers it makes with the switch in its arguments."""
    trainer = make_trainer()
    near = SimpleNamespace(peak=90 * GIB, parts={}, is_exact=True, where="backward pass")
    plan: Any = SimpleNamespace(estimate=lambda **how: near, after=lambda choices: plan)
    monkeypatch.setattr(checkpointing, "free_memory", lambda device: 100 * GIB)
    monkeypatch.setattr(checkpointing, "peak_of_longest_rows", lambda trainer: peak and peak * GIB)
    choices = {KEY: Choice(KEY, False, "estimated")}
    checkpointing.confirm(trainer, plan, choices)
    assert choices[KEY].value is trainer.args.gradient_checkpointing is value
    assert told in choices[KEY].reason


def test_what_cannot_be_measured_and_is_near_is_switched_on(
    make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer()
    trainer.train_dataset = Dataset.from_list([{"prompt": "completions are yet to be drawn"}])
    near = SimpleNamespace(peak=90 * GIB, parts={}, is_exact=True, where="backward pass")
    plan: Any = SimpleNamespace(estimate=lambda **how: near, after=lambda choices: plan)
    monkeypatch.setattr(checkpointing, "free_memory", lambda device: 100 * GIB)
    choices = {KEY: Choice(KEY, False, "estimated")}
    checkpointing.confirm(trainer, plan, choices)
    assert choices[KEY].value is trainer.args.activation_checkpointing is True
    assert choices[KEY].reason.endswith("it cannot be measured before training")


def test_switched_on_late_is_switched_on(make_trainer: Callable[..., Any], adapter: Any) -> None:
    def losses(switch: Callable[[Any], None], **arguments: Any) -> tuple[int, list[float]]:
        trainer = make_trainer(arguments={"max_steps": 1, **arguments}, peft_config=adapter)
        switch(trainer)
        passes: list[bool] = []
        (layer,) = [module for name, module in trainer.model.named_modules() if name.endswith("layers.0.mlp")]
        layer.register_forward_pre_hook(lambda *unused: passes.append(torch.is_grad_enabled()))
        trainer.train()
        return passes.count(True), logged(trainer, "loss")

    early = losses(lambda trainer: None, gradient_checkpointing=True)
    assert early[0] == 2, "a step computes a layer twice"
    assert losses(checkpointing.switch_on) == early


@pytest.fixture
def adapter() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


# --- a run ------------------------------------------------------------------------------------------------------------


def test_a_run_says_what_it_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpointing, "free_memory", lambda device: 10**5)
    save_model(tmp_path / "model")
    rows = [{"prompt": f"w{i} w3", "chosen": " w4 w5", "rejected": " w6"} for i in range(2, 10)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = preference(tmp_path, str(tmp_path / "model"), data=str(data), max_steps=1, num_samples=0)
    trainer = train(config)
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())["choices"][KEY]
    assert recorded["value"] is trainer.args.gradient_checkpointing is True
    assert recorded["reason"] == "a step over the longest rows takes 0.0 of 0.0 GiB without it"


def test_what_is_written_or_was_taken_before_is_taken(tmp_path: Path, model_path: str) -> None:
    args: Any = SimpleNamespace(device=torch.device("cpu"))
    for given in (True, False):
        choices: dict[str, Choice] = {}
        config = replace(preference(tmp_path, model_path), gradient_checkpointing=given)
        assert checkpointing.chosen(config, args, None, choices) is None
        assert choices[KEY] == Choice(KEY, given, PINNED)
        assert args.gradient_checkpointing is args.activation_checkpointing is given
    resumed = {KEY: Choice(KEY, True, "it did not fit")}
    assert checkpointing.chosen(preference(tmp_path, model_path), args, None, resumed) is None
    assert args.gradient_checkpointing is True


def test_decision_reads_as_a_clause() -> None:
    assert decide(48 * GIB, 139 * GIB, on_cpu=False) == Decision(
        False, "a step over the longest rows takes 48.0 of 139.0 GiB without it"
    )
