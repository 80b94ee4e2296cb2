"""References that follow the policy: closed forms of every schedule, full and LoRA, saved and resumed."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import TrainerCallback

from alignkit.errors import CheckpointError
from alignkit.parts.method import AnchorSchedule, Method, load_method
from tests.trainers import logged

LORA = LoraConfig(
    task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["post_attention_layernorm"]
)
PARAMETRIZATIONS = {"full": None, "lora": LORA}


def anchored(**schedule: Any) -> Method:
    """``dpo`` with a reference that moves."""
    drift = {"drift_metric": "rewards/margins"} if schedule["kind"] == "kl_triggered" else {}
    moving = AnchorSchedule(**schedule, **drift)
    return dataclasses.replace(load_method("dpo"), anchor=lambda options: moving)


class Recorder(TrainerCallback):
    """Policy and anchor after every step, by the policy's names."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.policy: list[dict[str, Tensor]] = []
        self.anchor: list[dict[str, Tensor]] = []
        self.record()

    def record(self) -> None:
        trained = {n: p for n, p in self.trainer.model.named_parameters() if p.requires_grad}
        self.policy.append({n: p.detach().clone() for n, p in trained.items()})
        self.anchor.append({n: a.detach().clone() for n, a in anchor_of(self.trainer, trained).items()})

    def on_step_end(self, *unused: Any, **also_unused: Any) -> None:
        self.record()


def anchor_of(trainer: Any, names: Any) -> dict[str, Tensor]:
    source = trainer.ref_model or trainer.model
    parameters = dict(source.named_parameters())
    return {name: parameters[name.replace(".default", ".ref")] for name in names}


def run(make_trainer: Any, method: Method, parametrization: str, **arguments: Any) -> tuple[Any, Recorder]:
    trainer = make_trainer(
        method, arguments={"learning_rate": 5e-3, **arguments}, peft_config=PARAMETRIZATIONS[parametrization]
    )
    recorder = Recorder(trainer)
    trainer.add_callback(recorder)
    trainer.train()
    return trainer, recorder


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_ema_is_the_running_average_of_the_policy(make_trainer: Any, parametrization: str) -> None:
    trainer, recorder = run(make_trainer, anchored(kind="ema", decay=0.9), parametrization)
    assert any("norm" in name for name in recorder.policy[0]), "modules_to_save are averaged too"
    for name, start in recorder.anchor[0].items():
        expected = start.double()
        for policy, anchor in zip(recorder.policy[1:], recorder.anchor[1:], strict=True):
            expected = 0.9 * expected + 0.1 * policy[name].double()
            torch.testing.assert_close(anchor[name].double(), expected, atol=1e-6, rtol=1e-5)
    assert (
        all(not a.requires_grad for a in anchor_of(trainer, recorder.policy[0]).values()) or parametrization == "full"
    )
    assert logged(trainer, "loss")[0] == pytest.approx(math.log(2), abs=1e-6), "the anchor starts as the policy"


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_decay_1_is_a_frozen_reference_and_decay_0_is_the_policy(make_trainer: Any, parametrization: str) -> None:
    frozen, _ = run(make_trainer, anchored(kind="periodic", steps=1000), parametrization)
    slow, recorder = run(make_trainer, anchored(kind="ema", decay=1.0), parametrization)
    assert logged(slow, "loss") == logged(frozen, "loss")
    assert all(torch.equal(a, recorder.anchor[0][n]) for n, a in recorder.anchor[-1].items())
    fast, recorder = run(make_trainer, anchored(kind="ema", decay=0.0), parametrization)
    assert all(torch.equal(a, recorder.policy[-1][n]) for n, a in recorder.anchor[-1].items())
    assert logged(fast, "loss") == pytest.approx([math.log(2)] * 6, abs=1e-5), "no step is left to the policy"


