"""Losses without a reference follow TRL's CPO and ORPO trainers step for step.

These compute log-probs from whole logits, where ours come from the fused head, so the last bits differ.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from alignkit.parts.method import load_method
from alignkit.shapes._candidates import BridgeSettings
from tests.trainers import SHORT_RUN, flat_weights, logged, random_rows

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "simpo": (
        "simpo",
        {"beta": 2.0, "gamma": 0.6, "label_smoothing": 0.1},
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.6, "label_smoothing": 0.1, "cpo_alpha": 0.0},
    ),
    "alphapo": (
        "alphapo",
        {"alpha": 0.25, "beta": 1.5, "gamma": 0.1},
        {"loss_type": "alphapo", "alpha": 0.25, "beta": 1.5, "simpo_gamma": 0.1},
    ),
    "cpo": ("cpo", {"beta": 0.1, "cpo_alpha": 0.7}, {"loss_type": "sigmoid", "beta": 0.1, "cpo_alpha": 0.7}),
    "cpo hinge": ("cpo", {"form": "hinge"}, {"loss_type": "hinge", "beta": 0.1}),
    "orpo": ("orpo", {"beta": 0.3}, {"beta": 0.3}),
}
"""Name to our method, its options and TRL's."""
SHARED_METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


@pytest.fixture(scope="module")
def one_token_prompts() -> Dataset:
    """Pairs whose prompt is a single token, so that the likelihood of a row is that of the response."""
    return Dataset.from_list(random_rows([(1, (2 + i % 7, 3 + i % 5)) for i in range(16)], seed=3))


def as_tokenised(self: Any, row: dict[str, Any], **unused: Any) -> dict[str, Any]:
    """A row of token ids in the columns of TRL's collator."""
    found = {"prompt_input_ids": row["prompt_ids"], "prompt_attention_mask": [1] * len(row["prompt_ids"])}
    for role, completion in zip(("chosen", "rejected"), row["completion_ids"], strict=True):
        found[f"{role}_input_ids"] = row["prompt_ids"] + completion
        found[f"{role}_attention_mask"] = [1] * len(found[f"{role}_input_ids"])
        found[f"{role}_labels"] = [-100] * len(row["prompt_ids"]) + completion
    return found


@pytest.mark.parametrize(
    ("case", "kind"), [*((case, "full") for case in CASES), *((case, "lora") for case in CASES if case != "cpo hinge")]
)
def test_every_step_is_that_of_trl(
    case: str,
    kind: str,
    tmp_path: Path,
    make_trainer: Any,
    model_path: str,
    tokenizer: Any,
    rows: Dataset,
    one_token_prompts: Dataset,
) -> None:
    method, ours, theirs = CASES[case]
    config, trainer = (ORPOConfig, ORPOTrainer) if method == "orpo" else (CPOConfig, CPOTrainer)
    trained = one_token_prompts if method == "orpo" else rows
    adapter = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear") if kind == "lora" else None
    arguments = {key: value for key, value in SHORT_RUN.items() if key != "pad_to_multiple_of"}
    arguments |= {"max_length": 256, "remove_unused_columns": False}
    peer = type("Tokenised", (trainer,), {"tokenize_row": as_tokenised})(
        AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32),
        args=config(str(tmp_path / "peer"), **(arguments | theirs)),
        train_dataset=trained,
        processing_class=tokenizer,
        peft_config=adapter,
    )
    before = flat_weights(peer.model)
    peer.train()
    options = load_method(method).options(**ours)
    mine = make_trainer(method, options, BridgeSettings(layout="padded"), train_dataset=trained, peft_config=adapter)
    mine.train()
    assert len(logged(mine, "loss")) == 6 and max(logged(mine, "grad_norm")) > 0.01
    assert logged(mine, "loss") == pytest.approx(logged(peer, "loss"), rel=1e-6, abs=1e-6)
    assert logged(mine, "grad_norm") == pytest.approx(logged(peer, "grad_norm"), rel=1e-5)
    torch.testing.assert_close(flat_weights(mine.model), flat_weights(peer.model), rtol=1e-4, atol=1e-6)
    assert (flat_weights(mine.model) - before).abs().max() > 1e-3
    for key in SHARED_METRICS:
        assert logged(mine, key) == pytest.approx(logged(peer, key), rel=1e-5, abs=1e-6), key
