"""What ``all-linear`` covers in families with routers and state-space layers, and how its parameters are counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from alignkit.errors import ModelError
from alignkit.models.quantization import quantization_config
from alignkit.parametrizations._policy import prepare
from alignkit.parametrizations._trainable import trainable_report
from alignkit.shapes.tokens import SupervisedConfig

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 1}
SCAN = {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8, "chunk_size": 16}
HYBRID = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
NEMOTRON = {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 16}
FAMILIES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "mamba": ({"state_size": 4}, {"conv1d", "dt_proj", "out_proj", "x_proj"}),
    "mamba2": (SCAN, {"conv1d", "out_proj"}),
    "falcon_h1": (HYBRID | {"mamba_chunk_size": 16}, {"conv1d", "out_proj"}),
    "nemotron_h": (NEMOTRON | {"num_hidden_layers": 4, "hybrid_override_pattern": "M*M-"}, {"conv1d", "out_proj"}),
    "phimoe": (EXPERTS | {"num_experts_per_tok": 2}, {"router"}),
    "llama4_text": (EXPERTS | {"intermediate_size_mlp": 48, "attention_chunk_size": 64}, {"router"}),
}


def build(family: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(SHAPE | changes)))


def config(**changes: Any) -> SupervisedConfig:
    return SupervisedConfig(model="m", data="d", method="sft", output_dir="o", lora_r=4, **changes)


@pytest.mark.parametrize(("family", "changes", "left_out"), [(name, *rest) for name, rest in FAMILIES.items()])
def test_all_linear_covers_what_can_be_adapted(
    family: str, changes: dict[str, Any], left_out: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Every factor has a gradient; what is left out is named; asked for by name it is refused."""
    model = build(family, **changes)
    adapter = prepare(config(), model)
    said = capsys.readouterr().out
    assert set(adapter.exclude_modules) == left_out and ", ".join(sorted(left_out)) in said
    wrapped = get_peft_model(model, adapter)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    wrapped(input_ids=ids, labels=ids).loss.backward()
    trained = {name: parameter for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert trained and all(parameter.grad is not None for parameter in trained.values())
    assert not any(part in left_out for name in trained for part in name.split("."))
    name = sorted(left_out)[-1]
    with pytest.raises(ModelError, match=f"lora_target_modules asks for {name}, which .* names among") as error:
        prepare(config(lora_target_modules=[name]), build(family, **changes))
    assert name not in str(error.value).split("names among")[1]


def test_routers_that_train_are_said_and_counted() -> None:
    """Rank 4 on a router from 32 features to 4 experts, twice: 2 * 4 * (32 + 4) numbers."""
    model = build("mixtral", **EXPERTS)
    report = trainable_report(get_peft_model(model, prepare(config(), model)))
    attention = 2 * 4 * ((32 + 32) + (32 + 16) + (32 + 16) + (32 + 32))
    assert report.by_block["router"] == 2 * 4 * (32 + 4) and report.by_block["attention"] == attention
    assert sum(report.by_block.values()) == report.trainable
    assert "routers, which choose the experts, are among them" in str(report)
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = build("mixtral", **EXPERTS)
    listed = trainable_report(get_peft_model(model, prepare(config(lora_target_modules=names), model)))
    assert listed.by_block == {"attention": attention} and "routers" not in str(listed)


def test_packed_weights_count_in_full(tmp_path: Any) -> None:
    """Two 4-bit weights lie in a byte; the share that trains is that of the model, not of its packing."""
    pytest.importorskip("bitsandbytes")
    build("llama", hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    packed = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantization_config("nf4", torch.float32), device_map={"": "cpu"}
    )
    assert sum(p.numel() for p in packed.parameters()) < sum(p.numel() for p in plain.parameters())
    reports = [trainable_report(get_peft_model(model, prepare(config(), model))) for model in (plain, packed)]
    assert reports[0] == reports[1]
