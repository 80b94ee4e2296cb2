"""PAT as a run trains it: what it starts as, what it leaves, and that the plain model exported is the masked one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from alignkit.errors import ConfigError, ModelError
from alignkit.models._pat_layers import MASK_UNIT, mask_of, sparsification_modules
from alignkit.models.files import read_adapter
from alignkit.models.loading import ModelSource, load_adapter, load_model
from alignkit.models.mask_gate import Gate
from alignkit.parametrizations._pat import check
from alignkit.pruning.export import pruned_model
from alignkit.pruning.learnt import learnt
from tests.programs.conftest import save_model
from tests.shapes.building import build, config_of, text_rows

STEPS = 6
KEYS: dict[str, Any] = {
    "parametrization": "pat",
    "pat_milestone_steps": 3,
    "pat_rank": 4,
    "max_steps": STEPS,
    "learning_rate": 1.0e-2,
}
PROMPTS = torch.tensor([[5, 9, 12, 30, 7, 22], [20, 3, 41, 8, 17, 2]])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny model."""
    path = tmp_path_factory.getbasetemp() / "model"
    if not path.exists():
        save_model(path)
    return str(path)


def trainer_of(program: str, model: str, folder: Path, **keys: Any) -> Any:
    folder.mkdir(exist_ok=True)
    config = config_of(program, model, folder, **{**KEYS, **keys})
    return build(config, text_rows(config, 16))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Logits [2, 6, V] in evaluation mode."""
    was_training = model.training
    found: Tensor = model.eval()(PROMPTS).logits
    model.train(was_training)
    return found


def logged(trainer: Any) -> list[dict[str, float]]:
    """The lines of the log of training."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@contextmanager
def streams(model: Any) -> Iterator[list[Tensor]]:
    """What every layer is given and gives while this is open."""
    seen: list[Tensor] = []
    layers = model.get_base_model().model.layers
    handles = [
        layer.register_forward_hook(lambda _, inputs, output: seen.extend([inputs[0], output])) for layer in layers
    ]
    yield seen
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("form", ["paper", "released"])
@pytest.mark.parametrize("keep_tied", [False, True])
def test_a_run_from_the_whole_model_to_the_narrow_one(base: str, tmp_path: Path, form: str, keep_tied: bool) -> None:
    trainer = trainer_of("sft", base, tmp_path, pat_form=form, pat_keep_tied=keep_tied)
    model, mask = trainer.model, mask_of(trainer.model)
    plain = logits(load_model(ModelSource(model=base)))
    assert torch.equal(logits(model), plain)
    assert len(list(sparsification_modules(model))) == 1 + 2 * 2 - keep_tied
    trainer.train()
    assert mask.is_hard
    assert int(mask.kept.sum()) == mask.width == 24
    with streams(model) as seen:
        assert not torch.allclose(logits(model), plain, atol=1e-2)
    assert all(float(stream[..., ~mask.kept].abs().max()) == 0 for stream in seen)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("form", ["paper", "released"])
@pytest.mark.parametrize("keep_tied", [False, True])
def test_what_is_exported_is_what_was_trained(base: str, tmp_path: Path, form: str, keep_tied: bool) -> None:
    trainer = trainer_of("sft", base, tmp_path, pat_form=form, pat_keep_tied=keep_tied)
    trainer.train()
    with torch.no_grad():  # As after a long training: nothing is near its start.
        for _, module in sparsification_modules(trainer.model):
            module.l1.add_(torch.randn_like(module.l1) * 0.2)
            module.v.add_(torch.randn_like(module.v) * 0.2)
    trainer.save_model(str(tmp_path / "adapter"))
    masked = logits(trainer.model)
    loaded = load_adapter(load_model(ModelSource(model=base)), read_adapter(tmp_path / "adapter"))
    assert torch.equal(logits(loaded), masked)
    found = learnt(loaded)
    exported = pruned_model(found.model, found.plan, folds=found.folds, keep_tied=found.keep_tied)
    assert exported.config.hidden_size == 24
    assert exported.config.tie_word_embeddings == keep_tied
    assert torch.allclose(logits(exported), masked, atol=1e-4)
    # As the released merge script does it, without the scales that were trained: that is another model.
    if form == "released":
        forgetful = {name: replace(fold, v=torch.ones_like(fold.v)) for name, fold in found.folds.items()}
        wrong = pruned_model(found.model, found.plan, folds=forgetful, keep_tied=found.keep_tied)
        assert float((logits(wrong) - masked).abs().max()) > 1e-2