def test_a_moving_anchor_that_does_not_move_changes_nothing(
    make_trainer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = make_trainer("dpo", peft_config=LORA, arguments={"learning_rate": 5e-3})
    plain.train()
    still, _ = run(make_trainer, anchored(kind="periodic", steps=1000), "lora")
    assert "anchor: periodic never moves in this run: anchor_steps is 1000, and the run has 6 steps" in (
        capsys.readouterr().out
    )
    assert logged(still, "loss") == pytest.approx(logged(plain, "loss"), abs=1e-6)


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_periodic_copies_every_few_steps(make_trainer: Any, parametrization: str) -> None:
    _, recorder = run(make_trainer, anchored(kind="periodic", steps=3), parametrization)
    for step in range(7):
        source = recorder.policy[step // 3 * 3]
        assert all(torch.equal(a, source[n]) for n, a in recorder.anchor[step].items()), step


def test_kl_triggered_copies_when_the_mean_drift_is_too_large(make_trainer: Any) -> None:
    window, threshold = 2, 0.02
    trainer, recorder = run(
        make_trainer, anchored(kind="kl_triggered", window=window, threshold=threshold), "full", max_steps=12
    )
    recent: list[float] = []
    moved = []
    for step, drift in enumerate(logged(trainer, "rewards/margins"), start=1):
        recent = [*recent, drift][-window:]
        if len(recent) == window and sum(recent) / window > threshold:
            recent, source = [], recorder.policy[step]
            moved.append(step)
        else:
            source = recorder.anchor[step - 1]
        assert all(torch.equal(a, source[n]) for n, a in recorder.anchor[step].items()), step
    assert moved and len(moved) < 6, moved


@pytest.mark.parametrize(
    "schedule", [{"kind": "ema", "decay": 0.8}, {"kind": "kl_triggered", "window": 4, "threshold": 1e-3}]
)
@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_resuming_continues_the_anchor(
    make_trainer: Any, tmp_path: Path, parametrization: str, schedule: dict[str, Any]
) -> None:
    method, saving = anchored(**schedule), {"save_strategy": "steps", "save_steps": 3}
    _, whole = run(make_trainer, method, parametrization, **saving)
    resumed = make_trainer(
        method, arguments={"learning_rate": 5e-3, **saving}, peft_config=PARAMETRIZATIONS[parametrization]
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    last = Recorder(resumed)
    for kind in ("policy", "anchor"):
        for name, value in getattr(last, kind)[-1].items():
            assert torch.equal(value, getattr(whole, kind)[-1][name]), (kind, name)


def test_resuming_without_a_saved_anchor_is_refused(make_trainer: Any, tmp_path: Path) -> None:
    plain = make_trainer("dpo", arguments={"save_strategy": "steps", "save_steps": 3, "max_steps": 3}, peft_config=LORA)
    plain.train()
    trainer = make_trainer(anchored(kind="ema"), peft_config=LORA)
    with pytest.raises(CheckpointError, match="without a moving anchor"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_an_average_of_half_precision_weights_is_kept_in_float32(
    make_trainer: Any, model_path: str, tmp_path: Path, parametrization: str
) -> None:
    """As DeepSpeed leaves them; its steps are below the rounding of bfloat16, and add up all the same."""
    arguments = {"max_steps": 1, "learning_rate": 0.0, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(
        anchored(kind="ema", decay=0.999), arguments=arguments, peft_config=PARAMETRIZATIONS[parametrization]
    )
    trainer.model.to(torch.bfloat16)
    if trainer.ref_model is not None:
        trainer.ref_model.to(torch.bfloat16)
    anchor = trainer.reference.anchor
    pairs = anchor._pairs
    with torch.no_grad():
        for policy, _ in pairs.values():
            policy.add_(0.1 * torch.ones_like(policy))
    start = {name: a.detach().float() for name, (_, a) in pairs.items()}
    for _ in range(400):
        anchor._move(0.001)
    for name, (policy, kept) in pairs.items():
        expected = policy.float() + 0.999**400 * (start[name] - policy.float())
        torch.testing.assert_close(anchor._exact[name], expected, rtol=1e-4, atol=1e-5)
        assert kept.dtype == torch.bfloat16 and torch.equal(kept, anchor._exact[name].to(torch.bfloat16))
    exact = {name: value.clone() for name, value in anchor._exact.items()}
    checkpoint = tmp_path / "run" / "checkpoint-7"
    checkpoint.mkdir(parents=True)
    anchor.save(checkpoint)
    anchor._exact.clear()
    anchor.load(checkpoint)
    assert exact.keys() == anchor._exact.keys()
    assert all(torch.equal(value, anchor._exact[name]) for name, value in exact.items())
