"""Every kind of adapter that ``parametrization: peft`` takes: what trains, resumes, merges and can be packed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftModel
from transformers import AutoModelForCausalLM

from alignkit.data.prefix import CandidateCollator
from alignkit.errors import ConfigError
from alignkit.models._forward import completion_forward
from alignkit.parametrizations._peft import adapter_config, check
from alignkit.parametrizations.peft import KINDS, REFUSED, UNMERGEABLE
from alignkit.parts.method import load_method
from alignkit.shapes._candidates import BridgeSettings, PreferenceTrainer
from tests.trainers import dpo_arguments

OPTIONS: dict[str, dict[str, Any]] = {
    "beft": {"target_modules": ["v_proj"]},
    "c3a": {"block_size": 8},
    "delora": {"r": 4},
    "fourierft": {"n_frequency": 16},
    "gralora": {"r": 4, "gralora_k": 2},
    "hira": {"r": 4},
    "lily": {"r": 4},
    "ln_tuning": {"target_modules": ["input_layernorm", "q_norm"]},
    "miss": {"r": 4},
    "oft": {"oft_block_size": 8},
    "peanut": {"r": 4},
    "psoft": {"r": 4, "psoft_alpha": 4},
    "randlora": {"r": 8},
    "road": {"group_size": 8},
    "shira": {"r": 2},
    "vera": {"r": 8},
    "waveft": {"n_frequency": 16},
}
"""Options that make a kind fit a model of width 32, or that it cannot do without."""

ALWAYS = ("ia3", "oft", "vera")
"""Kinds tried in every run of the suite; all of them together take minutes."""


def config(kind: str) -> Any:
    return SimpleNamespace(peft_type=kind, peft_options=OPTIONS.get(kind))


def base(path: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(input_ids=torch.arange(5, 14)[None]).logits
    return result


@torch.no_grad()
def scores(model: Any, layout: Any, some_rows: list[dict[str, Any]]) -> torch.Tensor:
    inputs = CandidateCollator(0, layout)(some_rows)
    token_logps: torch.Tensor = completion_forward(model, inputs).token_logps
    return token_logps[inputs["completion_mask"]]


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in ALWAYS else pytest.mark.slow) for kind in KINDS]
)
def test_a_kind_does_what_the_table_says(
    kind: str, tmp_path: Path, model_path: str, tokenizer: Any, rows: Dataset
) -> None:
    def trainer() -> PreferenceTrainer:
        method = load_method("dpo")
        return PreferenceTrainer(
            base(model_path),
            dpo_arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1),
            method=method,
            options=method.options(),
            settings=BridgeSettings(layout="packed"),
            processing_class=tokenizer,
            train_dataset=rows,
            peft_config=adapter_config(config(kind)),
        )

    trained = trainer()
    # Kinds that take weights apart give them back but for rounding.
    torch.testing.assert_close(logits(trained.model.eval()), logits(base(model_path)), atol=1e-5, rtol=1e-5)
    start = {name: parameter.detach().clone() for name, parameter in trained.model.named_parameters()}
    trained.train()
    end = dict(trained.model.named_parameters())

    trains = {name for name, parameter in end.items() if parameter.requires_grad}
    assert {name for name in end if not torch.equal(end[name], start[name])} == trains != set()

    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, end[name]), name

    model = trained.model.eval()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base(model_path)))
    assert not torch.equal(logits(model), logits(base(model_path)))

    padded, packed = (scores(model, layout, [dict(row) for row in rows]) for layout in ("padded", "packed"))
    torch.testing.assert_close(packed, padded, atol=2e-5, rtol=1e-5)

    loaded = PeftModel.from_pretrained(base(model_path), str(tmp_path / "checkpoint-2")).eval()
    assert torch.equal(logits(loaded), logits(model))
    if kind in UNMERGEABLE:
        with pytest.raises((NotImplementedError, ValueError)):
            loaded.merge_and_unload(safe_merge=True)
    else:
        torch.testing.assert_close(
            logits(loaded.merge_and_unload(safe_merge=True)), logits(model), atol=1e-5, rtol=1e-5
        )


def test_every_kind_that_peft_has_is_taken_or_refused_with_a_reason() -> None:
    refused = [kind for _, _, kinds in REFUSED.values() for kind in kinds]
    assert sorted([*KINDS, *refused]) == sorted(kind.lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"feedforward_module": []}, "feedforward_module is not an option of peft_type ia3. Did you mean feedforward"),
        ({"init_ia3_weights": "yes"}, "init_ia3_weights is 'yes', expected bool"),
        ({"target_modules": [1]}, "target_modules is [1], expected"),
        ({"task_type": "CAUSAL_LM"}, "task_type is settled by the run. Remove it"),
        ({"target_modules": ["q_proj"], "feedforward_modules": ["up_proj"]}, "PEFT refuses them: `feedforward_mod"),
    ],
)  # fmt: skip
def test_options_are_compared_with_pefts_own(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check(SimpleNamespace(peft_type="ia3", peft_options=options))
    assert told in str(refused.value)


def test_options_that_peft_has_pass() -> None:
    check(SimpleNamespace(peft_type="ia3", peft_options={"target_modules": ["q_proj"], "feedforward_modules": []}))
    check(SimpleNamespace(peft_type="vera", peft_options={"r": 8, "vera_dropout": 0, "layers_to_transform": [0]}))