def test_plain_peft_refuses_the_adapter(base: str, tmp_path: Path) -> None:
    trainer = trainer_of("sft", base, tmp_path, max_steps=1, pat_milestone_steps=None)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    with pytest.raises((KeyError, ValueError), match="ALIGNKIT_PAT"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "adapter"))


@pytest.mark.parametrize("at", [2, 4], ids=["in the anneal", "after the milestone"])
def test_resumed_is_uninterrupted(base: str, tmp_path: Path, at: int) -> None:
    keys = {"save_strategy": "steps", "save_steps": at}
    whole = trainer_of("sft", base, tmp_path / "whole", **keys)
    whole.train()
    again = trainer_of("sft", base, tmp_path / "again", **keys)
    again.train(resume_from_checkpoint=str(Path(whole.args.output_dir, f"checkpoint-{at}")))
    for (name, one), (_, other) in zip(whole.model.state_dict().items(), again.model.state_dict().items(), strict=True):
        assert torch.equal(one, other), name
    assert [e["loss"] for e in logged(whole)][at:] == [e["loss"] for e in logged(again)][-(STEPS - at) :]


@pytest.mark.parametrize("mask", ["zero", "frozen"])
def test_a_longer_run_leaves_a_settled_mask_hard(base: str, tmp_path: Path, mask: str) -> None:
    keys = {"pat_milestone_steps": None, "pat_mask": mask, "save_strategy": "steps", "save_steps": 3}
    short = trainer_of("sft", base, tmp_path / "short", max_steps=3, **keys)
    short.train()
    longer = trainer_of("sft", base, tmp_path / "longer", max_steps=15, **keys)
    seen = []
    before = longer.attachment.before_step
    longer.attachment.before_step = lambda step, total: (
        before(step, total),
        seen.append(mask_of(longer.model).is_hard),
    )
    longer.train(resume_from_checkpoint=str(Path(short.args.output_dir, "checkpoint-3")))
    assert seen == [True] * 12
    assert torch.equal(mask_of(longer.model).kept, mask_of(short.model).kept)


@pytest.mark.parametrize("mask", ["importance", "frozen"])
def test_a_mask_by_importance_keeps_what_is_most_active(base: str, tmp_path: Path, mask: str) -> None:
    trainer = trainer_of("sft", base, tmp_path, pat_mask=mask, max_steps=4, pat_mask_learning_rate=1e-9)
    model = load_model(ModelSource(model=base))
    sums, norms = torch.zeros(32, dtype=torch.float64), []
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.register_forward_hook(lambda _, __, output: norms.append(output[0].detach().double()))
    model.model.norm.register_forward_hook(lambda _, __, output: norms.append(output[0].detach().double()))
    squares: list[Tensor] = [torch.zeros(32, dtype=torch.float64) for _ in range(5)]
    for row in trainer.train_dataset:
        norms.clear()
        model(torch.tensor([row["input_ids"]]))
        for place, values in enumerate(norms):
            squares[place] += values.square().sum(0)
    sums = torch.stack(squares).sqrt().sum(0)
    trainer.train()
    kept = mask_of(trainer.model).kept
    assert set(kept.nonzero().flatten().tolist()) == set(sums.topk(24).indices.tolist())


def test_the_mask_has_a_learning_rate_of_its_own_and_no_decay(base: str, tmp_path: Path) -> None:
    trainer = trainer_of(
        "sft", base, tmp_path, max_steps=2, pat_milestone_steps=None, weight_decay=0.1, pat_mask_learning_rate=0.25
    )
    trainer.train()
    logits_of = mask_of(trainer.model).layer.lora_mask["default"].weight
    (group,) = [g for g in trainer.optimizer.param_groups if any(p is logits_of for p in g["params"])]
    assert (group["params"], group["initial_lr"], group["weight_decay"]) == ([logits_of], 0.25 / MASK_UNIT, 0.0)
    assert sum(p is logits_of for g in trainer.optimizer.param_groups for p in g["params"]) == 1


