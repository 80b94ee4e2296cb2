"""ATP as a run trains it: how decisions are learnt, settled and kept, and that the export is what was trained."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from alignkit.errors import CheckpointError, ConfigError, ModelError
from alignkit.gradients._hook import chosen_rule
from alignkit.models._atp_layers import left_in_pruned, masks_of, set_masks
from alignkit.models.files import read_adapter
from alignkit.models.loading import ModelSource, load_adapter, load_model
from alignkit.parametrizations import _atp
from alignkit.parts.rule import load_rule
from alignkit.pruning import decisions
from alignkit.pruning.export import pruned_model
from alignkit.pruning.learnt import learnt
from tests.programs.conftest import save_model
from tests.shapes.building import build, config_of, text_rows

STEPS, CONTROL = 6, 3
KEYS: dict[str, Any] = {
    "parametrization": "atp",
    "atp_control_fraction": CONTROL / STEPS,
    "atp_generator_lr": 0.2,
    "max_steps": STEPS,
    "learning_rate": 1.0e-2,
}
"""So few steps that the generator needs a large rate to prune at all."""
PROMPTS = torch.tensor([[5, 9, 12, 30, 7, 22], [20, 3, 41, 8, 17, 2]])
CHANNELS, GROUPS, LAYERS = 32, 2, 2


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny model with more than one KV group."""
    path = tmp_path_factory.mktemp("base")
    save_model(path, num_attention_heads=4, num_key_value_heads=GROUPS)
    return str(path)


def trainer_of(program: str, model: str, folder: Path, held_out: bool = False, **keys: Any) -> Any:
    folder.mkdir(exist_ok=True)
    config = config_of(program, model, folder, **{**KEYS, **keys})
    return build(config, text_rows(config, 16), evaluation=text_rows(config, 6, seed=1) if held_out else None)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    was_training = model.training
    found: Tensor = model.eval()(PROMPTS).logits
    model.train(was_training)
    return found


