"""Optimizers beside transformers' usual ones, their settings, and learning rates of groups."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

from alignkit.config.optimizers import MUON, OPTIMIZERS
from alignkit.gradients._hook import chosen_rule
from alignkit.memory.estimate import STATE_BYTES
from alignkit.models.muon import MuonWithAdamW
from alignkit.parametrizations import _lora
from alignkit.parts.rule import load_rule
from alignkit.runs.arguments import _optimizer
from tests import supervised
from tests.trainers import flat_weights

INSTALLED = {
    name
    for name, optimizer in OPTIMIZERS.items()
    if optimizer.package is None or importlib.util.find_spec(optimizer.package[0])
}


def told(optim: str, **settings: Any) -> dict[str, Any]:
    """The arguments of a trainer that a config with these keys gives."""
    schedule = {"lr_scheduler_type": "constant"} if OPTIMIZERS[optim].is_schedule_free else {}
    return _optimizer(SimpleNamespace(optim=optim, optim_args=settings or None)) | schedule


@pytest.fixture(scope="module")
def rows() -> Any:
    return supervised.token_rows(supervised.completions(8))


def test_the_memory_of_every_optimizer_is_known() -> None:
    assert set(STATE_BYTES) == set(OPTIMIZERS) - {"adafactor"}


@pytest.fixture(scope="module")
def trainer(rows: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return supervised.make(tmp_path_factory.mktemp("run"), rows, weight_decay=0.1)


def stepped(trainer: Any, optim: str, **settings: Any) -> torch.Tensor:
    """All weights after eight steps of the optimizer that the trainer makes, which is left as it was."""
    if optim not in INSTALLED:
        pytest.skip(f"{optim} is not installed")
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    arguments = told(optim, **settings)
    trainer.optimizer, trainer.args.optim, trainer.args.optim_args = None, arguments["optim"], arguments["optim_args"]
    optimizer = trainer.create_optimizer()
    if OPTIMIZERS[optim].is_schedule_free:
        optimizer.train()
    for step in range(8):
        torch.manual_seed(step)
        for weight in trainer.model.parameters():
            weight.grad = torch.randn_like(weight)
        optimizer.step()
        optimizer.zero_grad()
    after = flat_weights(trainer.model)
    trainer.model.load_state_dict(before)
    return after


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_it_makes_steps(optim: str, trainer: Any) -> None:
    before = flat_weights(trainer.model)
    moved = (stepped(trainer, optim) - before).abs()
    assert bool(moved.isfinite().all()) and float((moved > 0).double().mean()) > 0.99


@pytest.mark.parametrize(
    ("optim", "settings"),
    [
        ("sgd", {"momentum": 0.9}),
        ("adafactor", {"scale_parameter": True}),
        ("adafactor", {"beta1": 0.9}),
        ("adafactor", {"clip_threshold": 0.1}),
        (MUON, {"momentum": 0.5}),
        (MUON, {"ns_steps": 1}),
        (MUON, {"nesterov": False}),
        ("ademamix", {"alpha": 9.0}),
        ("schedule_free_adamw", {"r": 2.0}),
    ],
)
def test_settings_have_an_effect(optim: str, settings: dict[str, Any], trainer: Any) -> None:
    assert not torch.equal(stepped(trainer, optim), stepped(trainer, optim, **settings))


@pytest.mark.parametrize("optim", ["lion_8bit", MUON, "schedule_free_adamw"])
def test_a_resumed_run_goes_on_with_its_states(optim: str, tmp_path: Path, rows: Any) -> None:
    if optim not in INSTALLED:
        pytest.skip(f"{optim} is not installed")
    how = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, **told(optim)}
    whole, resumed = (supervised.make(tmp_path, rows, True, **how) for _ in range(2))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for trainer, name in ((whole, "end"), (resumed, "again")):
        trainer.save_model(str(tmp_path / name))
    first, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("end", "again"))
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_muon_is_torchs_on_matrices_and_adamw_elsewhere() -> None:
    """Step for step, with a schedule, and with states and groups that were saved and loaded in between."""

    def weights() -> list[nn.Parameter]:
        torch.manual_seed(0)
        return [nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))]

    ours, theirs = weights(), weights()
    group = {"params": ours[:1], "muon": True, "weight_decay": 0.1}
    both = MuonWithAdamW([group, {"params": ours[1:]}], lr=0.02, betas=(0.8, 0.9), momentum=0.9)
    muon = torch.optim.Muon(theirs[:1], lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(theirs[1:], lr=0.02, betas=(0.8, 0.9), weight_decay=0.0)
    for step in range(5):
        torch.manual_seed(step)
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        for optimizer in (both, muon, adamw):
            for each in optimizer.param_groups:
                each["lr"] = 0.02 / (step + 1)
            optimizer.step()
        assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))
        if step == 2:
            both.load_state_dict({**both.state_dict()})


def test_muon_leaves_embeddings_head_and_norms_to_adamw(tmp_path: Path, rows: Any) -> None:
    trainer = supervised.make(tmp_path, rows, **told(MUON), weight_decay=0.1)
    optimizer = trainer.create_optimizer()
    names = {id(weight): name for name, weight in trainer.model.named_parameters()}
    by_muon = {names[id(p)] for group in optimizer.param_groups if group["muon"] for p in group["params"]}
    assert by_muon == {name for name in names.values() if "_proj" in name}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
    assert all(group["weight_decay"] == 0.1 for group in optimizer.param_groups if group["muon"])


def test_a_rules_second_evaluation_goes_with_it(tmp_path: Path, rows: Any) -> None:
    ends = []
    for rule in (None, chosen_rule("sam", load_rule("sam").options())):
        trainer = supervised.make(tmp_path, rows, True, max_steps=2, **told(MUON))
        trainer.gradient_rule = rule
        trainer.train()
        ends.append(flat_weights(trainer.model))
    assert bool(ends[1].isfinite().all()) and not torch.equal(*ends)


# --- LoRA+ ------------------------------------------------------------------------------------------------------------

RATE, RATIO, DECAY = 1e-3, 16.0, 0.1


def plus(trainer: Any) -> Any:
    trainer.attach(
        _lora.attach(SimpleNamespace(loraplus_lr_ratio=RATIO, adapter=None, init_lora_weights=True), trainer)
    )
    return trainer


def plan(optimizer: Any, model: nn.Module) -> dict[str, tuple[float, float]]:
    names = {id(weight): name for name, weight in model.named_parameters()}
    return {
        names[id(weight)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for weight in group["params"]
    }


@pytest.mark.parametrize("optim", ["adamw_torch", MUON])
def test_lora_plus_is_that_of_peft(optim: str, tmp_path: Path, rows: Any) -> None:
    trainer = plus(supervised.make(tmp_path, rows, True, learning_rate=RATE, weight_decay=DECAY, **told(optim)))
    ours = plan(trainer.create_optimizer(), trainer.model)
    model = get_peft_model(supervised.model(), supervised.lora())
    peers = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=RATIO, loraplus_weight_decay=DECAY
    )
    assert ours == plan(peers, model)
    assert {rate for rate, _ in ours.values()} == {RATE, RATE * RATIO}
    if optim == MUON:
        assert all(group["muon"] for group in trainer.optimizer.param_groups if group["params"])


class Rates(TrainerCallback):  # type: ignore[misc]  # transformers' callbacks are untyped
    """Learning rates of the groups that have parameters, step by step."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **unused: Any) -> None:
        self.seen.append([group["lr"] for group in optimizer.param_groups if group["params"]])


def test_the_ratio_holds_through_the_whole_schedule_and_moves_b(tmp_path: Path, rows: Any) -> None:
    how = {"learning_rate": RATE, "lr_scheduler_type": "cosine", "warmup_steps": 2, "max_steps": 5}
    ends = {}
    for ratio in (None, RATIO):
        trainer = supervised.make(tmp_path, rows, True, **how)
        trainer = trainer if ratio is None else plus(trainer)
        rates = Rates()
        trainer.add_callback(rates)
        trainer.train()
        ends[ratio] = dict(trainer.model.named_parameters())
        if ratio is not None:
            assert len(rates.seen) == 5 and all(b == pytest.approx(RATIO * a) for a, b in rates.seen)
            assert len({a for a, _ in rates.seen}) > 3
    size = {
        ratio: sum(float(w.detach().abs().sum()) for n, w in end.items() if "lora_B" in n)
        for ratio, end in ends.items()
    }
    assert size[RATIO] > 4 * size[None]
