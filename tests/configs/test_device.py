"""What needs an accelerator is refused where there is none, before a model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from transformers import TrainingArguments

from alignkit import PreferenceConfig
from alignkit.errors import ConfigError
from alignkit.runs.arguments import check_device

REFUSED = {
    "float16": ({"fp16": True}, ["fp16: true"]),
    "DoRA on int8": ({"use_dora": True, "quantization": "int8"}, ["use_dora: true", "quantization: int8"]),
    "both": ({"fp16": True, "use_dora": True, "quantization": "int8"}, ["fp16: true", "quantization: int8"]),
    "DoRA on nf4": ({"use_dora": True, "quantization": "nf4"}, []),
    "DoRA": ({"use_dora": True}, []),
    "LoRA on int8": ({"quantization": "int8"}, []),
}


@pytest.mark.parametrize("use_dora", [True, False])
def test_a_saved_adapter_with_dora_counts_as_well(use_dora: bool, tmp_path: Path) -> None:
    LoraConfig(use_dora=use_dora, target_modules=["q_proj"]).save_pretrained(tmp_path)
    where = {"output_dir": str(tmp_path), "adapter": str(tmp_path)}
    config = PreferenceConfig(method="dpo", model="m", data="d", quantization="int8", **where)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    if not use_dora:
        check_device(config, args)
        return
    with pytest.raises(ConfigError, match=f"`adapter: {tmp_path}`, which has use_dora, with `quantization: int8`"):
        check_device(config, args)


@pytest.mark.parametrize(("options", "named"), REFUSED.values(), ids=REFUSED.keys())
def test_what_the_cpu_cannot_do_is_named(options: dict[str, Any], named: list[str], tmp_path: Path) -> None:
    """All of it in one error, with what to write instead."""
    config = PreferenceConfig(method="dpo", model="m", data="d", output_dir=str(tmp_path), **options)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    if not named:
        check_device(config, args)
        return
    with pytest.raises(ConfigError, match="training runs on the CPU") as error:
        check_device(config, args)
    text = str(error.value)
    assert all(f"`{key}`" in text for key in named)
    assert ("Write quantization: nf4 or none, or remove use_dora" in text) == ("use_dora" in options)
