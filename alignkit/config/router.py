"""The keys of router training beside those of every program: rows of prompt and completion, and the reference bank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from alignkit.config.sections import TRANSFORMERS, TRL, DataSection, ParametrizationSection, Section
from alignkit.config.training import OptimizationSection
from alignkit.parts.options import option

RELEASED = "the command in the README of RoMA's authors; arXiv 2511.07419v2 has no value"


@dataclass(frozen=True, kw_only=True)
class RouterParametrizationSection(ParametrizationSection):
    """Which numbers may move, with the options of every parametrisation."""

    parametrization: str = option(
        "routers",
        help="Train the routers of the last layers with experts (routers), or as in every program low-rank adapters "
        "(lora), other adapters (peft) or every weight (full).",
        source="RoMA (arXiv 2511.07419)",
    )


@dataclass(frozen=True, kw_only=True)
class RoutedDataSection(DataSection):
    """Which rows are trained on and held out. The completions are trained; the last prompt token is looked at."""

    max_length: int = option(
        1024,
        ge=2,
        help="Longest row, in tokens: rows are cut there, and dropped if nothing trained is left.",
        source=TRL,
    )
    pad_to_multiple_of: int | None = option(
        None,
        ge=1,
        le=4096,
        help="Round row lengths up to a multiple of this.",
        source="alignkit (TRL 1.16: auto)",
        passes_to_trainer=True,
    )


@dataclass(frozen=True, kw_only=True)
class RouterOptimizationSection(OptimizationSection):
    """Length of training, batch size and optimizer, of router training."""

    per_device_train_batch_size: int = option(
        8, ge=1, le=2**20, help="Rows per device and micro-batch.", source=TRANSFORMERS, passes_to_trainer=True
    )
    learning_rate: float | None = option(
        7e-5, gt=0, help="Peak learning rate.", source=RELEASED, passes_to_trainer=True
    )
    router_aux_loss_coef: float | None = option(
        0.0,
        ge=0,
        help="Weight of the load-balancing loss of a mixture of experts, which works against alignment; null takes the "
        "model's own, 0 is off.",
        source="alignkit (TRL 1.16: null)",
        passes_to_trainer=True,
    )


@dataclass(frozen=True, kw_only=True)
class BankFilesSection(Section):
    """Where the reference bank is kept."""

    title: ClassVar[str] = "Reference bank"

    bank_dir: str | None = option(
        None,
        help="Folder of the reference bank, as alignkit bank makes it; what is missing there is made before training. "
        "null is a folder of its own under $ALIGNKIT_CACHE/routing or ~/.cache/alignkit/routing.",
        free_on_resume=True,
        is_path=True,
    )
    bank_batch_size: int = option(8, ge=1, help="Rows per device in the pass that makes the bank.", free_on_resume=True)
    bank_refresh_steps: int = option(
        0,
        ge=0,
        help="Steps between two banks, each made anew under the routers as they are then; 0 keeps the first, which is "
        "the base model's.",
        source="alignkit; the paper does not say, the authors' code keeps the first",
    )
    gradient_ratio_steps: int = option(
        100,
        ge=0,
        help="Steps between two comparisons of the gradients of regulariser and cross-entropy, each a second backward "
        "pass; 0 is off, as it always is under DeepSpeed.",
        free_on_resume=True,
    )
