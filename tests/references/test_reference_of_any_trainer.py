"""A reference belongs to whichever trainer makes one: here TRL's SFTTrainer, which has none of its own."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import alignkit.references
from alignkit.data.prefix import CandidateCollator
from alignkit.models._forward import use_packed_attention
from alignkit.parts.method import AnchorSchedule
from alignkit.references._cache import CHECKED_ROWS
from alignkit.references._reference import Reference, placed
from tests.references.test_token_rewards import contrast_rows, flat, naive
from tests.trainers import SHORT_RUN, random_rows

LORA = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
ROWS = random_rows([(5, (4,)), (2, (7,)), (9, (3,)), (1, (6,)), (4, (5,)), (6, (2,))], seed=8)
KINDS = ["lora", "copy"]


def label_logps(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Log-probs [B, T] of the labels of a supervised batch, 0 where nothing is trained."""
    logps: Tensor = model(**inputs, use_cache=False, fused_lm_head=True).log_probs
    return logps


class DistillingTrainer(SFTTrainer):
    """Pulls the policy towards what the reference thinks of the labels."""

    def __init__(self, *arguments: Any, copy: nn.Module | None, place: Path, batches: Any, **inherited: Any) -> None:
        super().__init__(*arguments, **inherited)
        own = None if copy is None else placed(copy, self)
        forward = {} if batches is None else {"forward": batches}
        caches = {"cache": place / "logps", "token_reward_cache": place / "rewards"}
        self.reference = Reference(self, own, pad_token_id=0, **caches, **forward)

    def compute_loss(self, model: nn.Module, inputs: Any, *unused: Any, **also_unused: Any) -> Tensor:
        return (label_logps(model, inputs) - self.reference.token_logps(inputs) - 1).square().mean()


@pytest.fixture
def base(model_path: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)


@pytest.fixture
def make(tmp_path: Path, model_path: str, tokenizer: PreTrainedTokenizerFast) -> Any:
    """A trainer; its reference is its LoRA policy's base, or a copy of the model that it trains in full."""

    def build(kind: str, batches: Any = None, **arguments: Any) -> DistillingTrainer:
        torch.manual_seed(0)
        load = lambda: AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)  # noqa: E731
        rows = [
            {"input_ids": r["prompt_ids"] + r["completion_ids"][0], "labels": [-100] * len(r["prompt_ids"])}
            for r in ROWS
        ]
        labelled = [row | {"labels": row["labels"] + row["input_ids"][len(row["labels"]) :]} for row in rows]
        return DistillingTrainer(
            load(),
            args=SFTConfig(str(tmp_path / "run"), **(SHORT_RUN | {"learning_rate": 1e-2, "max_steps": 3} | arguments)),
            train_dataset=Dataset.from_list(labelled),
            processing_class=tokenizer,
            peft_config=LORA if kind == "lora" else None,
            copy=load() if kind == "copy" else None,
            place=tmp_path,
            batches=batches,
        )

    return build


def plain_logps(model: Any, ids: list[int], count: int) -> Tensor:
    """Log-probs of the last ``count`` tokens of one row, by transformers alone."""
    with torch.no_grad():
        logps = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return logps.gather(-1, torch.tensor(ids[1:])[:, None])[-count:, 0]


def expected(model: Any, row: Mapping[str, Any], k: int = 0) -> Tensor:
    completion = row["completion_ids"][k]
    return plain_logps(model, row["prompt_ids"] + completion, len(completion))


@pytest.mark.parametrize("kind", KINDS)
def test_a_supervised_run_is_held_to_the_model_it_started_from(make: Any, base: PreTrainedModel, kind: str) -> None:
    trainer = make(kind, batches=label_logps)
    trainer.train()
    batch = trainer.data_collator(list(trainer.train_dataset))
    found = trainer.reference.token_logps(batch)
    with torch.no_grad():
        moved = label_logps(trainer.model, batch)
    assert not trainer.reference.moves and not found.requires_grad
    for b, row in enumerate(ROWS):
        trained, own = batch["labels"][b, 1:] != -100, expected(base, row)
        torch.testing.assert_close(found[b, : len(trained)][trained], own, atol=1e-5, rtol=0)
        assert (moved[b, : len(trained)][trained] - own).abs().max() > 0.05


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_rows_are_scored_once_and_come_from_the_cache_then(
    make: Any, base: PreTrainedModel, tmp_path: Path, kind: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = Dataset.from_list(random_rows([(5, (4, 2)), (2, (7, 7, 1)), (9, (3, 5)), (1, (6, 2)), (4, (5, 3))], seed=8))
    reference, scored = make(kind).reference, []
    for each in reference.bases() if layout == "packed" else ():
        use_packed_attention(each)
    score = reference.score
    monkeypatch.setattr(
        reference, "score", lambda rows, *title, **how: scored.append(len(rows)) or score(rows, *title, **how)
    )
    for _ in range(2):
        found = reference.precomputed(rows, "train", batch_size=2, layout=layout)
        for row, logps in zip(rows, found["ref_token_logps"], strict=True):
            for k, candidate in enumerate(logps):
                torch.testing.assert_close(torch.tensor(candidate), expected(base, row, k), atol=1e-5, rtol=0)
        assert len(list((tmp_path / "logps").iterdir())) == 1
    assert scored == [len(rows), CHECKED_ROWS]
    inputs = CandidateCollator(0, layout)(list(rows))
    live = reference.token_logps(inputs)[inputs["completion_mask"]]
    torch.testing.assert_close(live, flat(found["ref_token_logps"]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_token_rewards_are_those_of_the_reference(make: Any, base: PreTrainedModel, kind: str) -> None:
    rows, reference = contrast_rows([2] * 4, include_response=True), make(kind).reference
    rewarded = reference.token_rewarded(rows, "train", batch_size=2, layout="auto")
    torch.testing.assert_close(flat(rewarded["token_rewards"]), flat(naive(base, rows)), atol=1e-5, rtol=0)
    assert reference.token_reward_reports["train"].num_rows == 4


@pytest.mark.parametrize("kind", KINDS)
def test_it_follows_the_policy_where_it_is_told_to(make: Any, kind: str) -> None:
    trainer = make(kind, batches=label_logps)
    batch = trainer.data_collator(list(trainer.train_dataset))
    start = trainer.reference.token_logps(batch)
    trainer.reference.follow(AnchorSchedule("periodic", steps=3))
    trainer.train()
    with torch.no_grad():
        policy = label_logps(trainer.model, batch)
    assert trainer.reference.moves
    torch.testing.assert_close(trainer.reference.token_logps(batch), policy, atol=1e-5, rtol=0)
    assert (policy - start).abs().max() > 0.05


def test_nothing_about_references_knows_a_trainer_of_one_method() -> None:
    (folder,) = alignkit.references.__path__
    for file in Path(folder).glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("trl", "transformers"):
                assert not [name.name for name in node.names if name.name.endswith("Trainer")], file.name
