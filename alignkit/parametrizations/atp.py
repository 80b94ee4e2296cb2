"""Parametrisation ``atp``: low-rank adapters train while a small network decides which structures of the model go."""

from __future__ import annotations

from dataclasses import dataclass

from alignkit.parts.method import load_method
from alignkit.parts.options import Conflict, option
from alignkit.parts.parametrization import Parametrization

CODE = "authors' code"
PENALTIES = ("proximal", "group_lasso")


@dataclass(frozen=True, kw_only=True)
class AtpOptions:
    """Options of ``atp`` beside those of ``lora``."""

    atp_ffn: float = option(
        0.5,
        ge=0,
        lt=1,
        help="Share of the feed-forward channels that is removed, the same number in every layer; 0 removes none.",
        source=CODE,
    )
    atp_kv_groups: float = option(
        0.5,
        ge=0,
        lt=1,
        help="Share of the KV groups (a key/value head with the query heads that read it) that is removed, the same "
        "number in every layer; 0 removes none.",
        source="ours: the authors prune inside heads, which stock models cannot have",
    )
    atp_control_fraction: float = option(
        0.4,
        gt=0,
        lt=1,
        help="Part of the steps in which decisions move; then they are settled, and the rest of the run recovers.",
        source=f"{CODE}: 4 of 10 epochs",
    )
    atp_generator_lr: float = option(
        1e-3, gt=0, help="Learning rate of the network that decides; short runs need a larger one.", source=CODE
    )
    atp_ratio_weight: float = option(
        5.0, gt=0, help="Weight of the loss that holds the decisions to the shares removed.", source=CODE
    )
    atp_temperature: float = option(
        0.4, gt=0, help="Temperature of the Gumbel-sigmoid that decisions are drawn from.", source=CODE
    )
    atp_keep_bias: float = option(
        3.0, ge=0, help="Added to every logit of a decision: at the start next to nothing is pruned.", source=CODE
    )
    atp_penalty: str = option(
        "proximal",
        choices=PENALTIES,
        help="How LoRA weights of pruned structures are driven to zero: by a proximal step after each of the "
        "optimizer, which reaches it, or by a term of the loss.",
        source=f"{CODE}, version 2; group_lasso: version 1",
    )
    atp_penalty_strength: float | None = option(
        None,
        gt=0,
        help="What the proximal step grows to, times the learning rate; or the weight of the term of the loss. null is "
        "50,000 for the step and 1 for the term.",
        source=CODE,
    )


PARAMETRIZATION = Parametrization(
    name="atp",
    summary="Low-rank adapters train while a network decides which feed-forward channels and KV groups go (ATP).",
    label="ATP",
    options=AtpOptions,
    takes=("lora",),
    has_adapter=True,
    ends_on_schedule=True,
    product="A LoRA adapter that removes feed-forward channels and KV groups of its base (ATP)",
    serving="Other programs than alignkit refuse this adapter; `alignkit prune` makes of it a smaller model for them.",
    metrics={
        "loss/atp_group_lasso": "norms of the adapter's weights that belong to what is pruned, as a term of the loss",
        "atp/calibration_loss": "loss of a calibration batch under soft masks",
        "atp/ratio_loss": "how far the share that is removed is from the wanted one",
        "atp/churn": "share of the decisions that changed in the last step",
        "atp/pruned_norms": "norms of the adapter's weights that belong to what is pruned",
        **{
            f"atp/{axis}_kept{which}": f"{what} kept in a layer, {of}"
            for axis, what in (("ffn", "feed-forward channels"), ("kv_groups", "KV groups"))
            for which, of in (("", "mean over the layers"), ("_least", "the least"), ("_most", "the most"))
        },
    },
    conflicts=(
        Conflict(
            "ATP that removes nothing",
            ("atp_ffn", "atp_kv_groups", "parametrization"),
            lambda c: c.parametrization == "atp" and c.atp_ffn == c.atp_kv_groups == 0,
            "nothing would be removed",
            "Write a share above 0 for one of them, or parametrization: lora",
        ),
        Conflict(
            "ATP that goes on from an adapter",
            ("adapter", "parametrization"),
            lambda c: c.adapter is not None and c.parametrization == "atp",
            "its decisions are learnt over the steps of one run",
            "Write resume to go on with an interrupted run; or export the result (alignkit prune) and train that",
        ),
        Conflict(
            "ATP with a moving anchor",
            ("anchor", "parametrization"),
            lambda c: c.anchor in ("ema", "kl_triggered", "periodic") and c.parametrization == "atp",
            "the anchor would be a second adapter with masks of its own",
            "Write anchor: fixed, which is the unpruned model",
        ),
        Conflict(
            "ATP with modules that train in full",
            ("lora_modules_to_save", "parametrization"),
            lambda c: bool(c.lora_modules_to_save) and c.parametrization == "atp",
            "modules trained beside the adapter are not exported",
            "Remove lora_modules_to_save",
        ),
        Conflict(
            "ATP with DoRA",
            ("use_dora", "parametrization"),
            lambda c: c.use_dora and c.parametrization == "atp",
            "a DoRA layer divides by the norm of all its weights, pruned ones among them, so that the model would "
            "change where they are removed",
            "Remove use_dora",
        ),
        Conflict(
            "ATP with fp16",
            ("fp16", "parametrization"),
            lambda c: c.fp16 and c.parametrization == "atp",
            "the gradients of its decisions are taken without loss scaling and would vanish",
            "Write bf16: true, or train in float32",
        ),
        Conflict(
            "ATP with torch_compile",
            ("torch_compile", "kernels", "parametrization"),
            lambda c: (c.torch_compile or c.kernels == "compile") and c.parametrization == "atp",
            "its masks are of two kinds and change with every step, for which the model would be compiled anew",
            "Remove torch_compile or kernels",
        ),
        Conflict(
            "ATP with drawn answers",
            ("parametrization", "method"),
            lambda c: c.parametrization == "atp" and load_method(c.method).program == "online",
            "its decisions are learnt on rows with answers, and here these are drawn while training",
            "Prune with supervised or preference rows first (method: sft, dpo, ...), export the model and train it on",
        ),
    ),
    when=("A model with fewer feed-forward channels and KV groups for one domain, with the choice learnt beside LoRA."),
)
