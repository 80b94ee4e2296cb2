"""NEFTune: as transformers where no row is padded, by each example's own length elsewhere, and on the policy alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import TrainerCallback

from alignkit.models.embedding_noise import example_lengths
from tests import supervised
from tests.trainers import flat_weights, logged, make_trainer, model_path, rows, tokenizer

__all__ = ["make_trainer", "model_path", "rows", "tokenizer"]
ALPHA = 7.0


class Spy:
    """Sees the noise of every call of a model's embedding: training mode, gradient mode, ids and what was added."""

    def __init__(self, model: Any) -> None:
        self.seen: list[tuple[bool, bool, torch.Tensor, torch.Tensor]] = []
        model.get_input_embeddings().register_forward_hook(self)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        noise = output.detach() - module.weight.detach()[args[0]]
        self.seen.append((module.training, torch.is_grad_enabled(), args[0], noise))


class Seeded(TrainerCallback):  # type: ignore[misc]  # transformers' callbacks are untyped
    """Draws the same in the same step of every trainer."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        torch.manual_seed(state.global_step)


def test_single_rows_train_step_for_step_as_under_transformers(tmp_path: Path) -> None:
    """With one row at a time no padding tells the two apart."""
    texts = supervised.completions(6)
    short = {"per_device_train_batch_size": 1, "neftune_noise_alpha": ALPHA}
    ours = supervised.make(tmp_path / "ours", supervised.token_rows(texts), **short)
    theirs = supervised.make_peer(tmp_path / "theirs", texts, False, **short)
    clean = supervised.make(tmp_path / "clean", supervised.token_rows(texts), per_device_train_batch_size=1)
    for trainer in (ours, theirs, clean):
        trainer.add_callback(Seeded())
        torch.manual_seed(0)  # the order of the rows
        trainer.train()
    assert logged(ours, "loss") == pytest.approx(logged(theirs, "loss"), abs=1e-5)
    assert abs(logged(ours, "loss")[0] - logged(clean, "loss")[0]) > 1e-2
    assert torch.allclose(flat_weights(ours.model), flat_weights(theirs.model), atol=1e-5)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_noise_goes_by_each_examples_own_length(layout: str, tmp_path: Path) -> None:
    rows = supervised.token_rows(supervised.completions(8))
    trainer = supervised.make(tmp_path, rows, layout=layout, neftune_noise_alpha=ALPHA, max_steps=1)
    spy = Spy(trainer.model)
    trainer.train()
    assert trainer.layout.layout == layout
    ((_, _, ids, noise),) = [seen for seen in spy.seen if seen[0]]
    examples = {tuple(row["input_ids"][: None if layout == "padded" else -1]) for row in rows}
    found = 0
    flat, noise = ids.flatten().tolist(), noise.flatten(0, 1)
    for example in examples:
        for start in range(len(flat) - len(example) + 1):
            if tuple(flat[start : start + len(example)]) == example:
                largest = ALPHA / math.sqrt(len(example) * noise.shape[-1])
                part = noise[start : start + len(example)].abs()
                assert 0.9 * largest < float(part.max()) <= largest * (1 + 1e-4)
                assert float(part.mean()) == pytest.approx(largest / 2, rel=0.15)
                found += 1
                break
    assert found == 4, "every example of the micro-batch was found in what the model was given"


def test_lengths_of_rows_packed_by_their_positions_and_of_shared_prompts() -> None:
    from alignkit.data.prefix import Segments

    assert example_lengths({"position_ids": torch.tensor([[0, 1, 2, 0, 0, 1]])}).tolist() == [[3, 3, 3, 1, 2, 2]]
    segments = Segments(prompts=((2, (1, 3)), (0, (2,))), runs=(8,))
    assert example_lengths({"segments": segments}).tolist() == [[5, 5, 3, 5, 5, 5, 2, 2]]
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert example_lengths({"attention_mask": mask}).tolist() == [[2], [3]]


@pytest.mark.parametrize("rule", [None, "sam"])
def test_reference_and_evaluation_see_no_noise(rule: str | None, make_trainer: Any, rows: Dataset) -> None:
    """Under LoRA the reference is the same model; a rule's second evaluation sees the noise of the first."""
    from alignkit.gradients._hook import chosen_rule
    from alignkit.parts.rule import load_rule

    chosen = chosen_rule(rule, load_rule(rule).options() if rule else None)
    trainer = make_trainer(
        peft_config=supervised.lora(),
        gradient_rule=chosen,
        eval_dataset=rows.select(range(4)),
        arguments={"neftune_noise_alpha": ALPHA, "max_steps": 2, "eval_strategy": "steps", "eval_steps": 1},
    )
    spy = Spy(trainer.model.get_base_model())
    trainer.train()
    policy = [noise for training, _, _, noise in spy.seen if training]
    others = [noise for training, _, _, noise in spy.seen if not training]
    references = [seen for seen in spy.seen if not seen[1]]
    assert len(policy) == (4 if rule else 2) and all(float(noise.abs().max()) > 0.1 for noise in policy)
    assert len(references) >= 4 and len(others) >= 4 and not any(bool(noise.any()) for noise in others)
    if rule:
        assert torch.equal(policy[0], policy[1]) and not torch.equal(policy[0], policy[2])


def test_a_resumed_run_sees_the_same_noise(tmp_path: Path) -> None:
    rows = supervised.token_rows(supervised.completions(8))
    how = {"layout": "packed", "neftune_noise_alpha": ALPHA, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = supervised.make(tmp_path, rows, **how)
    whole.train()
    resumed = supervised.make(tmp_path, rows, **how)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(flat_weights(whole.model), flat_weights(resumed.model))
    assert resumed.state.global_step == 4