def test_gradient_checkpointing_changes_nothing(base: str, tmp_path: Path) -> None:
    losses = []
    for on in (False, True):
        trainer = trainer_of("sft", base, tmp_path / str(on), gradient_checkpointing=on, max_steps=4)
        trainer.train()
        losses.append([(e["loss"], e["loss/identity"], e["grad_norm"]) for e in logged(trainer)])
    assert losses[0] == losses[1]


def test_accumulation_adds_the_terms_once_a_step(base: str, tmp_path: Path) -> None:
    """With another denominator of the terms, the gradient norms would part: they are most of the gradient."""
    found = []
    for size, steps in ((4, 1), (1, 4)):
        keys = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "pat_identity_coef": 50.0}
        trainer = trainer_of("sft", base, tmp_path / str(size), max_steps=4, **keys)
        trainer.train()
        found.append([(e["loss"], e["grad_norm"]) for e in logged(trainer)])
    assert found[0] == [pytest.approx(each, abs=1e-5) for each in found[1]]


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_preferences_are_scored_against_the_unpruned_model(base: str, tmp_path: Path, layout: str) -> None:
    trainer = trainer_of("preference", base, tmp_path, method="flex_dpo", layout=layout, max_steps=4)
    trainer.train()
    first = logged(trainer)[0]
    assert first["logratio/chosen"] == pytest.approx(0, abs=1e-6)
    assert abs(logged(trainer)[-1]["logratio/chosen"]) > 1e-3


def test_the_packed_layout_computes_what_the_padded_one_does(base: str, tmp_path: Path) -> None:
    found = {}
    for layout in ("padded", "packed"):
        trainer = trainer_of("preference", base, tmp_path / layout, method="dpo", layout=layout, max_steps=4)
        trainer.train()
        found[layout] = [(e["loss"], e["grad_norm"]) for e in logged(trainer)]
    assert found["padded"] == [pytest.approx(each, rel=1e-4) for each in found["packed"]]


def test_a_gradient_rule_edits_the_gradient_of_what_trains(base: str, tmp_path: Path) -> None:
    from alignkit.gradients._hook import chosen_rule
    from alignkit.parts.rule import load_rule

    tmp_path.mkdir(exist_ok=True)
    config = config_of("preference", base, tmp_path, method="flex_dpo", gradient_rule="glad", **KEYS)
    rule = chosen_rule("glad", load_rule("glad").options())
    trainer = build(config, text_rows(config, 16), rule=rule)
    trainer.train()
    assert int(mask_of(trainer.model).kept.sum()) == 24
    assert all(e["loss/identity"] >= 0 for e in logged(trainer))


def test_a_quantised_base_trains_and_is_exported_from_the_weights_it_stands_for(base: str, tmp_path: Path) -> None:
    from alignkit.models.export import dequantized

    trainer = trainer_of("sft", base, tmp_path, quantization="nf4", max_steps=4)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    masked = logits(trainer.model)
    plain = dequantized(load_model(ModelSource(model=base, quantization="nf4")))
    loaded = load_adapter(plain, read_adapter(tmp_path / "adapter"))
    # The kernels of a quantised base round what they are given.
    assert torch.allclose(logits(loaded), masked, atol=0.05)
    found = learnt(loaded)
    exported = pruned_model(found.model, found.plan, folds=found.folds)
    assert torch.allclose(logits(exported), logits(loaded_again(base, tmp_path / "adapter")), atol=1e-4)


def loaded_again(base: str, adapter: Path) -> Any:
    from alignkit.models.export import dequantized

    plain = dequantized(load_model(ModelSource(model=base, quantization="nf4")))
    return load_adapter(plain, read_adapter(adapter))


