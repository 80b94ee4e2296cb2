"""Every loss of trl.DPOTrainer and every modifier, step for step: six steps on the same tokens, LoRA and in full."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import DPOTrainer

from alignkit.parts.method import load_method
from alignkit.shapes._candidates import BridgeSettings
from tests.dpo_oracles import LOSSES
from tests.trainers import dpo_arguments, flat_weights, logged

MODIFIED: Mapping[str, Mapping[str, Any]] = {
    "ld_alpha": {"ld_alpha": 0.3},
    "use_weighting": {"use_weighting": True},
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js_divergence": {"f_divergence_type": "js_divergence"},
    "alpha_divergence": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.6},
}
CASES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    **{name: (name, {}) for name in LOSSES if name != "dpo"},  # Plain dpo: test_parity.py
    **{f"dpo-{modifier}": ("dpo", keys) for modifier, keys in MODIFIED.items()},
    "aot-smoothed": ("aot", {"label_smoothing": 0.2, "ld_alpha": 0.5}),
}
Trained = Callable[[str, Mapping[str, Any], LoraConfig | None], Any]


def lora(kind: str) -> LoraConfig | None:
    return LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear") if kind == "lora" else None


@pytest.fixture(scope="module")
def pairs(rows: Dataset) -> Dataset:
    """The rows as TRL keeps them once they are tokens."""
    return rows.map(
        lambda r: {"chosen_ids": r["completion_ids"][0], "rejected_ids": r["completion_ids"][1]},
        remove_columns=["completion_ids", "scores"],
    )


@pytest.fixture
def theirs(tmp_path: Path, model_path: str, tokenizer: Any, pairs: Dataset) -> Trained:
    """A finished run of trl.DPOTrainer; it is handed tokens as they are."""
    unchanged = type("Tokenised", (DPOTrainer,), {"_prepare_dataset": lambda self, dataset, *a, **k: dataset})

    def train(loss_type: str, options: Mapping[str, Any], adapter: LoraConfig | None) -> DPOTrainer:
        trainer = unchanged(
            AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32),
            args=dpo_arguments(tmp_path / "theirs", loss_type=[loss_type], **options),
            train_dataset=pairs,
            processing_class=tokenizer,
            peft_config=adapter,
        )
        trainer.train()
        return trainer

    return train


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("case", CASES)
def test_padded_layout_is_bitwise_trl(make_trainer: Any, theirs: Trained, case: str, kind: str) -> None:
    """But the loss that is logged of what TRL sorts: it sums the same numbers in another order."""
    name, keys = CASES[case]
    options = load_method(name).options(**keys)
    peer = theirs("sigmoid" if name == "dpo" else name, vars(options), lora(kind))
    own = make_trainer(name, options, BridgeSettings(layout="padded"), peft_config=lora(kind))
    own.train()
    losses = logged(own, "loss")
    assert len(set(losses)) == 6, "it trains"
    assert losses == (pytest.approx(logged(peer, "loss"), rel=1e-6) if name.startswith("aot") else logged(peer, "loss"))
    assert logged(own, "grad_norm") == logged(peer, "grad_norm")
    assert torch.equal(flat_weights(own.model), flat_weights(peer.model))


@pytest.mark.parametrize("keys", [{"ld_alpha": 0.3}, {"use_weighting": True}], ids=str)
def test_packed_rows_give_the_same_modified_losses(make_trainer: Any, keys: Mapping[str, Any]) -> None:
    """What modifiers read beside sums of log-probs stands where it belongs in packed rows, too."""
    runs = []
    for layout in ("padded", "packed"):
        trainer = make_trainer("dpo", load_method("dpo").options(**keys), BridgeSettings(layout=layout))
        trainer.train()
        assert trainer.layout.layout == layout
        runs.append(logged(trainer, "loss"))
    plain = make_trainer("dpo", None, BridgeSettings(layout="packed"))
    plain.train()
    assert runs[0] == pytest.approx(runs[1], abs=1e-5)
    assert runs[1] != pytest.approx(logged(plain, "loss"), abs=1e-4)
