"""The pulls to the starting weights: closed forms through the real trainer, and runs that are stopped and resumed."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback

from alignkit.errors import CheckpointError, ConfigError
from alignkit.gradients._decay import DecayToStart
from tests.gradients.conftest import chosen, lora, weights
from tests.runs.saved import guarded
from tests.trainers import flat_weights, logged

COEF = 30.0


def vectors(trainer: Any) -> list[Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_step_takes_back_its_share_of_the_distance(optimizer: Any) -> None:
    """Against the recursion in plain floats; gradients of 0 leave nothing but the pull."""
    start, moved, rate, coef = [1.0, -2.0, 0.5], [3.0, -2.5, 0.5], 0.1, 0.7
    weight = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
    stepper = optimizer([weight], lr=rate, weight_decay=0.0)
    decay = DecayToStart(coef)
    decay.attach(stepper)
    decay.attach(stepper)
    weight.grad = torch.zeros_like(weight)
    stepper.step()
    assert weight.tolist() == start, "nothing to take back"
    with torch.no_grad():
        weight.copy_(torch.tensor(moved))
    expected = moved
    for _ in range(3):
        stepper.param_groups[0]["lr"] = rate
        stepper.step()
        expected = [w - rate * coef * (w - w_0) for w, w_0 in zip(expected, start, strict=True)]
        assert weight.tolist() == pytest.approx(expected, rel=1e-12)
        rate /= 2


def pulled_to(start: Tensor, coef: float, folder: Path) -> DecayToStart:
    """A decay that has loaded the start of a single weight."""
    torch.save([start], folder / "starting_weights_0.pt")
    decay = DecayToStart(coef)
    decay.load(folder)
    return decay


def test_a_weight_without_gradient_is_left_alone(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    stepper = torch.optim.SGD([weight], lr=0.1)
    pulled_to(torch.zeros(2), 5.0, tmp_path).attach(stepper)
    stepper.step()
    assert weight.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", ["decay_to_init", "l2_sp"])
def test_training_taken_up_again_is_pulled_to_the_first_start_and_once(make_trainer: Any, name: str) -> None:
    trainer = make_trainer(
        gradient_rule=chosen(name),
        arguments={"max_steps": 2, "learning_rate": 1e-2, "optim": "sgd"},
    )
    start = vectors(trainer)
    trainer.train()
    trainer.train()
    if name == "l2_sp":
        kept = list(trainer._start.values())
    else:
        decays = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, DecayToStart)]
        assert len(decays) == 1 and trainer.persistent == decays
        assert len(trainer.optimizer.optimizer._optimizer_step_pre_hooks) == 1
        kept = decays[0].starts()
    assert len(kept) == len(start)  # in the order of the optimizer's groups
    assert all(any(torch.equal(ours, first) for ours in kept) for first in start)
    assert any(not torch.equal(now, first) for now, first in zip(vectors(trainer), start, strict=True))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_decay_through_the_trainer_follows_the_plain_steps(make_trainer: Any, kind: str) -> None:
    """With sgd, and the clipped gradient read off before each step, the recursion can be repeated by hand."""
    trainer = make_trainer(
        gradient_rule=chosen("decay_to_init", decay_coef=COEF),
        arguments={"optim": "sgd", "max_steps": 4, "learning_rate": 1e-2, "gradient_accumulation_steps": 2},
        peft_config=lora() if kind == "lora" else None,
    )
    start, expected, compared = vectors(trainer), [vectors(trainer)], []

    def before(stepper: torch.optim.Optimizer, *unused: Any) -> None:
        compared.append(vectors(trainer))
        rate = stepper.param_groups[0]["lr"]
        grads = [p.grad.clone() for p in trainer.model.parameters() if p.requires_grad]
        now = [w - rate * COEF * (w - w_0) for w, w_0 in zip(compared[-1], start, strict=True)]
        expected.append([w - rate * g for w, g in zip(now, grads, strict=True)])

    trainer.create_optimizer().register_step_pre_hook(before)
    trainer.train()
    compared.append(vectors(trainer))
    assert len(compared) == len(expected) == 5
    for ours, theirs in zip(compared, expected, strict=True):
        for x, y in zip(ours, theirs, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)


def test_decay_holds_the_weights_back(make_trainer: Any) -> None:
    distances = []
    for coef in (0.0, COEF):
        trainer = make_trainer(gradient_rule=chosen("decay_to_init", decay_coef=coef))
        start = weights(trainer)
        trainer.train()
        distances.append((weights(trainer) - start).norm().item())
    assert distances[1] < 0.98 * distances[0]


def resumable(make_trainer: Any, model_path: str, rule: Any, kind: str, steps: int) -> Any:
    trainer = make_trainer(
        gradient_rule=rule,
        model=AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32),
        arguments={
            "max_steps": 6,
            "lr_scheduler_type": "constant",
            "save_strategy": "steps",
            "save_steps": 3,
            "disable_dropout": False,
        },
        peft_config=lora(lora_dropout=0.2, modules_to_save=["q_norm"]) if kind == "lora" else None,
        callbacks=[StopAt(steps)],
    )
    return guarded(trainer)


class StopAt(TrainerCallback):
    """Ends a run early, as a kill would, without changing its schedule."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("decay_to_init", {"decay_coef": COEF}),
        ("l2_sp", {"l2_sp_coef": 0.5}),
        ("glad", {"rho": 0.3, "every_k": 2}),
        ("random_perturbation", {"rho": 0.3}),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    make_trainer: Any, model_path: str, tmp_path: Path, name: str, options: Any, kind: str
) -> None:
    whole = resumable(make_trainer, model_path, chosen(name, **options), kind, 6)
    whole.train()
    expected = flat_weights(whole.model)
    checkpoint = tmp_path / "run" / "checkpoint-3"
    assert (checkpoint / "complete.json").is_file()
    assert (checkpoint / "starting_weights_0.pt").is_file() == (name == "decay_to_init")
    again = resumable(make_trainer, model_path, chosen(name, **options), kind, 6)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert logged(again, "loss")[3:] == logged(whole, "loss")[3:]
    assert torch.equal(flat_weights(again.model), expected)


