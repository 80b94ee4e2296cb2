"""ATP's masks in a LoRA adapter: what a layer computes while training and outside, and that the export computes it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from alignkit.errors import ModelError
from alignkit.models._atp_layers import (
    MASKED,
    READERS,
    AtpConfig,
    factors_of,
    left_in_pruned,
    masks_of,
    set_masks,
    soft_masks_in,
)
from alignkit.models.files import read_adapter
from alignkit.models.loading import load_adapter
from alignkit.models.quantization import quantization_config
from alignkit.models.sparse_adapter import equip
from alignkit.pruning.export import pruned_model
from alignkit.pruning.learnt import learnt
from alignkit.pruning.masks import masked

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "gemma2": {"query_pre_attn_scalar": 16, "sliding_window": 64},
}
"""With biases on every masked projection, on those of attention, with norms on heads, plain, with sandwiched norms."""
SIZES = {"ffn": 12, "kv_groups": 2}
PLAN = {"ffn": ((0, 1, 2, 5, 7, 11), (3, 4, 5, 6, 8, 9)), "kv_groups": ((1,), (0,))}
PROMPTS = torch.tensor([[5, 9, 12, 30, 7, 22], [20, 3, 41, 8, 17, 2]])
GROUPS = [name for names in MASKED.values() for name in names]


def base_of(family: str, hidden: int = 32, **shape: Any) -> PreTrainedModel:
    """A tiny model of a family with random weights, biases too."""
    torch.manual_seed(0)
    usual = {
        "vocab_size": 48,
        "hidden_size": hidden,
        "intermediate_size": SIZES["ffn"],
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": SIZES["kv_groups"],
        "head_dim": 16,
        "initializer_range": 0.2,
        "pad_token_id": 0,
    }
    config = AutoConfig.for_model(family, **(usual | FAMILIES[family] | shape))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model.eval()


def settings(cls: type = AtpConfig, **more: Any) -> Any:
    return cls(task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules="all-linear", **more)


def adapted(base: PreTrainedModel, sizes: dict[str, int] = SIZES) -> PeftModel:
    """With an adapter of ATP, its factors far from zero."""
    kept = {kind: size // 2 for kind, size in sizes.items()}
    model = get_peft_model(base, settings(atp_layers=2, atp_sizes=sizes, atp_kept=kept))
    equip(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return model.eval()


def put(model: PeftModel, plan: dict[str, Any]) -> None:
    """Put the masks of a plan in force."""
    masks = {kind: torch.zeros(len(kept), SIZES[kind]) for kind, kept in plan.items()}
    for kind, kept in plan.items():
        for row, indices in zip(masks[kind], kept, strict=True):
            row[list(indices)] = 1
    set_masks(model, masks)


def cut_off(model: PeftModel) -> None:
    """Do what training does to LoRA weights of pruned structures, by the names of modules and ranges of rows."""
    layers = model.get_base_model().model.layers
    for layer, kept in enumerate(PLAN["ffn"]):
        for channel in set(range(SIZES["ffn"])) - set(kept):
            for name in MASKED["ffn"]:
                layers[layer].get_submodule(name).lora_B["default"].weight.data[channel] = 0
            layers[layer].mlp.down_proj.lora_A["default"].weight.data[:, channel] = 0
    for layer, kept in enumerate(PLAN["kv_groups"]):
        for group in set(range(SIZES["kv_groups"])) - set(kept):
            attention = layers[layer].self_attn
            for name, lines in (("q_proj", 32), ("k_proj", 16), ("v_proj", 16)):
                rows = slice(group * lines, (group + 1) * lines)
                attention.get_submodule(name).lora_B["default"].weight.data[rows] = 0
            attention.o_proj.lora_A["default"].weight.data[:, group * 32 : (group + 1) * 32] = 0


@torch.no_grad()
def logits(model: nn.Module, training: bool = False) -> Tensor:
    found: Tensor = model.train(training)(PROMPTS).logits
    model.eval()
    return found


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_without_masks_it_is_lora(training: bool) -> None:
    """To the last bit, forward and backward."""
    found = []
    for config in (settings(LoraConfig), settings(atp_layers=2, atp_sizes=SIZES, atp_kept=SIZES)):
        torch.manual_seed(2)
        model = get_peft_model(base_of("qwen2"), config)
        equip(model)
        torch.manual_seed(3)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.2)
        output = model.train(training)(input_ids=PROMPTS, labels=PROMPTS)
        output.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        found.append({"logits": output.logits.detach(), **gradients})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@pytest.mark.parametrize("kind", ["none", "nf4", "int8"])
def test_training_differs_by_the_update_of_what_is_pruned(kind: str, tmp_path: Path) -> None:
    """Layer by layer: train - eval = (1 - s) * c B A x, and outside training nothing comes out of a pruned row."""
    base = base_of("llama", hidden=64, intermediate_size=SIZES["ffn"] if kind == "none" else 64)
    if kind != "none":
        pytest.importorskip("bitsandbytes")
        base.save_pretrained(tmp_path)
        how = quantization_config(kind, torch.float32)
        base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=how, device_map={"": "cpu"})
    size = base.config.intermediate_size
    model = adapted(base, {"ffn": size, "kv_groups": 2})
    masks = {"ffn": (torch.arange(size) % 3 > 0).float().expand(2, size), "kv_groups": torch.eye(2)}
    set_masks(model, masks)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(5))
    rows = {"ffn": lambda layer: masks["ffn"][layer], "kv_groups": lambda layer: masks["kv_groups"][layer]}
    for kind_of, names in MASKED.items():
        for layer in range(2):
            for name in names:
                module = model.get_base_model().get_submodule(f"model.layers.{layer}.{name}")
                mask = rows[kind_of](layer).repeat_interleave(module.out_features // len(rows[kind_of](layer)))
                with torch.no_grad():
                    training, evaluation = module.train()(x), module.eval()(x)
                    update = module.lora_B["default"](module.lora_A["default"](x)) * (6 / 4)
                assert (evaluation[:, mask == 0] == 0).all()
                assert torch.equal(training[:, mask == 0], update[:, mask == 0])
                # The kernels of a quantised layer round otherwise while training.
                difference = (training - evaluation)[:, mask == 1]
                assert (difference == 0).all() if kind == "none" else difference.abs().max() < 0.05
                assert update.abs().min(dim=0).values.max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_the_export_computes_what_the_masked_adapter_does(family: str) -> None:
    model = adapted(base_of(family))
    whole = logits(model)
    put(model, PLAN)
    expected = logits(model)
    assert (whole - expected).abs().max() > 0.1
    assert (logits(model, training=True) - expected).abs().max() > 1e-3, "the adapter's share of what goes is there yet"
    assert left_in_pruned(model) > 1
    before = sum(p.numel() for name, p in model.get_base_model().named_parameters() if "lora_" not in name)
    found = learnt(copy.deepcopy(model))
    assert found.plan.ffn == PLAN["ffn"] and found.plan.kv_groups == PLAN["kv_groups"]
    assert found.cut == left_in_pruned(model)
    with masked(found.model, found.plan):
        torch.testing.assert_close(logits(found.model), expected, rtol=0, atol=1e-4)
    exported = pruned_model(found.model, found.plan)
    torch.testing.assert_close(logits(exported), expected, rtol=0, atol=1e-4)

    cut_off(model)
    assert left_in_pruned(model) == 0
    torch.testing.assert_close(logits(model, training=True), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    left = sum(p.numel() for p in exported.parameters())
    # Each of 6 channels: 3 lines of 32; the one group: 2 * 32 + 2 * 16 rows or columns of 32; in both layers.
    biases = {"llama": 6 * 2 + 2 * 16 + 2 * 16, "qwen2": 2 * 16 + 2 * 16}.get(family, 0)
    assert before - left == 2 * (6 * 3 * 32 + 96 * 32 + biases)


def test_a_merge_gives_the_masked_model_and_can_be_taken_back() -> None:
    model = adapted(base_of("qwen2"))
    put(model, PLAN)
    expected, state = logits(model), copy.deepcopy(model.state_dict())
    model.merge_adapter()
    torch.testing.assert_close(logits(model.get_base_model()), expected, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=1e-5)
    merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)


def test_a_saved_adapter_brings_its_masks_and_plain_peft_refuses_it(tmp_path: Path) -> None:
    base = base_of("qwen3")
    model = adapted(copy.deepcopy(base))
    put(model, PLAN)
    model.save_pretrained(tmp_path)
    loaded = load_adapter(copy.deepcopy(base), read_adapter(tmp_path))
    assert torch.equal(logits(loaded), logits(model))
    assert all(torch.equal(mask, masks_of(model)[kind]) for kind, mask in masks_of(loaded).items())
    with pytest.raises((KeyError, ValueError), match="ALIGNKIT_ATP"):
        PeftModel.from_pretrained(base, str(tmp_path))


def test_decisions_that_are_not_settled_are_not_exported() -> None:
    model = adapted(base_of("qwen3"))
    put(model, {**PLAN, "ffn": (PLAN["ffn"][0], (0, 1))})
    with pytest.raises(ModelError, match="not settled.*control phase"):
        learnt(model)


def test_soft_masks_act_outside_training_and_are_gone_afterwards() -> None:
    """Their gradient is that of the logits, by finite differences; norms compute in float32."""
    model = adapted(base_of("qwen2").double()).double()
    put(model, PLAN)
    before = logits(model)
    soft = {
        kind: torch.rand(2, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size)).requires_grad_()
        for kind, size in SIZES.items()
    }

    def value(masks: dict[str, Tensor]) -> Tensor:
        with soft_masks_in(model, masks):
            return model(PROMPTS).logits.square().mean()

    gradients = dict(zip(soft, torch.autograd.grad(value(soft), list(soft.values())), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    for kind, place in (("ffn", (1, 4)), ("kv_groups", (0, 1))):
        ends = []
        for sign in (1, -1):
            moved = {name: mask.detach().clone() for name, mask in soft.items()}
            moved[kind][place] += sign * 1e-2
            ends.append(float(value(moved).detach()))
        assert float(gradients[kind][place]) == pytest.approx((ends[0] - ends[1]) / 2e-2, rel=2e-2)
    hard = {kind: mask.detach() for kind, mask in masks_of(model).items()}
    with torch.no_grad(), soft_masks_in(model, hard):
        torch.testing.assert_close(model(PROMPTS).logits, before)
    assert torch.equal(logits(model), before)


def test_factors_are_the_lines_that_belong_to_a_structure() -> None:
    model = adapted(base_of("llama"))
    factors = factors_of(model)
    assert {kind: [len(layer) for layer in layers] for kind, layers in factors.items()} == {
        "ffn": [3, 3],
        "kv_groups": [4, 4],
    }
    for kind, name, lines in (("kv_groups", "self_attn.q_proj", 32), ("ffn", "mlp.up_proj", 1)):
        factor = factors[kind][1][MASKED[kind].index(name)]
        weight = model.get_base_model().get_submodule(f"model.layers.1.{name}").lora_B["default"].weight
        expected = [weight[i * lines : (i + 1) * lines].norm() ** 2 for i in range(SIZES[kind])]
        torch.testing.assert_close(factor.squares(weight), torch.stack(expected))
    for kind, lines in (("kv_groups", 32), ("ffn", 1)):
        weight = model.get_base_model().get_submodule(f"model.layers.0.{READERS[kind]}").lora_A["default"].weight
        expected = [weight[:, i * lines : (i + 1) * lines].norm() ** 2 for i in range(SIZES[kind])]
        torch.testing.assert_close(factors[kind][0][-1].squares(weight), torch.stack(expected))
        scaled = factors[kind][0][-1].scaled(weight, torch.arange(SIZES[kind]).float())
        assert torch.equal(scaled[:, lines : 2 * lines], weight[:, lines : 2 * lines])
        assert (scaled[:, :lines] == 0).all()
