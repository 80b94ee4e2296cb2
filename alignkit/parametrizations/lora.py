"""Parametrisation ``lora``: low-rank adapters on frozen weights, which may be quantised (QLoRA)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from alignkit.parts.options import Conflict, Ignored, option
from alignkit.parts.parametrization import Parametrization, load_parametrization

_OUTPUT_HEAD = "lm_head"


def names_output_head(modules: str | list[str]) -> bool:
    """Whether LoRA modules, given as names or as one regular expression over full names, include the output head."""
    if isinstance(modules, list):
        return any(name.split(".")[-1] == _OUTPUT_HEAD for name in modules)
    return not _bad_pattern(modules) and re.fullmatch(modules, _OUTPUT_HEAD) is not None


def _has_lora(config: Any) -> bool:
    """Whether low-rank adapters train, alone or below what another parametrisation puts on them."""
    return "lora" in load_parametrization(config.parametrization).also


def _bad_pattern(modules: str | list[str]) -> bool:
    try:
        re.compile(modules if isinstance(modules, str) else "")
    except re.error:
        return True
    return False


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """Options of ``lora``."""

    lora_r: int = option(16, ge=1, le=2**16, help="Rank of the adapters.", source="TRL 1.16")
    lora_alpha: int = option(32, ge=1, help="Scale of the adapters: the update is alpha / r * BA.", source="TRL 1.16")
    lora_dropout: float = option(0.0, ge=0, lt=1, help="Dropout on the adapter's input.", source="PEFT")
    lora_target_modules: str | list[str] = option(
        "all-linear",
        help="Modules that get an adapter: all-linear (all but the output head and, said at the start, what cannot "
        "take one), a list of names, or one regular expression over full names.",
        source="QLoRA (arXiv 2305.14314), section 4",
    )
    lora_modules_to_save: list[str] = option(
        default_factory=list,
        help="Modules trained in full and saved beside the adapter, such as lm_head.",
        source="PEFT",
    )
    use_rslora: bool = option(False, help="Scale by alpha / sqrt(r) (arXiv 2312.03732).", source="PEFT")
    loraplus_lr_ratio: float | None = option(
        None,
        ge=1,
        help="How many times as large the learning rate of the factors B is as that of A, through the whole schedule "
        "(LoRA+, arXiv 2402.12354: 16); null is one rate for both.",
        source="PEFT",
    )
    use_dora: bool = option(False, help="Weight-decomposed adapters (arXiv 2402.09353).", source="PEFT")


PARAMETRIZATION = Parametrization(
    name="lora",
    summary="Low-rank adapters train on frozen weights, which may be quantised (QLoRA).",
    label="LoRA",
    options=LoraOptions,
    has_adapter=True,
    goes_on=True,
    has_factors=True,
    of_any_adapter=("loraplus_lr_ratio",),
    product="A LoRA adapter",
    conflicts=(
        Conflict(
            "LoRA on the output head",
            ("lora_target_modules",),
            lambda c: names_output_head(c.lora_target_modules),
            "contains lm_head: log-probs are computed from lm_head.weight directly, so low-rank factors beside it "
            "would never be used",
            "Leave lm_head out (all-linear covers every other linear layer); to train the head too, in full, write "
            "lora_modules_to_save: [lm_head]",
        ),
        Conflict(
            "LoRA targets that are no regular expression",
            ("lora_target_modules",),
            lambda c: _bad_pattern(c.lora_target_modules),
            "is not a valid regular expression",
            "Write all-linear, a list of module names such as [q_proj, v_proj], or a valid expression",
        ),
        Conflict(
            "LoRA+ with learnt removal",
            ("loraplus_lr_ratio", "parametrization"),
            lambda c: c.loraplus_lr_ratio is not None and _has_lora(c) and c.parametrization != "lora",
            "it has learning rates of its own",
            "Remove loraplus_lr_ratio, or write parametrization: lora",
        ),
        Conflict(
            "no LoRA target",
            ("lora_target_modules", "parametrization"),
            lambda c: c.lora_target_modules == [] and _has_lora(c),
            "nothing would be trained",
            "Write lora_target_modules: all-linear, or name at least one module",
        ),
    ),
    ignored=(
        Ignored(
            "LoRA dropout with dropout off",
            ("lora_dropout",),
            lambda c: c.disable_dropout and _has_lora(c) and c.adapter is None,
            "it switches off the adapters' dropout too",
            "write disable_dropout: false",
            under=("disable_dropout", "parametrization", "adapter"),
        ),
    ),
    when=("The default: little memory, and adapters of some megabytes."),
)
