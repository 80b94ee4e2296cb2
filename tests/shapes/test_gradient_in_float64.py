"""The gradient of a real step against one summed row by row in float64, and what its logged norm is worth.

A layout of processes divides a gradient rightly only if it gives this one. DeepSpeed adds the squares up in float64;
elsewhere torch does so in the type of the weights, which loses some 5e-6 of the norm of a model of a million numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from alignkit.data.candidates import to_candidate_rows
from alignkit.objectives.adpo import ADPOOptions
from alignkit.shapes._candidates import BridgeSettings
from scripts.claims.gsm8k_pairs import make_pairs, read_questions
from tests import list_oracles
from tests.conftest import GSM8K
from tests.distributed.conftest import lists_of
from tests.trainers import logged

pytestmark = pytest.mark.shared
BETA, BETA_REWARD = 0.1, 0.5


@pytest.fixture(scope="module")
def trained(shared: Path) -> Path:
    return shared / "models" / "gsm-tiny"


@pytest.fixture(scope="module")
def lists(trained: Path) -> Dataset:
    """Four lists of whole solutions, in turn of two and of three."""
    plain = Dataset.from_list(lists_of(make_pairs(read_questions(GSM8K), seed=0)[:4]))
    return to_candidate_rows(
        plain, AutoTokenizer.from_pretrained(trained), max_length=None, num_candidates=None, name="lists"
    )[0]


def exact_gradient(model: nn.Module, rows: Dataset) -> Tensor:
    """Of adpo's loss where policy and anchor are the same, one sequence at a time.

    There u is 0, so the pull on the log-likelihood of a candidate, (p - q) / tau, is a plain number.
    """
    for row in rows:
        choices = list_oracles.adpo_choices(row["scores"], "listwise_zscore", BETA_REWARD)
        pulls = list_oracles.adpo([0.0] * len(row["scores"]), choices).gradient
        for completion, pull in zip(row["completion_ids"], pulls, strict=True):
            ids = torch.tensor([row["prompt_ids"] + completion])
            logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            (pull * BETA / len(rows) * logps[-len(completion) :].sum()).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


class Seen(TrainerCallback):
    """Keeps the gradient before it is clipped."""

    gradient: Tensor

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.gradient = torch.cat([parameter.grad.flatten() for parameter in kwargs["model"].parameters()])


@pytest.mark.parametrize(("layout", "size"), [("padded", 1), ("packed", 2)])
def test_whole_solutions(make_trainer: Any, trained: Path, lists: Dataset, layout: str, size: int) -> None:
    load = AutoModelForCausalLM.from_pretrained
    exact = exact_gradient(load(trained, dtype=torch.float32).double(), lists)
    how = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size, "max_steps": 1}
    trainer = make_trainer(
        "adpo",
        ADPOOptions(beta=BETA, beta_reward=BETA_REWARD),
        BridgeSettings(layout=layout),
        how | {"max_grad_norm": 1e9},
        model=load(trained, dtype=torch.float32),
        train_dataset=lists,
    )
    trainer.add_callback(seen := Seen())
    trainer.train()
    assert (seen.gradient.double() - exact).norm() < 5e-6 * exact.norm()
    assert seen.gradient.double().norm().item() == pytest.approx(exact.norm().item(), rel=1e-6)
    assert logged(trainer, "grad_norm") == [pytest.approx(exact.norm().item(), rel=2e-5)]