def test_what_cannot_work_is_refused(base: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="o_proj"):
        trainer_of("sft", base, tmp_path, lora_target_modules=["q_proj", "down_proj"])
    with pytest.raises(ModelError, match="remove nothing"):
        trainer_of("sft", base, tmp_path, pat_hidden=0.01)
    for keys, words in (
        ({"use_dora": True}, "use_dora"),
        ({"lora_modules_to_save": ["lm_head"]}, "lora_modules_to_save"),
        ({"torch_compile": True}, "compiled"),
    ):
        with pytest.raises(ConfigError, match=words):
            config_of("sft", base, tmp_path, **KEYS, **keys)


def test_fsdp_is_refused_by_name(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("sft", base, tmp_path, **KEYS)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="`parametrization: pat` under FSDP.*Launch with DDP or a DeepSpeed"):
        check(config)


def test_what_the_mask_trains_has_a_gradient_in_every_step(base: str, tmp_path: Path) -> None:
    """From the forward pass alone, where DistributedDataParallel looks for it; once the task has let go of it, zero."""
    model = trainer_of("sft", base, tmp_path).model
    mask = mask_of(model)
    found = []
    for step in range(4):
        mask.gate = Gate(step, 3, 0.5)
        mask.is_hard = step == 3
        (gradient,) = torch.autograd.grad(model(PROMPTS).logits.square().sum(), mask.parameter)
        found.append(bool(gradient.any()))
    assert found == [True, True, False, False]


@pytest.mark.parametrize("mask", ["zero", "frozen"])
def test_an_adapter_from_before_the_milestone_is_refused_for_what_it_is(base: str, tmp_path: Path, mask: str) -> None:
    trainer = trainer_of("sft", base, tmp_path, pat_mask=mask)
    trainer.save_model(str(tmp_path / "adapter"))
    with pytest.raises(ModelError, match="adapter' was saved before its mask was settled"):
        load_adapter(load_model(ModelSource(model=base)), read_adapter(tmp_path / "adapter"))


def test_the_terms_are_logged_and_the_mask_is_seen(base: str, tmp_path: Path) -> None:
    trainer = trainer_of("sft", base, tmp_path)
    trainer.train()
    entries = logged(trainer)
    assert {"loss/identity", "loss/active", "loss/bimodality", "pat/open_channels", "pat/soft_distance"} <= set(
        entries[0]
    )
    assert entries[0]["pat/soft_distance"] > 0
    assert [e["pat/soft_distance"] for e in entries[3:]] == [0.0] * 3
    assert [e["pat/mask_churn"] for e in entries[4:]] == [0.0] * 2
    assert [e["pat/open_channels"] for e in entries[3:]] == [24.0] * 3


def test_weights_that_move_in_full_have_the_gradient_of_the_weights_and_are_exported(base: str, tmp_path: Path) -> None:
    trainer = trainer_of("sft", base, tmp_path, pat_weights="full", pat_identity_coef=0.0, pat_active_coef=0.0)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    row = torch.tensor([trainer.train_dataset[0]["input_ids"]])
    for model in (trainer.model, plain):
        model(row, labels=row).loss.backward()
    updates = {
        name.removeprefix("base_model.model.").removesuffix(".lora_update.default.weight"): parameter
        for name, parameter in trainer.model.named_parameters()
        if "lora_update" in name
    }
    assert len(updates) == 2 * 7
    for name, update in updates.items():
        assert torch.allclose(update.grad, plain.get_submodule(name).weight.grad, atol=1e-6), name
    assert not any("lora_A" in name or "lora_B" in name for name, p in trainer.model.named_parameters())
    trainer.model.zero_grad()
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = load_adapter(load_model(ModelSource(model=base)), read_adapter(tmp_path / "adapter"))
    masked = logits(trainer.model)
    assert torch.equal(logits(loaded), masked)
    found = learnt(loaded)
    exported = pruned_model(found.model, found.plan, folds=found.folds)
    assert torch.allclose(logits(exported), masked, atol=1e-4)


def test_a_run_that_would_end_before_its_mask_is_hard_is_refused(base: str, tmp_path: Path) -> None:
    keys = {"max_steps": -1, "num_train_epochs": 1, "pat_milestone_steps": 4}
    with pytest.raises(ModelError, match="not reached in a run of 4 steps"):
        trainer_of("sft", base, tmp_path, **keys).train()
