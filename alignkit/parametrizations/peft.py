"""Parametrisation ``peft``: any other kind of adapter that PEFT has and that was tried here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from alignkit.parts.options import Conflict, option
from alignkit.parts.parametrization import Parametrization

KINDS = (
    "beft boft c3a deft delora fourierft frod glora gralora hira hra ia3 lily ln_tuning loha lokr miss oft osf peanut "
    "psoft randlora road shira supertuning tinylora vera waveft"
).split()
"""Kinds that train, go on from a checkpoint bit for bit and give the base back when switched off, as tests show."""

UNMERGEABLE = ("beft", "lily")
"""Those of which PEFT cannot make a plain model: beft where the layers have no bias."""

REFUSED: Mapping[str, tuple[str, str, tuple[str, ...]]] = {
    "that are a parametrisation of their own": (
        "it has keys of its own here",
        "Write parametrization: lora",
        ("lora",),
    ),
    "that add tokens": (
        "it puts trained tokens before every row instead of changing weights: the model would not start as its "
        "reference, and cannot be merged",
        "Choose a kind that changes weights, such as ia3",
        ("cartridge", "cpt", "multitask_prompt_tuning", "p_tuning", "prefix_tuning", "prompt_tuning"),
    ),
    "that the loop must serve": (
        "it needs a call after every step, a task for every row or trained adapters to choose from, which no trainer "
        "here gives it",
        "Write parametrization: lora, or choose a kind that needs nothing but rows, such as delora",
        ("adalora", "poly", "xlora"),
    ),
    "that run otherwise": (
        "it replaces the head or the whole pass of the model, of which log-probs are computed directly, or draws noise "
        "in every pass, so that no two would agree",
        "Choose a kind that changes layers, such as vera",
        ("pvera", "shadow", "trainable_tokens"),
    ),
    "that start elsewhere": (
        "its random start is not the model given, which it is compared with",
        "Choose a kind that starts as the model, such as vera",
        ("unilora", "vblora"),
    ),
    "that could not be tried": (
        "it needs scikit-learn or an architecture of its own, and has not been tried",
        "Choose a kind that has been tried, such as ia3",
        ("adamss", "adaption_prompt"),
    ),
}
"""Short reason to why kinds cannot be trained, what to write instead, and which kinds they are."""


@dataclass(frozen=True, kw_only=True)
class PeftOptions:
    """Options of ``peft``."""

    peft_type: str | None = option(
        None,
        choices=(*KINDS, *(kind for _, _, kinds in REFUSED.values() for kind in kinds)),
        help="Kind of adapter, as PEFT calls it.",
    )
    peft_options: dict[str, Any] | None = option(
        None,
        help="Options of that kind, as PEFT's configuration of it calls them; target_modules is all-linear where PEFT "
        "has no better default.",
    )


def _refusal(title: str, why: str, fix: str, kinds: tuple[str, ...]) -> Conflict:
    return Conflict(f"PEFT kinds {title}", ("peft_type",), lambda c: c.peft_type in kinds, why, fix)


PARAMETRIZATION = Parametrization(
    name="peft",
    summary="Another kind of adapter that PEFT has, such as ia3, oft or vera, trains on frozen weights.",
    label="PEFT",
    options=PeftOptions,
    has_adapter=True,
    product="An adapter of PEFT's kind {peft_type}",
    conflicts=(
        Conflict(
            "PEFT without a kind",
            ("parametrization", "peft_type"),
            lambda c: c.parametrization == "peft" and c.peft_type is None,
            "there are many kinds of adapter",
            f"Write peft_type: one of {', '.join(KINDS)}",
        ),
        *(_refusal(title, *refused) for title, refused in REFUSED.items()),
        Conflict(
            "PEFT kinds on quantized weights",
            ("quantization", "parametrization"),
            lambda c: c.quantization != "none" and c.parametrization == "peft",
            "kinds of adapter beside LoRA have not been tried on quantized weights",
            "Write parametrization: lora (QLoRA), or quantization: none",
        ),
        Conflict(
            "PEFT kinds that go on from an adapter",
            ("adapter", "parametrization"),
            lambda c: c.adapter is not None and c.parametrization == "peft",
            "only LoRA adapters can be continued",
            "Write parametrization: lora, or merge the adapter first (alignkit merge) and train the merged model",
        ),
        Conflict(
            "PEFT kinds under a gradient rule",
            ("gradient_rule", "parametrization"),
            lambda c: c.gradient_rule is not None and c.parametrization == "peft",
            "gradient rules have been tried on LoRA and on whole models alone",
            "Remove gradient_rule, or write parametrization: lora",
        ),
        Conflict(
            "PEFT kinds with a moving anchor",
            ("anchor", "parametrization"),
            lambda c: c.anchor in ("ema", "kl_triggered", "periodic") and c.parametrization == "peft",
            "the anchor is a second adapter beside the first, which not every kind allows",
            "Write anchor: fixed, or parametrization: lora",
        ),
    ),
    when="Another kind of adapter than LoRA, such as IA3 or VeRA.",
)
