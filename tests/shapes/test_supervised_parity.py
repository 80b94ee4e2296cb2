"""``method: sft`` follows trl.SFTTrainer step for step, from rows of text to weights: an upgrade of TRL is safe."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel
from trl import SFTTrainer

from tests.supervised import arguments, completions, conversations, make, make_peer, token_rows, tokenizer
from tests.trainers import flat_weights, logged


class Case(NamedTuple):
    """Rows, what of them is trained, TRL's arguments, and the length rows are cut at before they reach the trainer."""

    rows: list[dict[str, Any]]
    trained: dict[str, Any]
    theirs: dict[str, Any]
    both: dict[str, Any]
    max_length: int | None = None


PACKED = {"packing": True, "per_device_train_batch_size": 2}
CASES = {
    "completions": Case(completions(), {}, {}, {}),
    "whole rows": Case(completions(), {"completion_only": False}, {"completion_only_loss": False}, {}),
    "cut": Case(completions(), {}, {"max_length": 52}, {}, max_length=52),
    "messages": Case(conversations(), {"assistant_only": False}, {}, {}),
    "assistant alone": Case(conversations(), {"assistant_only": True}, {"assistant_only_loss": True}, {}),
    "accumulation": Case(completions(), {}, {}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
    "packing": Case(completions(), {}, {}, PACKED | {"max_length": 192}, max_length=192),
    "packing with a split": Case(completions(), {}, {}, PACKED | {"max_length": 80, "packing_strategy": "bfd_split"}),
    "packing with accumulation": Case(
        conversations(),
        {"assistant_only": True},
        {"assistant_only_loss": True},
        PACKED | {"max_length": 384, "gradient_accumulation_steps": 2, "max_steps": 3},
        max_length=384,
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_every_step_is_bitwise_that_of_trl(kind: str, name: str, tmp_path: Path) -> None:
    case = CASES[name]
    theirs = make_peer(tmp_path / "theirs", case.rows, kind == "lora", **(case.both | case.theirs))
    before = flat_weights(theirs.model)
    theirs.train()
    ours = make(tmp_path / "ours", token_rows(case.rows, case.max_length, **case.trained), kind == "lora", **case.both)
    ours.train()
    assert len(logged(ours, "loss")) == ours.args.max_steps
    for key in ("loss", "grad_norm", "num_tokens"):
        assert logged(ours, key) == logged(theirs, key), key
    assert torch.equal(flat_weights(ours.model), flat_weights(theirs.model))
    assert not torch.equal(flat_weights(ours.model), before) and max(logged(ours, "grad_norm")) > 0.01
    for key in ("entropy", "mean_token_accuracy"):
        # TRL takes the mean over micro-batches, we over tokens: equal where a step is one micro-batch.
        if ours.args.gradient_accumulation_steps == 1:
            assert logged(ours, key) == pytest.approx(logged(theirs, key), rel=1e-5), key
    assert logged(ours, "loss/nll") == pytest.approx(logged(ours, "loss"), rel=1e-6)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_every_step_of_dft_is_bitwise_that_of_trl(kind: str, tmp_path: Path) -> None:
    how = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    theirs = make_peer(tmp_path / "theirs", completions(), kind == "lora", loss_type="dft", **how)
    theirs.train()
    ours = make(tmp_path / "ours", token_rows(completions()), kind == "lora", method="dft", **how)
    ours.train()
    assert len(logged(ours, "loss")) == 6 and max(logged(ours, "grad_norm")) > 0.01
    for key in ("loss", "grad_norm", "num_tokens"):
        assert logged(ours, key) == logged(theirs, key), key
    assert torch.equal(flat_weights(ours.model), flat_weights(theirs.model))
    assert logged(ours, "dft/probability")[0] < 0.1, "of an untrained model every token is unlikely"


def test_the_cases_differ(tmp_path: Path) -> None:
    """Guards the test above: no option is without effect on what is trained."""
    losses = set()
    for case in CASES.values():
        trainer = make(tmp_path / "run", token_rows(case.rows, case.max_length, **case.trained), **case.both)
        batch = next(iter(trainer.get_train_dataloader()))
        losses.add((tuple(batch["input_ids"].shape), int((batch["labels"] != -100).sum())))
    assert len(losses) == len(CASES)


def test_where_transformers_counts_the_first_token_ours_is_the_cross_entropy(tmp_path: Path) -> None:
    """No position predicts the first token of a row, yet for classes like GPT2LMHeadModel transformers counts it.

    TRL divides by that count, one more for every row trained whole; the mean over what is predicted is ours.
    """
    torch.manual_seed(0)
    size = {"n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 4}
    ids = {"eos_token_id": tokenizer().eos_token_id, "pad_token_id": tokenizer().pad_token_id}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    policy = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer()), **size, **ids, **dropout))
    texts, how = completions(4), {"max_steps": 1, "per_device_train_batch_size": 4}
    rows = token_rows(texts, completion_only=False)
    total, count = 0.0, 0
    for row in rows:
        with torch.no_grad():
            logits = policy(torch.tensor([row["input_ids"]])).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(row["labels"][1:]), reduction="sum").item()
        count += len(row["labels"]) - 1
    theirs = SFTTrainer(
        copy.deepcopy(policy),
        args=arguments(tmp_path / "theirs", completion_only_loss=False, **how),
        train_dataset=Dataset.from_list(texts),
        processing_class=tokenizer(),
    )
    theirs.train()
    ours = make(tmp_path / "ours", rows, model=policy, **how)
    ours.train()
    assert logged(ours, "loss") == pytest.approx([total / count], rel=1e-5)
    assert logged(theirs, "loss") == pytest.approx([total / (count + len(rows))], rel=1e-5)
