"""QLoRA on real bitsandbytes layers: nf4 and int8 bases, references by disabled adapter and precomputed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, Qwen3Config

from alignkit.callbacks.probe import DispersionProbe
from alignkit.methods._preference import BridgeSettings
from alignkit.parametrizations.loading import ModelSource, load_model
from tests.methods.conftest import VOCABULARY, logged

pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Width 64: the CPU kernels of bitsandbytes need multiples of 64."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.2,
        tie_word_embeddings=True,
        dtype="float32",
    )
    path = tmp_path_factory.mktemp("wide")
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("layout", ["padded", "shared_prefix"])
def test_qlora_trains_only_the_adapter(make_trainer: Any, wide_model: str, rows: Any, kind: str, layout: str) -> None:
    model = load_model(ModelSource(wide_model, quantization=kind))
    trainer = make_trainer(
        "flex_dpo",
        settings=BridgeSettings(layout=layout),
        arguments={"max_steps": 12, "learning_rate": 1e-2, "per_device_train_batch_size": 8},
        model=model,
        train_dataset=rows.select(range(8)),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"),
    )
    trainer.add_callback(DispersionProbe(trainer, rows.select(range(8, 12)), 4))
    inputs = trainer.data_collator([rows[i] for i in range(8)])
    trainer.model.train()
    before = trainer.reference_logps(inputs)
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[0] == pytest.approx(0.6931, abs=5e-3), "the policy starts as its reference"
    assert losses[-1] < 0.75 * losses[0]
    assert all("lora_" in n for n, p in trainer.model.named_parameters() if p.requires_grad)
    # bitsandbytes repacks nf4 weights on the CPU when the probe evaluates; what they compute must not change,
    # but for the rounding of its bfloat16 kernels.
    torch.testing.assert_close(trainer.reference_logps(inputs), before, atol=0.1, rtol=0)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_precomputed_reference_starts_at_log_two(make_trainer: Any, wide_model: str, tmp_path: Path, kind: str) -> None:
    """The values must be those of the training forward, not of an inference kernel with other rounding."""
    trainer = make_trainer(
        settings=BridgeSettings(reference_cache=tmp_path / "cache"),
        arguments={"precompute_ref_log_probs": True, "max_steps": 1, "learning_rate": 0.0},
        model=load_model(ModelSource(wide_model, quantization=kind)),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"),
    )
    trainer.train()
    # int8 rounds activations by what else is in the batch: a few hundredths of a nat a token.
    tolerance = 0.05 if kind == "nf4" else 0.3
    assert abs(logged(trainer, "logratio/chosen")[0]) < tolerance
    assert abs(logged(trainer, "logratio/rejected")[0]) < tolerance
