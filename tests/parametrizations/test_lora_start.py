"""LoRA that starts at main directions of weights or rows: PEFT's steps, on a base that stays what it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from trl import SFTTrainer

from alignkit.errors import ModelError
from alignkit.parametrizations import _lora
from alignkit.shapes.tokens import SupervisedConfig
from tests import supervised
from tests.trainers import logged

RANK = 4


@pytest.fixture(scope="module")
def texts() -> list[dict[str, Any]]:
    return supervised.completions(8)


def config(kind: bool | str, **changes: Any) -> SupervisedConfig:
    options = {"lora_r": RANK, "lora_alpha": 6, "init_lora_weights": kind} | changes
    return SupervisedConfig(model="m", data="d", method="sft", output_dir="o", **options)


def make(place: Path, texts: list[dict[str, Any]], kind: bool | str, **changes: Any) -> Any:
    """A trainer as a run puts it together."""
    model, chosen = supervised.model(), config(kind)
    adapter = _lora.prepare(chosen, model)
    trainer = supervised.make(place, supervised.token_rows(texts), model=model, peft_config=adapter, **changes)
    _lora.attach(chosen, trainer)
    return trainer


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=torch.arange(5, 30)[None]).logits
    return found


@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_4", "olora"])
def test_steps_are_those_of_peft_and_the_adapter_fits_the_original_base(
    kind: str, texts: list[dict[str, Any]], tmp_path: Path
) -> None:
    how = {"max_steps": 3, "learning_rate": 1e-2, "max_grad_norm": 0.5}
    ours = make(tmp_path / "ours", texts, kind, **how)
    plain = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=6, target_modules="all-linear", init_lora_weights=kind)
    torch.manual_seed(0)
    peer_model = supervised.model()
    peer = SFTTrainer(
        peer_model,
        args=supervised.arguments(tmp_path / "theirs", **how),
        train_dataset=Dataset.from_list(texts),
        processing_class=supervised.tokenizer(),
        peft_config=plain,
    )
    base = logits(supervised.model())
    assert float((logits(ours.model) - base).abs().max()) < 1e-4, "the start is the base"
    with ours.model.disable_adapter():
        assert torch.equal(logits(ours.model), base)
    held = {name: weight.detach().clone() for name, weight in ours.model.named_parameters() if "lora_" in name}
    for trainer in (ours, peer):
        torch.manual_seed(0)
        trainer.train()
    close = 1e-4 if "niter" not in kind else 0.2  # whose approximation is drawn
    assert logged(ours, "loss") == pytest.approx(logged(peer, "loss"), rel=close)
    tuned = logits(ours.model)
    assert float((tuned - base).abs().max()) > 0.1
    if "niter" not in kind:
        assert torch.allclose(tuned, logits(peer.model), atol=2e-3)
    for name, weight in ours.model.named_parameters():
        if "lora_" in name:
            moved = (weight.detach() - held[name]).chunk(2, 0 if "lora_A" in name else 1)
            assert bool(moved[0].any()) and not bool(moved[1].any()), name

    ours.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(supervised.model(), tmp_path / "saved")
    assert torch.allclose(logits(loaded), tuned, atol=1e-5)
    assert torch.allclose(logits(loaded.merge_and_unload()), tuned, atol=1e-4)


def test_a_resumed_run_makes_the_same_steps(texts: list[dict[str, Any]], tmp_path: Path) -> None:
    how = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    whole, resumed = (make(tmp_path, texts, "pissa", **how) for _ in range(2))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(logits(whole.model), logits(resumed.model))


def test_eva_starts_at_the_main_directions_of_what_layers_get(texts: list[dict[str, Any]], tmp_path: Path) -> None:
    """By another route: the singular vectors of all inputs of a layer at once, which keep about as much of them."""
    trainer = make(tmp_path, texts, "eva")
    assert torch.equal(logits(trainer.model), logits(supervised.model()))
    model, inputs = supervised.model(), {}
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: inputs.setdefault(name, []).append(args[0][0].detach())
        )
    for row in trainer.train_dataset:
        model(input_ids=torch.tensor([row["input_ids"]]))
    layers = dict(trainer.model.get_base_model().named_modules())
    for name in names:
        given = torch.cat(inputs[name]) - torch.cat(inputs[name]).mean(0)
        a = layers[name].lora_A["default"].weight.detach()
        assert torch.allclose(a @ a.T, torch.eye(RANK), atol=1e-4)
        best = torch.linalg.svdvals(given)[:RANK].square().sum()
        assert float((given @ a.T).square().sum() / best) > 0.9
        random = torch.linalg.qr(torch.randn(given.shape[1], RANK))[0]
        assert float((given @ random).square().sum() / best) < 0.7
    assert trainer.model.peft_config["default"].r == RANK


def test_gaussian_is_that_of_peft(texts: list[dict[str, Any]], tmp_path: Path) -> None:
    trainer = make(tmp_path, texts, "gaussian")
    a = torch.cat([w.detach().flatten() for n, w in trainer.model.named_parameters() if "lora_A" in n])
    assert float(a.std()) == pytest.approx(1 / RANK, rel=0.1) and float(a.abs().max()) > 3 / RANK
    assert torch.equal(logits(trainer.model), logits(supervised.model()))


def test_what_has_no_such_start(texts: list[dict[str, Any]], tmp_path: Path) -> None:
    model = supervised.model()
    chosen = config("pissa", lora_r=20)
    trainer = supervised.make(
        tmp_path, supervised.token_rows(texts), model=model, peft_config=_lora.prepare(chosen, model)
    )
    with pytest.raises(ModelError, match=r"`lora_r: 20` is more than .* has directions, 16, at which .*: pissa"):
        _lora.attach(chosen, trainer)
    short = [{"prompt": "a", "completion": "b"}]
    with pytest.raises(ModelError, match="needs rows of at least lora_r: 4 tokens, and among the first 1"):
        make(tmp_path, short, "eva")