def test_a_checkpoint_without_starting_weights_is_refused(make_trainer: Any, model_path: str, tmp_path: Path) -> None:
    resumable(make_trainer, model_path, None, "lora", 3).train()
    rule = chosen("decay_to_init")
    with pytest.raises(CheckpointError, match=r"starting_weights_0\.pt is missing"):
        resumable(make_trainer, model_path, rule, "lora", 6).train(str(tmp_path / "run" / "checkpoint-3"))


def test_starting_weights_of_another_layout_are_refused(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    stepper = torch.optim.SGD([weight], lr=0.1)
    pulled_to(torch.zeros(3), 1.0, tmp_path).attach(stepper)
    with pytest.raises(CheckpointError, match="another process layout"):
        stepper.step()


def test_the_optimizer_inside_all_wrappers_is_asked(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    inner = torch.optim.SGD([weight], lr=0.5)
    zero = SimpleNamespace(optimizer=inner)
    decay = pulled_to(torch.zeros(2), 1.0, tmp_path)
    decay.on_train_begin(None, None, None, optimizer=SimpleNamespace(optimizer=zero))
    weight.grad = torch.zeros(2)
    inner.step()
    assert weight.tolist() == [0.5, 0.5]
    with pytest.raises(ConfigError, match="SimpleNamespace is no torch optimizer"):
        decay.on_train_begin(None, None, None, optimizer=SimpleNamespace())


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_l2_sp_adds_the_gradient_of_the_dense_penalty(make_trainer: Any, kind: str, watched: Any) -> None:
    """At weights that training has moved: the edit is the plain gradient plus that of coef * ||W - W_0||^2."""
    rule, seen = watched("l2_sp", l2_sp_coef=0.5)
    trainer = make_trainer(
        gradient_rule=rule,
        arguments={"max_steps": 3, "learning_rate": 1e-2, "gradient_accumulation_steps": 2},
        peft_config=lora(modules_to_save=["q_norm"]) if kind == "lora" else None,
    )
    names = [n for n, p in trainer.model.named_parameters() if p.requires_grad]
    start = dict(zip(names, vectors(trainer), strict=True))
    trainer.train()
    (last,), edited = seen.evaluations[-1], dict(zip(names, seen.edited[-1], strict=True))
    now = {n: w.clone().requires_grad_() for n, w in zip(names, last.weights, strict=True)}
    penalty = torch.zeros(())
    for name, w in now.items():
        if "lora_A" in name:
            penalty = penalty + (8 / 4 * now[name.replace("lora_A", "lora_B")] @ w).pow(2).sum()
        elif "lora_B" not in name:
            penalty = penalty + (w - start[name]).pow(2).sum()
    pulls = torch.autograd.grad(0.5 * penalty / 2, list(now.values()))
    assert any(pull.abs().max() > 1e-4 for pull in pulls)
    for name, g, pull in zip(names, last.gradient, pulls, strict=True):
        torch.testing.assert_close(edited[name] - g, pull, rtol=1e-4, atol=1e-6, msg=name)
    assert math.isfinite(logged(trainer, "gradient/penalty")[-1])