def logged(trainer: Any) -> list[dict[str, float]]:
    """The lines of the log of training."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def watched(trainer: Any) -> list[dict[str, Tensor]]:
    """The masks of every step, filled while the trainer trains."""
    seen: list[dict[str, Tensor]] = []
    after_step = trainer.attachment.after_step

    def look(step: int) -> None:
        seen.append({kind: mask.clone() for kind, mask in masks_of(trainer.model).items()})
        after_step(step)

    trainer.attachment.after_step = look
    return seen


@pytest.mark.parametrize("program", ["sft", "preference"])
def test_decisions_move_are_settled_and_stay(base: str, tmp_path: Path, program: str) -> None:
    trainer = trainer_of(program, base, tmp_path)
    plain = logits(load_model(ModelSource(model=base)))
    assert torch.equal(logits(trainer.model), plain)
    seen = watched(trainer)
    trainer.train()
    assert len(seen) == STEPS
    digests = [decisions.digest(masks) for masks in seen]
    assert len(set(digests[: CONTROL + 1])) > 1 and len(set(digests[CONTROL:])) == 1
    assert all(set(mask.unique().tolist()) <= {0.0, 1.0} for masks in seen for mask in masks.values())
    assert seen[-1]["ffn"].sum(-1).tolist() == [CHANNELS / 2] * LAYERS
    assert seen[-1]["kv_groups"].sum(-1).tolist() == [GROUPS / 2] * LAYERS
    wanted = {name: decisions.equal_counts(x, {"ffn": 16, "kv_groups": 1}[name]) for name, x in generated(trainer)}
    assert decisions.digest(wanted) == trainer.attachment.settled == digests[-1]
    assert left_in_pruned(trainer.model) == 0, "the proximal step reached zero"
    with trainer.model.disable_adapter():
        assert torch.equal(logits(trainer.model), plain), "switched off, it is the unpruned model"


def generated(trainer: Any) -> Any:
    with torch.no_grad():
        return trainer.attachment.generator().items()


def test_what_is_exported_is_what_was_trained(base: str, tmp_path: Path) -> None:
    trainer = trainer_of("sft", base, tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    masked = logits(trainer.model)
    loaded = load_adapter(load_model(ModelSource(model=base)), read_adapter(str(tmp_path / "adapter")))
    assert torch.equal(logits(loaded), masked)
    found = learnt(loaded)
    exported = pruned_model(found.model, found.plan)
    torch.testing.assert_close(logits(exported), masked, rtol=0, atol=1e-4)
    assert found.cut == 0
    assert (exported.config.intermediate_size, exported.config.num_key_value_heads) == (CHANNELS // 2, GROUPS // 2)
    # What is gone is what the ratio loss counted: P(1) - P(s).
    whole = {kind: torch.ones_like(mask) for kind, mask in masks_of(trainer.model).items()}
    structures = trainer.attachment.structures
    removed = decisions.remaining_parameters(whole, structures) - decisions.remaining_parameters(
        masks_of(trainer.model), structures
    )
    dense = load_model(ModelSource(model=base))
    assert int(removed) == sum(p.numel() for p in dense.parameters()) - sum(p.numel() for p in exported.parameters())


@pytest.mark.parametrize("at", [2, 4], ids=["in the control phase", "after it"])
def test_resumed_is_uninterrupted(base: str, tmp_path: Path, at: int) -> None:
    keys = {"save_strategy": "steps", "save_steps": at}
    whole = trainer_of("sft", base, tmp_path / "whole", **keys)
    seen = watched(whole)
    whole.train()
    again = trainer_of("sft", base, tmp_path / "again", **keys)
    after = watched(again)
    again.train(resume_from_checkpoint=str(Path(whole.args.output_dir, f"checkpoint-{at}")))
    assert [decisions.digest(masks) for masks in after] == [decisions.digest(masks) for masks in seen[at:]]
    for part in ("model", "attachment"):
        states = [getattr(trainer, part) for trainer in (whole, again)]
        states = [x.state_dict() if part == "model" else x.generator.state_dict() for x in states]
        for (name, one), (_, other) in zip(states[0].items(), states[1].items(), strict=True):
            assert torch.equal(one, other), name
    # The log of a resumed run holds what came before, too.
    assert [e["loss"] for e in logged(whole)] == [e["loss"] for e in logged(again)]
    assert [e["atp/ffn_kept"] for e in logged(whole)] == [e["atp/ffn_kept"] for e in logged(again)]


def test_a_longer_run_leaves_settled_decisions_as_they_are(base: str, tmp_path: Path) -> None:
    keys = {"save_strategy": "steps", "save_steps": 3}
    short = trainer_of("sft", base, tmp_path / "short", max_steps=3, **keys)
    short.train()
    longer = trainer_of("sft", base, tmp_path / "longer", max_steps=9, **keys)
    seen = watched(longer)
    longer.train(resume_from_checkpoint=str(Path(short.args.output_dir, "checkpoint-3")))
    assert {decisions.digest(masks) for masks in seen} == {short.attachment.settled}


def test_settled_masks_that_changed_on_disk_are_refused(base: str, tmp_path: Path) -> None:
    trainer = trainer_of("sft", base, tmp_path)
    trainer.train()
    trainer.attachment.save(tmp_path)
    trainer.attachment.load(tmp_path)
    state = torch.load(tmp_path / _atp.STATE, weights_only=True)
    state["masks"]["ffn"][0] = 1 - state["masks"]["ffn"][0]
    torch.save(state, tmp_path / _atp.STATE)
    with pytest.raises(CheckpointError, match="not those that were settled"):
        trainer.attachment.load(tmp_path)
    with pytest.raises(CheckpointError, match="another parametrisation"):
        trainer.attachment.load(tmp_path / "elsewhere")


def test_the_generator_learns_apart_from_the_adapter(base: str, tmp_path: Path) -> None:
    """Of held-out rows, under soft masks, outside training mode; no gradient reaches the model."""
    trainer = trainer_of("sft", base, tmp_path, held_out=True, lora_dropout=0.5)
    attachment, asked = trainer.attachment, []
    collate, evaluate = trainer.data_collator, trainer.evaluate_objective

    def remember(rows: list[dict[str, Any]]) -> Any:
        asked.extend(row["input_ids"] for row in rows)
        return collate(rows)

    def look(model: nn.Module, inputs: Any) -> Any:
        assert not any(module.training for module in model.modules())
        variant = model.get_base_model().model.layers[0].mlp.up_proj.lora_variant["default"]
        assert variant.soft.requires_grad and not set(variant.soft.tolist()) <= {0.0, 1.0}
        return evaluate(model, inputs)

    trainer.data_collator, trainer.evaluate_objective = remember, look
    trainer.model.train()
    state = torch.get_rng_state()
    before = {name: value.clone() for name, value in attachment.generator.state_dict().items()}
    attachment.before_step(0, STEPS)
    held_out = [row["input_ids"] for row in trainer.eval_dataset]
    assert len(asked) == trainer.args.per_device_train_batch_size and all(row in held_out for row in asked)
    assert trainer.model.training
    assert torch.equal(torch.get_rng_state(), state), "rows and dropout of the run stay as they would be"
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert any(not torch.equal(value, before[name]) for name, value in attachment.generator.state_dict().items())
    first = {kind: mask.clone() for kind, mask in masks_of(trainer.model).items()}
    again = trainer_of("sft", base, tmp_path, held_out=True).attachment
    again.before_step(0, STEPS)
    assert decisions.digest(first) == decisions.digest(masks_of(again.trainer.model))


def test_the_proximal_step_shrinks_what_is_pruned_and_nothing_else(base: str, tmp_path: Path) -> None:
    """By t = beta lr ratio each time, and to zero after ceil(n / t) steps, n the norm over all factors of a channel."""
    trainer = trainer_of("sft", base, tmp_path, atp_kv_groups=0.0, atp_penalty_strength=5.0)
    trainer.create_optimizer()
    attachment, total = trainer.attachment, 10
    mlps = [layer.mlp for layer in trainer.model.get_base_model().model.layers]
    torch.manual_seed(0)
    for mlp in mlps:
        for name in ("gate_proj", "up_proj"):
            nn.init.normal_(mlp.get_submodule(name).lora_B["default"].weight, std=0.02)
    mask = torch.ones(LAYERS, CHANNELS)
    mask[0, :3] = mask[1, 4:9] = 0
    set_masks(trainer.model, {"ffn": mask})
    attachment.total = total

    def norms() -> list[list[float]]:
        """Joint norm of every channel, over plain numbers."""
        found = []
        for mlp in mlps:
            gate, up = (mlp.get_submodule(f"{n}_proj").lora_B["default"].weight.tolist() for n in ("gate", "up"))
            down = mlp.down_proj.lora_A["default"].weight.T.tolist()
            found.append([math.sqrt(sum(w * w for w in g + u + d)) for g, u, d in zip(gate, up, down, strict=True)])
        return found

    start, kept = norms(), {n: p.clone() for n, p in trainer.model.named_parameters()}
    step = 4
    beta = 5.0 * (math.exp((step + 1) / total) - 1) / (math.e - 1)
    t = [beta * 1e-2 * pruned / 8 for pruned in (3, 5)]
    most = max(
        math.ceil(start[layer][j] / t[layer]) for layer in range(2) for j in range(CHANNELS) if not mask[layer, j]
    )
    for count in range(1, most + 1):
        attachment.after_step(step)
        for layer, row in enumerate(norms()):
            for channel, norm in enumerate(row):
                expected = start[layer][channel] - (0 if mask[layer, channel] else count * t[layer])
                assert norm == pytest.approx(max(expected, 0), abs=1e-5)
                if not mask[layer, channel]:
                    assert (norm == 0) == (count >= math.ceil(start[layer][channel] / t[layer]))
    assert most > 2 and left_in_pruned(trainer.model) == 0
    now = dict(trainer.model.named_parameters())
    for layer in range(LAYERS):
        rows = mask[layer] == 1
        for name in ("gate_proj.lora_B", "up_proj.lora_B", "down_proj.lora_A"):
            full = f"base_model.model.model.layers.{layer}.mlp.{name}.default.weight"
            one, other = now[full], kept[full]
            assert (
                torch.equal(one[rows], other[rows]) if "lora_B" in name else torch.equal(one[:, rows], other[:, rows])
            )


def test_the_group_lasso_of_version_one_is_a_term_of_the_loss(base: str, tmp_path: Path) -> None:
    keys = {"atp_penalty": "group_lasso", "atp_penalty_strength": 0.25, "atp_ffn": 0.0}
    trainer = trainer_of("sft", base, tmp_path, **keys)
    set_masks(trainer.model, {"kv_groups": torch.tensor([[0.0, 1.0], [1.0, 0.0]])})
    (term,) = trainer.attachment.terms().values()
    expected = 0.0
    for layer, group in ((0, 0), (1, 1)):
        attention = trainer.model.get_base_model().model.layers[layer].self_attn
        for name, lines in (("q", 32), ("k", 16), ("v", 16)):
            rows = attention.get_submodule(f"{name}_proj").lora_B["default"].weight[group * lines : (group + 1) * lines]
            expected += float(rows.square().sum()) ** 0.5
        columns = attention.o_proj.lora_A["default"].weight[:, group * 32 : (group + 1) * 32]
        expected += float(columns.square().sum()) ** 0.5
    assert term.item() == pytest.approx(0.25 * expected / LAYERS, rel=1e-5)
    (gradient,) = torch.autograd.grad(
        term, trainer.model.get_base_model().model.layers[0].self_attn.q_proj.lora_B["default"].weight
    )
    assert gradient.isfinite().all()
    trainer.train()
    assert all(entry["loss/atp_group_lasso"] >= 0 for entry in logged(trainer))
    assert logged(trainer)[-1]["loss/atp_group_lasso"] > 0


def test_what_is_logged(base: str, tmp_path: Path) -> None:
    trainer = trainer_of("sft", base, tmp_path)
    trainer.train()
    entries = logged(trainer)
    moving = {"atp/calibration_loss", "atp/ratio_loss", "atp/churn"}
    for step, entry in enumerate(entries):
        assert {f"atp/{kind}_kept{end}" for kind in ("ffn", "kv_groups") for end in ("", "_least", "_most")} <= set(
            entry
        )
        assert (moving <= set(entry)) == (step < CONTROL)
        assert entry["atp/ffn_kept_least"] <= entry["atp/ffn_kept"] <= entry["atp/ffn_kept_most"]
    assert entries[-1]["atp/ffn_kept"] == CHANNELS / 2 and entries[-1]["atp/pruned_norms"] == 0


def test_gradient_checkpointing_changes_nothing(base: str, tmp_path: Path) -> None:
    found = []
    for on in (False, True):
        trainer = trainer_of("sft", base, tmp_path / str(on), max_steps=4, gradient_checkpointing=on)
        trainer.train()
        found.append([(e["loss"], e["grad_norm"], e["atp/calibration_loss"]) for e in logged(trainer)[:2]])
    assert found[0] == found[1]


@pytest.mark.parametrize("rule", ["glad", "sam"])
def test_a_gradient_rule_and_a_packed_go_with_it(base: str, tmp_path: Path, rule: str) -> None:
    chosen = chosen_rule(rule, load_rule(rule).options())
    found = {}
    for layout in ("padded", "packed"):
        folder = tmp_path / layout
        folder.mkdir()
        keys = {**KEYS, "method": "flex_dpo", "gradient_rule": rule, "layout": layout, "max_steps": 4}
        config = config_of("preference", base, folder, **keys)
        trainer = build(config, text_rows(config, 16), rule=chosen)
        trainer.train()
        assert masks_of(trainer.model)["ffn"].sum(-1).tolist() == [CHANNELS / 2] * LAYERS
        found[layout] = [(e["loss"], e["grad_norm"], e["atp/calibration_loss"]) for e in logged(trainer)[:2]]
    assert found["padded"] == [pytest.approx(each, rel=1e-3) for each in found["packed"]]


def test_a_quantised_base_is_pruned_as_it_trains(base: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    trainer = trainer_of("sft", base, tmp_path, quantization="nf4", max_steps=4)
    trainer.train()
    assert masks_of(trainer.model)["ffn"].sum(-1).tolist() == [CHANNELS / 2] * LAYERS
    assert left_in_pruned(trainer.model) == 0
    hidden = torch.randn(3, CHANNELS)
    mlp, pruned = trainer.model.get_base_model().model.layers[0].mlp, masks_of(trainer.model)["ffn"][0] == 0
    assert (mlp.up_proj.eval()(hidden)[:, pruned] == 0).all() and (mlp.up_proj.train()(hidden)[:, pruned] == 0).all()


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"atp_kv_groups": 0.01}, "would remove none of the 2 in a layer. Write atp_kv_groups: 0.5, or 0"),
        ({"atp_ffn": 0.99}, "would remove all of the 32 in a layer. Write atp_ffn: 0.9688, or 0"),
        ({"lora_target_modules": ["q_proj", "k_proj", "v_proj", "gate_proj"]}, "leaves out model.layers.0.mlp.up_proj"),
        ({"lora_target_modules": r".*layers\.0\..*_proj"}, "leaves out model.layers.1.mlp.gate_proj"),
    ],
)
def test_what_the_model_cannot_have_is_refused(base: str, tmp_path: Path, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        trainer_of("sft", base, tmp_path, **keys)


def test_targets_of_what_goes_are_enough(base: str, tmp_path: Path) -> None:
    """Without factors on the readers, these have no part in the proximal step."""
    names = ["q_proj", "k_proj", "v_proj"]
    trainer = trainer_of("sft", base, tmp_path, lora_target_modules=names, atp_ffn=0.0)
    trainer.train()
    assert list(masks_of(trainer.model)) == ["kv_groups"] and left_in_pruned(trainer.model) == 0


def test_models_and_launches_without_a_way_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("sft", "m", tmp_path, **KEYS)
    shape = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    other = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_neox", intermediate_size=32, **shape))
    with pytest.raises(ModelError, match="gpt_neox.*LayerNorm"):
        _atp.prepare(config, other)
    single = {**shape, "num_key_value_heads": 1, "intermediate_size": 32}
    with pytest.raises(ModelError, match="which are all one. Write atp_kv_groups: 0"):
        _atp.prepare(config, AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **single)))
    monkeypatch.setattr(_atp, "launched_with_fsdp", lambda: True)
    with pytest.raises(ConfigError, match="under FSDP.*Launch with DDP or ZeRO-2"):
        _atp.check(config)
    monkeypatch.setattr(_atp, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ConfigError, match="under ZeRO-3.*Launch with DDP or ZeRO-2"):
        _atp.prepare(config, other)


def test_streams_give_no_rows_to_learn_decisions_on() -> None:
    from types import SimpleNamespace

    rows = [{"input_ids": [1]}]
    assert _atp._calibration_rows(SimpleNamespace(eval_dataset=None, train_dataset=rows)) is rows
    assert _atp._calibration_rows(SimpleNamespace(eval_dataset={"a": rows}, train_dataset=iter(rows))) is rows
    with pytest.raises(ConfigError, match="a stream cannot give. Add eval_data"):
        _atp._calibration_rows(SimpleNamespace(eval_dataset=None, train_dataset=iter(rows)))


def test_its_configuration_is_that_of_lora_and_more(base: str, tmp_path: Path) -> None:
    config = config_of("sft", base, tmp_path, **KEYS, lora_r=3, lora_alpha=5, use_rslora=True)
    found = _atp.prepare(config, load_model(ModelSource(model=base)))
    plain = LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=5, use_rslora=True, target_modules="all-linear")
    for name, value in plain.to_dict().items():
        if name != "peft_type":
            assert found.to_dict()[name] == value, name
    assert (found.atp_sizes, found.atp_kept) == ({"ffn": 32, "kv_groups": 2}, {"ffn": 16, "kv_groups": 1})
