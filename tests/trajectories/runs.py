"""The runs whose trajectories are recorded, as a user writes them: YAML keys, data files and saved models alone.

Nothing here knows how alignkit is built inside but what its methods are called, so that the same runs are made before
and after a refactor of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from alignkit.parts.method import load_method, method_names
from tests.programs.conftest import pairs, save_model, write_rows

BASE: Mapping[str, Any] = {
    "model": "model",
    "data": "pairs.jsonl",
    "max_length": 64,
    "use_cpu": True,
    "max_steps": 4,
    "save_steps": 2,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "learning_rate": 1.0e-3,
    "num_samples": 0,
}
LORA, FULL = {"parametrization": "lora"}, {"parametrization": "full"}
DPO = {"method": "dpo"}
ADPO = {"method": "adpo", "data": "lists.jsonl"}
EMA = {**ADPO, "anchor": "ema", "anchor_decay": 0.5}
D2O = {
    "method": "d2o", "data": "negatives.jsonl", "num_samples_per_prompt": 2, "sampling_max_new_tokens": 6
}  # fmt: skip
OBJECTIVES: dict[str, Mapping[str, Any]] = {
    "dpo": DPO,
    "flex_dpo": {"method": "flex_dpo", "eta": 0.1},
    "treg": {"method": "treg", "contrast_prompts": "contrast.yaml"},
    "adpo": ADPO,
    "adpo_ema": EMA,
    "adpo_kl_triggered": {**ADPO, "anchor": "kl_triggered", "anchor_threshold": 1.0e-4, "anchor_window": 2},
    "d2o": D2O,
    "sft": {"method": "sft", "data": "completions.jsonl"},
    "distill": {"method": "distill", "data": "completions.jsonl", "teacher": "wide"},
    "sft_packed": {"method": "sft", "data": "texts.jsonl", "packing": True},
}
NAMED = {options["method"] for options in OBJECTIVES.values()}
OBJECTIVES = OBJECTIVES | {name: {"method": name, "data": "any.jsonl"} for name in method_names() if name not in NAMED}
"""A method that is not named here joins with its defaults, on rows that have every usual column."""
RUNS: Mapping[str, Mapping[str, Any]] = {
    **{f"{name}-lora": {**options, **LORA} for name, options in OBJECTIVES.items()},
    **{f"{name}-full": {**options, **FULL} for name, options in OBJECTIVES.items()},
    "glad": {**DPO, **LORA, "gradient_rule": "glad"},
    "sam": {**DPO, **FULL, "gradient_rule": "sam"},
    "decay_to_init": {**DPO, **FULL, "gradient_rule": "decay_to_init", "decay_coef": 10.0},
    "sft-decay_to_init": {"method": "sft", "data": "completions.jsonl", **LORA, "gradient_rule": "decay_to_init"},
    "qlora": {"method": "flex_dpo", "model": "wide", **LORA, "quantization": "nf4"},
    "padded": {**DPO, **FULL, "layout": "padded"},
    "packed": {**ADPO, **FULL, "layout": "packed"},
    "accumulation": {**DPO, **LORA, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
    "precomputed": {**DPO, **FULL, "reference": "precomputed"},
    "refreshed": {**D2O, **LORA, "sample_refresh_steps": 2},
    "continued": {**DPO, **LORA, "adapter": "dpo-lora"},
    "watched": {
        **DPO,
        **LORA,
        "lora_dropout": 0.2,
        "disable_dropout": False,
        "eval_fraction": 0.2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "probe_rows": 4,
        "probe_steps": 2,
        "num_samples": 1,
        "sample_max_new_tokens": 4,
    },
}
"""Configs by name, each on top of :data:`BASE`; ``continued`` starts from what the first one saved."""

ZERO2: Mapping[str, Mapping[str, Any]] = {"zero2": {**EMA, **LORA}}
"""Configs of runs of two processes under DeepSpeed."""


def write_inputs(place: Path) -> None:
    """Models and data files of all runs, the same in every recording."""
    save_model(place / "model")
    save_model(
        place / "wide", hidden=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2
    )  # bitsandbytes computes in multiples of 64
    rows, others = pairs(20), pairs(20, seed=1)
    write_rows(place / "pairs.jsonl", rows)
    lists = [
        {
            "prompt": row["prompt"],
            "completions": [row["rejected"], row["chosen"], other["chosen"]][: 2 + number % 2],
            "scores": [0.3, 1.0, 0.1][: 2 + number % 2],
        }
        for number, (row, other) in enumerate(zip(rows, others, strict=True))
    ]
    write_rows(place / "lists.jsonl", lists)
    write_rows(place / "negatives.jsonl", [{key: row[key] for key in ("prompt", "rejected")} for row in rows])
    write_rows(place / "completions.jsonl", [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows])
    write_rows(place / "any.jsonl", [{**row, "completion": row["chosen"]} for row in rows])
    write_rows(place / "texts.jsonl", [{"text": row["prompt"] + row["chosen"]} for row in [*rows, *others]])
    (place / "contrast.yaml").write_text(yaml.safe_dump(contrast_prompts()))


def contrast_prompts() -> dict[str, Any]:
    """Contrast prompts in words that the tiny tokenizer knows."""
    return {
        "version": 1,
        "with_response": {"better": "w1 {prompt} w2 {response}", "worse": "w3 {prompt} w4 w5 {response}"},
        "without_response": {"better": "w1 {prompt} w2", "worse": "w3 {prompt} w4 w5"},
        "plain_text_ending": " w6 ",
    }


def config_of(name: str) -> dict[str, Any]:
    """The whole config of a run; it is written to a folder of its name."""
    return {**BASE, **{**RUNS, **ZERO2}[name], "output_dir": name}


def program_of(config: Mapping[str, Any]) -> str:
    """Which program makes a run."""
    return load_method(config["method"]).program
