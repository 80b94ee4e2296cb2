"""Parametrisation ``lora``: low-rank adapters on frozen weights, which may be quantised (QLoRA)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from alignkit.parts.method import load_method
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


_STARTS = re.compile(r"gaussian|pissa|pissa_niter_[1-9]\d?|olora|eva")


def starts_on_weights(kind: bool | str) -> bool:
    """Whether factors start at main directions of the weights, rather than where they change nothing."""
    return isinstance(kind, str) and kind.startswith(("pissa", "olora"))


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
    init_lora_weights: bool | str = option(
        True,
        help="Where the factors start: true, B at zero; gaussian, the same with a normal A; pissa, pissa_niter_N or "
        "olora, at main directions of the weights, which saves an adapter of twice the rank on the same base; eva, at "
        "those of the first rows.",
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
            "LoRA that starts nowhere known",
            ("init_lora_weights",),
            lambda c: c.init_lora_weights is not True and not _STARTS.fullmatch(str(c.init_lora_weights)),
            "is no start that leaves the model what it is",
            "Write true, gaussian, pissa, pissa_niter_16, olora or eva",
        ),
        Conflict(
            "start of LoRA with learnt removal",
            ("init_lora_weights", "parametrization"),
            lambda c: c.init_lora_weights is not True and _has_lora(c) and c.parametrization != "lora",
            "it starts its factors itself",
            "Write init_lora_weights: true, or parametrization: lora",
        ),
        Conflict(
            "start on weights that are quantised",
            ("init_lora_weights", "quantization"),
            lambda c: starts_on_weights(c.init_lora_weights) and c.quantization != "none",
            "directions of weights of 4 or 8 bits are those of their rounding too",
            "Write quantization: none, or init_lora_weights: eva or true",
        ),
        Conflict(
            "start on weights with other forms of LoRA",
            ("init_lora_weights", "use_dora", "use_rslora", "lora_dropout"),
            lambda c: starts_on_weights(c.init_lora_weights) and bool(c.use_dora or c.use_rslora or c.lora_dropout),
            "the half that holds the start would be scaled or dropped with the other",
            "Remove these, or write init_lora_weights: true",
        ),
        Conflict(
            "start on weights with weight decay",
            ("init_lora_weights", "weight_decay"),
            lambda c: starts_on_weights(c.init_lora_weights) and c.weight_decay > 0,
            "half of every factor holds the start and must not decay",
            "Write weight_decay: 0, or init_lora_weights: true",
        ),
        Conflict(
            "start on weights with a gradient rule",
            ("init_lora_weights", "gradient_rule"),
            lambda c: starts_on_weights(c.init_lora_weights) and c.gradient_rule is not None,
            "a rule would move the half of every factor that holds the start",
            "Remove gradient_rule, or write init_lora_weights: eva or true",
        ),
        Conflict(
            "start on rows of a stream",
            ("init_lora_weights", "streaming"),
            lambda c: c.init_lora_weights == "eva" and c.streaming,
            "no rows are at hand before the first step",
            "Write streaming: false, or init_lora_weights: pissa or true",
        ),
        Conflict(
            "start on answers that are still to be drawn",
            ("init_lora_weights", "method"),
            lambda c: c.init_lora_weights == "eva" and load_method(c.method).program == "online",
            "no answers are at hand before the first step",
            "Write init_lora_weights: pissa or true",
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
