"""Short runs whose rows do not divide by the number of processes; a program of its own for several of them.

``python -m tests.distributed.repeated_rows FOLDER`` writes what every run logged, and its weights, to FOLDER/found.pt.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import TrainerCallback

from alignkit.gradients._hook import ChosenRule
from alignkit.parts.method import load_method
from alignkit.parts.rule import load_rule
from alignkit.shapes._candidates import BridgeSettings, PreferenceTrainer
from tests import supervised
from tests.trainers import dpo_arguments, flat_weights, random_rows

EPOCHS = 2


class Passes(TrainerCallback):
    """Counts the micro-batches of each step, on every process."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.found = trainer, []

    def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        self.found.append(gather_object([self.trainer.micro_batches_of_step]))


class Case(NamedTuple):
    """What is trained, in micro-batches of how many rows over all processes, and how many of them a step has."""

    program: str
    rows: int = 15
    global_rows: int = 4
    accumulation: int = 3
    rule: ChosenRule | None = None
    layout: str = "padded"
    stream: bool = False
    stop_after: int | None = None
    packing: bool = False
    tokens: int | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps of two passes over the rows."""
        batches = -(-self.rows // self.global_rows)
        return EPOCHS * -(-batches // self.accumulation)


def rule(name: str, **options: Any) -> ChosenRule:
    chosen = load_rule(name)
    return ChosenRule(chosen, chosen.options(rule_targets="all", **options))


CASES = {
    "preference": Case("preference"),
    "preference, shared prefix": Case("preference", layout="packed"),
    "preference, a process without rows": Case("preference", rows=13),
    "preference, stream": Case("preference", stream=True),
    "preference, resumed within a pass": Case("preference", accumulation=1, stop_after=3),
    "preference, sagm": Case("preference", accumulation=1, rule=rule("sagm", direction="global", sagm_alpha=0.02)),
    "preference, l2_sp": Case("preference", rule=rule("l2_sp", l2_sp_coef=0.05)),
    "preference, by tokens, a process without rows": Case("preference", rows=13, tokens=120),
    "preference, stream by tokens": Case("preference", stream=True, tokens=90),
    "supervised": Case("supervised"),
    "supervised, a process without rows": Case("supervised", rows=13),
    "supervised, stream": Case("supervised", stream=True),
    "supervised, resumed by tokens": Case("supervised", accumulation=1, stop_after=3, tokens=90),
    "supervised, packed": Case("supervised", rows=24, packing=True, accumulation=2),
    "supervised, sam": Case("supervised", accumulation=1, rule=rule("sam", direction="global")),
}


def preference_rows(count: int) -> Dataset:
    draw = random.Random(1)
    shapes = [(draw.randrange(1, 24), (draw.randrange(1, 12), draw.randrange(1, 12))) for _ in range(count)]
    return Dataset.from_list(random_rows(shapes, seed=2))


def build(case: Case, folder: Path, **changes: Any) -> Any:
    """A trainer that takes its share of ``global_rows`` in every process."""
    shared = {
        "per_device_train_batch_size": case.global_rows // PartialState().num_processes,
        "gradient_accumulation_steps": case.accumulation,
        "max_steps": case.steps,
        "learning_rate": 1e-3,
        # Adam divides a gradient by its own size, so where it is almost 0 it would compare rounding.
        "adam_epsilon": 1e-2,
        "average_tokens_across_devices": True,
        **changes,
    }
    if case.program == "supervised":
        rows: Any = supervised.token_rows(supervised.completions(case.rows))
        shared |= {"packing": case.packing, "max_length": 256 if case.packing else None}
        rows = rows.to_iterable_dataset(num_shards=2) if case.stream else rows
        trainer: Any = supervised.make(folder / "run", rows, **shared)
        trainer.gradient_rule = case.rule
        return trainer
    rows = preference_rows(case.rows)
    method = load_method("flex_dpo")
    return PreferenceTrainer(
        supervised.model(),
        dpo_arguments(folder / "run", **shared),
        method=method,
        # The token-level term has a denominator of its own.
        options=method.options(eta=0.2),
        settings=BridgeSettings(layout=case.layout),
        processing_class=supervised.tokenizer(),
        train_dataset=rows.to_iterable_dataset(num_shards=2) if case.stream else rows,
        gradient_rule=case.rule,
        ref_model=supervised.model(),
    )


def run(case: Case, folder: Path) -> dict[str, Any]:
    """Train, on request with a stop and a resumption, and say what was logged."""
    saving = {} if case.stop_after is None else {"save_strategy": "steps", "save_steps": case.stop_after}
    trainer = build(case, folder, **saving)
    trainer.fill_by_tokens(case.tokens)
    trainer.add_callback(passes := Passes(trainer))
    trainer.train()
    if case.stop_after is not None:
        trainer = build(case, folder, **saving)
        trainer.fill_by_tokens(case.tokens)
        trainer.train(resume_from_checkpoint=str(folder / "run" / f"checkpoint-{case.stop_after}"))
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    counted = len(trainer.train_dataset) if isinstance(trainer.train_dataset, Dataset) else case.rows
    weights = flat_weights(trainer.accelerator.unwrap_model(trainer.model))
    about = {"processes": trainer.accelerator.num_processes, "passes": passes.found}
    return {"steps": steps, "rows": counted, "weights": weights, **about}


def run_all(folder: Path) -> dict[str, dict[str, Any]]:
    """Every case in the processes there are."""
    return {name: run(case, folder / str(i)) for i, (name, case) in enumerate(CASES.items())}


if __name__ == "__main__":
    PartialState(cpu=True)
    target = Path(sys.argv[1])
    outcome = run_all(target)
    if PartialState().is_main_process:
        torch.save(outcome, target / "found.pt")
    PartialState().destroy_process_group()
