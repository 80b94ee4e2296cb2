"""Ways to prune and to tune, at equal trainable parameters, each through a run's own trainer."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PrinterCallback

from alignkit.config import load_config
from alignkit.data.supervised import to_supervised_rows
from alignkit.models.export import logits_difference, logits_of
from alignkit.models.loading import ModelSource, load_model, load_tokenizer
from alignkit.parametrizations._policy import attach, load_policy, prepare
from alignkit.parts.shape import load_bridge, shapes_by_program
from alignkit.pruning.export import export, pruned_model
from alignkit.pruning.importance import plan_by_importance
from alignkit.pruning.learnt import Learnt, learnt
from alignkit.pruning.masks import masked
from alignkit.pruning.plan import PruningPlan
from alignkit.runs.arguments import training_arguments
from alignkit.runs.rows import PreparedData
from alignkit.yaml_text import dump_yaml
from gsm8k_pairs import MODEL
from pruning_rows import Split, measure, solved

WIDTH, LAYERS_DROPPED = 144, 2
"""Of 192 hidden channels, and of 6 layers."""
FFN, GROUPS = 384, 2
"""Of 512 feed-forward channels and of 3 KV groups, in every layer."""
SCORED = 64
"""Training rows that importance is taken on, as many as a run of PAT takes."""
CHECKED, ASKED = 4, 48
"""Test rows whose logits are compared, and test questions that a model of the first seed answers."""

UNTUNED: Mapping[str, str | None] = {
    "untuned, unpruned": None,
    "untuned, 144 hidden channels": "hidden",
    "untuned, 4 layers": "layers",
    "untuned, fewer FFN channels and KV groups": "inner",
}
"""The model before tuning, and what of it is pruned."""
DENSE, AFTER, BEFORE, FIRST = "LoRA, unpruned", "tune -> prune", "prune -> tune", "prune -> tune, first channels"
DROP, INNER, ATP = "layer dropping -> tune", "prune -> tune, FFN and KV groups", "ATP"
PAT_ZERO, PAT_START, PAT_FROZEN = "PAT, mask from zero", "PAT, mask from importance", "PAT, frozen mask"


@dataclass(frozen=True)
class Arm:
    """A way to a smaller model.

    Attributes:
        rank: Of LoRA, so that all arms train about as many parameters.
        before: What is pruned before tuning: ``hidden``, ``first``, ``layers``, ``inner`` or nothing.
        after: Prune hidden channels after tuning.
        keys: Of the config, beside those that all arms have.
    """

    rank: int
    before: str | None = None
    after: bool = False
    keys: Mapping[str, Any] = field(default_factory=dict)

    def taught(self) -> Arm:
        """The same with distillation from the unpruned, untuned model."""
        own = "parametrization" in self.keys
        teacher = {"method": "distill", "teacher": "base" if own else str(MODEL)}
        return Arm(self.rank, self.before, self.after, {**self.keys, **teacher})


def _pat(mask: str) -> Arm:
    return Arm(10, keys={"parametrization": "pat", "pat_rank": 8, "pat_keep_tied": True, "pat_mask": mask})


ARMS: Mapping[str, Arm] = {
    DENSE: Arm(12),
    AFTER: Arm(12, after=True),
    BEFORE: Arm(13, "hidden"),
    FIRST: Arm(13, "first"),
    PAT_ZERO: _pat("zero"),
    PAT_START: _pat("importance"),
    PAT_FROZEN: _pat("frozen"),
    DROP: Arm(18, "layers"),
    INNER: Arm(14, "inner"),
    ATP: Arm(
        12,
        keys={"parametrization": "atp", "atp_ffn": 0.25, "atp_kv_groups": 1 / 3, "atp_generator_lr": 0.02},
    ),
}


@dataclass(frozen=True)
class Budget:
    """What every run of a set has in common.

    Attributes:
        steps: AdamW steps; the rate falls linearly to zero.
        batch_size: Rows a step.
        max_length: Tokens of a row.
    """

    steps: int
    batch_size: int
    max_length: int


class Study:
    """The rows of one seed, and the untuned model.

    Args:
        split: The rows.
        seed: Of adapters and batches.
        budget: Length of the runs.
    """

    def __init__(self, split: Split, seed: int, budget: Budget) -> None:
        self.split, self.seed, self.budget = split, seed, budget
        self.tokenizer = load_tokenizer(str(MODEL))
        rows, _ = to_supervised_rows(split.train.select(range(SCORED)), self.tokenizer, max_length=None, name="scored")
        self.scored = [_batch(each["input_ids"]) for each in rows]

    def untuned(self, plan: str | None, folder: Path | None) -> dict[str, Any]:
        """Figures of the model as it is, whole or pruned.

        Args:
            plan: As :attr:`Arm.before`.
            folder: As in :meth:`run`.
        """
        model = _load(MODEL)
        found = PruningPlan() if plan is None else self.plan(model, plan)
        return self.figures(Learnt(model, found, {}), "test", folder)

    def tune(self, arm: Arm, rate: float) -> tuple[Learnt, int]:
        """Tune once; what is to be exported, and how many parameters trained."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            start = MODEL
            if arm.before is not None:
                start, model = folder / "start", _load(MODEL)
                pruned_model(model, self.plan(model, arm.before), keep_tied=True).save_pretrained(start)
                self.tokenizer.save_pretrained(start)
            trainer = self.trainer(arm, rate, start, folder)
            trainer.train()
        parameters = [each for each in trainer.model.parameters() if each.requires_grad]
        return learnt(trainer.model), sum(each.numel() for each in parameters)

    def trainer(self, arm: Arm, rate: float, start: Path, folder: Path) -> Any:
        """The trainer of a run, built as the launch program builds it.

        Args:
            arm: What is tuned, and how.
            rate: Peak learning rate.
            start: Folder of the model.
            folder: For the config.
        """
        file = folder / "run.yaml"
        file.write_text(dump_yaml(self.keys(arm, rate, start, folder)), encoding="utf-8")
        config = load_config("sft", file, check_files=False).config
        bridge = load_bridge(shapes_by_program()["sft"])
        rows, _ = bridge.converter(config, self.tokenizer)(self.split.train, name="train", max_dropped_fraction=0.0)
        args = training_arguments(config, bridge, {})
        args.disable_tqdm, args.report_to = True, []
        policy = load_policy(config)
        trainer = bridge.build(
            config,
            args,
            policy,
            self.tokenizer,
            PreparedData(rows, None, [], self.split.train),
            exchanges_rows=False,
            choices={},
            gradient_rule=None,
            peft_config=prepare(config, policy),
            callbacks=[],
        )
        attach(config, trainer)
        trainer.remove_callback(PrinterCallback)
        return trainer

    def keys(self, arm: Arm, rate: float, start: Path, folder: Path) -> dict[str, Any]:
        """The config of a run."""
        common = {
            "method": "sft",
            "model": str(start),
            "data": "rows.jsonl",
            "output_dir": str(folder / "run"),
            "dtype": "float32",
            "use_cpu": True,
            "seed": self.seed,
            "max_steps": self.budget.steps,
            "max_length": self.budget.max_length,
            "per_device_train_batch_size": self.budget.batch_size,
            "learning_rate": rate,
            "lr_scheduler_type": "linear",
            "logging_steps": self.budget.steps,
            "save_strategy": "no",
            "gradient_checkpointing": False,
            "lora_r": arm.rank,
            "lora_alpha": 2 * arm.rank,
            "lora_dropout": 0.0,
        }
        return common | dict(arm.keys)

    def run(self, arm: Arm, rate: float, part: str, folder: Path | None = None) -> dict[str, Any]:
        """Figures of one run.

        Args:
            arm: What is tuned, and how.
            rate: Peak learning rate.
            part: ``validation`` or ``test``.
            folder: Where the model is exported in full, checked by a fresh process; it may be None.
        """
        found, trained = self.tune(arm, rate)
        if arm.after:
            found = Learnt(found.model, self.plan(found.model, "hidden"), {})
        return self.figures(found, part, folder) | {"trained": trained}

    def plan(self, model: PreTrainedModel, kind: str) -> PruningPlan:
        """What is kept of a model: the channels or groups with the largest activations, or the layers that turn most.

        Args:
            model: A plain model.
            kind: As :attr:`Arm.before`.
        """
        if kind == "first":
            return PruningPlan(hidden=tuple(range(WIDTH)))
        sizes: dict[str, dict[str, int]] = {
            "hidden": {"hidden": WIDTH},
            "layers": {"drop_layers": LAYERS_DROPPED},
            "inner": {"ffn": FFN, "kv_groups": GROUPS},
        }
        return plan_by_importance(model, self.scored, criterion="activation", **sizes[kind])

    def figures(self, found: Learnt, part: str, folder: Path | None = None) -> dict[str, Any]:
        """What the plain, smaller model can do, and how far it is from the masked one.

        Args:
            found: What is exported.
            part: ``validation`` or ``test``.
            folder: As in :meth:`run`.
        """
        rows = self.split.validation if part == "validation" else self.split.test
        keep_tied = found.keep_tied and found.plan.hidden is not None
        small = pruned_model(found.model, found.plan, folds=found.folds, keep_tied=keep_tied)
        texts = [each.input_ids for each in self.split.test[:CHECKED]]
        record = measure(small, rows) | {
            "parameters": sum(each.numel() for each in small.parameters()),
            "loss of export": _difference(found, small, texts),
        }
        if folder is not None:
            options = {"tokenizer": self.tokenizer, "texts": texts, "folds": found.folds, "keep_tied": keep_tied}
            report = export(found.model, found.plan, folder, **options)
            record |= {
                "bytes": report.verification.bytes,
                "loss in a fresh process": report.verification.max_error,
            }
            if self.split.asks_numbers:
                stock = AutoModelForCausalLM.from_pretrained(folder)
                record["solved"] = solved(stock, self.tokenizer, rows[:ASKED])
        return record


@torch.no_grad()
def _difference(found: Learnt, small: PreTrainedModel, texts: Sequence[Sequence[int]]) -> float:
    """Largest difference of a logit between the masked model and the smaller one."""
    found.model.eval()
    with masked(found.model, found.plan, folds=found.folds):
        reference = logits_of(found.model, texts, "cpu")
    return logits_difference(reference, logits_of(small, texts, "cpu")).max_abs


def _load(path: Path) -> PreTrainedModel:
    return load_model(ModelSource(model=str(path), dtype="float32"))


def _batch(ids: Sequence[int]) -> dict[str, Tensor]:
    return {"input_ids": torch.tensor([list(ids)]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
