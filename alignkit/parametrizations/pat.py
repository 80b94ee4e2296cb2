"""Parametrisation ``pat``: LoRA, and modules that narrow the residual stream while it trains."""

from __future__ import annotations

from dataclasses import dataclass

from alignkit.parts.options import Conflict, Ignored, option
from alignkit.parts.parametrization import Parametrization

PAPER, CODE = "PAT (arXiv 2408.14721)", "PAT's released code"


@dataclass(frozen=True, kw_only=True)
class PatOptions:
    """Options of ``pat``, beside those of LoRA."""

    pat_hidden: float = option(
        0.25,
        gt=0,
        lt=1,
        help="Share of the hidden channels that is removed; the width that is left is rounded to one that the "
        "architecture can have.",
        source=f"{PAPER}, 25 % of Llama-2-7B",
    )
    pat_weights: str = option(
        "lora",
        choices=("lora", "full"),
        help="Whether linear layers get low-rank updates, or move in full; the output head, embeddings and norms stay. "
        "Full updates lie in float32 beside the weights, which may be quantised, and want a smaller learning_rate.",
        source=PAPER,
    )
    pat_rank: int | None = option(
        None,
        ge=1,
        le=2**16,
        help="Rank of the sparsification modules; null is 5 % of the hidden size.",
        source=f"{PAPER}: 200 of 4096, 300 of 3072 (Gemma)",
    )
    pat_form: str = option(
        "released",
        choices=("released", "paper"),
        help="What the released code computes, from which the paper's figures come, or the equations of the text where "
        "these differ: the place of v, which factors are kept orthonormal, and how the number of open channels is "
        "weighted. The text's terms are so steep that they outweigh the task in the norm that is clipped.",
        source=CODE,
    )
    pat_mask: str = option(
        "zero",
        choices=("zero", "importance", "frozen"),
        help="Where the mask of the channels comes from: learnt from equal channels (zero), learnt with a small start "
        "by importance (importance), or chosen by importance and put on gradually without being learnt (frozen). "
        "Importance is the mean size of a channel's activations on the first training rows.",
        source=PAPER,
    )
    pat_milestone_steps: int | None = option(
        None,
        ge=2,
        help="Steps until the mask is hard and exactly the wanted channels are left; null is a third of the run.",
        source=f"{PAPER}: 10,000, a third of its runs",
    )
    pat_freeze_fraction: float = option(
        0.8,
        gt=0,
        le=1,
        help="Share of these steps after which the task moves the mask no longer.",
        source=CODE,
    )
    pat_mask_learning_rate: float | None = option(
        None,
        gt=0,
        help="Peak learning rate of the mask's logits; null is 0.5 / pat_milestone_steps.",
        source=f"alignkit, which is the 5e-5 of {PAPER} at 10,000 steps",
    )
    pat_active_coef: float = option(1.0, ge=0, help="Weight of the loss on the number of open channels.", source=PAPER)
    pat_identity_coef: float = option(
        1.0, ge=0, help="Weight of the loss that keeps the factors of all modules orthonormal.", source=PAPER
    )
    pat_bimodality_coef: float | None = option(
        None,
        ge=0,
        help="Weight of the loss that drives mask logits to -0.5 and 0.5; null is 0 under pat_form: paper, which has "
        "none, and 1 under released.",
        source=CODE,
    )
    pat_keep_tied: bool = option(
        False,
        help="Leave embedding and output head one weight where they are: the embedding then has the mask alone. "
        "Otherwise they part, and the model keeps a second matrix of vocabulary times width.",
    )


PARAMETRIZATION = Parametrization(
    name="pat",
    summary="LoRA trains together with modules that narrow the residual stream; the result is exported as a plain, "
    "smaller model.",
    label="pruning-aware tuning",
    options=PatOptions,
    has_adapter=True,
    ends_on_schedule=True,
    takes=("lora",),
    product="A PAT adapter ({pat_hidden} of the hidden channels removed), to be exported with `alignkit prune`",
    serving="No engine loads this adapter, and PEFT refuses it: it is the state of a training from which "
    "`alignkit prune --adapter` makes a plain, smaller model.",
    metrics={
        "loss/identity": "how far the factors of all modules are from orthonormal",
        "loss/active": "how far the number of open channels is from the wanted one; 0 from the milestone on",
        "loss/bimodality": "how far mask logits are from -0.5 and 0.5; 0 from the milestone on",
        "pat/open_channels": "hidden channels whose logits are positive; from the milestone on, those that are left",
        "pat/soft_distance": "mean distance of the mask to the hard one that it would be now",
        "pat/mask_churn": "share of the channels that would be kept now and would not at the last line, or otherwise",
    },
    conflicts=(
        Conflict(
            "PAT that goes on from an adapter",
            ("adapter", "parametrization"),
            lambda c: c.adapter is not None and c.parametrization == "pat",
            "its mask is formed over the steps of one run",
            "Write resume to go on with an interrupted run; or export the result (alignkit prune) and train that",
        ),
        Conflict(
            "PAT with a moving anchor",
            ("anchor", "parametrization"),
            lambda c: c.anchor in ("ema", "kl_triggered", "periodic") and c.parametrization == "pat",
            "the anchor would be a second adapter with a mask of its own",
            "Write anchor: fixed, which is the unpruned model",
        ),
        Conflict(
            "PAT whose mask never gets hard",
            ("pat_milestone_steps", "max_steps"),
            lambda c: c.pat_milestone_steps is not None and 0 < c.max_steps <= c.pat_milestone_steps,
            "the run would end before its mask is hard, and what is exported would not be what was trained",
            "Write a pat_milestone_steps well below max_steps; null takes a third",
        ),
        Conflict(
            "PAT with keep_best",
            ("keep_best", "parametrization"),
            lambda c: c.keep_best and c.parametrization == "pat",
            "the best checkpoint would be one from before the mask was hard, when the model was whole",
            "Write keep_best: false",
        ),
        Conflict(
            "PAT with torch_compile",
            ("parametrization", "torch_compile", "kernels"),
            lambda c: c.parametrization == "pat" and (c.torch_compile or c.kernels == "compile"),
            "the mask changes with every step, and the model would be compiled anew for each",
            "Remove torch_compile or kernels",
        ),
        Conflict(
            "PAT with DoRA",
            ("use_dora", "parametrization"),
            lambda c: c.use_dora and c.parametrization == "pat",
            "both replace what a LoRA layer computes",
            "Remove use_dora",
        ),
        Conflict(
            "PAT with modules that train in full",
            ("lora_modules_to_save", "parametrization"),
            lambda c: bool(c.lora_modules_to_save) and c.parametrization == "pat",
            "modules trained beside the adapter are not exported",
            "Remove lora_modules_to_save",
        ),
    ),
    ignored=(
        Ignored(
            "factors of PAT where weights move in full",
            ("lora_r", "lora_alpha", "lora_dropout", "use_rslora"),
            lambda c: c.parametrization == "pat" and c.pat_weights == "full",
            "there are no low-rank factors",
            "write pat_weights: lora",
            under=("pat_weights", "parametrization"),
        ),
    ),
    when="A narrower model, pruned while it is tuned for a task.",
)
