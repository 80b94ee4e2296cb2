"""The table of keys without effect; :mod:`alignkit.config.refusals` says how a row is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from alignkit.config.optimizers import OPTIMIZERS, is_schedule_free
from alignkit.config.refusals import IgnoredKeys, edits_gradients, no_heldout_rows

EVERY_ROW_COUNTS: dict[str, tuple[Callable[[Any], bool], str, str]] = {
    "bnpo": (lambda c: c.loss_type == "bnpo", "loss_type", "dapo"),
    "a divergence": (lambda c: bool(c.beta), "beta", "0"),
    "an entropy bonus": (lambda c: c.entropy_coef != 0, "entropy_coef", "0"),
    "tokens of large entropy": (lambda c: c.top_entropy_quantile < 1, "top_entropy_quantile", "1"),
    "a gradient rule": (lambda c: edits_gradients(c.gradient_rule), "gradient_rule", "null"),
}
"""Where completions without an advantage count: when, the key that says so, and a value of it under which not."""

IGNORED: tuple[IgnoredKeys, ...] = (
    *(
        IgnoredKeys(
            f"skip_dead_rows with {name}",
            ("skip_dead_rows",),
            condition,
            "completions without an advantage count there as well",
            f"write {key}: {value}",
            under=(key,),
        )
        for name, (condition, key, value) in EVERY_ROW_COUNTS.items()
    ),
    IgnoredKeys(
        "cache options without a precomputed reference",
        ("reference_batch_size", "reference_cache"),
        lambda c: c.reference not in ("auto", "precomputed"),
        "only a precomputed reference is cached",
        "write reference: auto or precomputed",
        under=("reference",),
    ),
    IgnoredKeys(
        "packing_strategy without packing",
        ("packing_strategy",),
        lambda c: not c.packing,
        "rows are not packed",
        "write packing: true",
        under=("packing",),
    ),
    IgnoredKeys(
        "max_truncated_fraction where nothing is cut",
        ("max_truncated_fraction",),
        lambda c: c.packing and c.packing_strategy == "bfd_split",
        "bfd_split cuts no row",
        "write packing_strategy: bfd",
        under=("packing", "packing_strategy"),
    ),
    IgnoredKeys(
        "options of eval_data without it",
        ("eval_split", "max_eval_rows"),
        lambda c: c.eval_data is None,
        "it says how eval_data is read",
        "write eval_data",
        under=("eval_data",),
    ),
    IgnoredKeys(
        "evaluation options without held-out rows",
        ("per_device_eval_batch_size", "probe_rows", "allow_overlap"),
        no_heldout_rows,
        "no rows are held out",
        "write eval_data: FILE or eval_fraction: 0.05",
        under=("eval_data", "eval_fraction"),
    ),
    IgnoredKeys(
        "success_threshold without held-out prompts",
        ("success_threshold",),
        no_heldout_rows,
        "no prompts are held out",
        "write eval_data: FILE or eval_fraction: 0.05",
        under=("eval_data", "eval_fraction"),
    ),
    IgnoredKeys(
        "probe_steps without a probe",
        ("probe_steps",),
        lambda c: not c.probe_rows or no_heldout_rows(c),
        "no probe rows are scored",
        "hold out rows (eval_data or eval_fraction) and write a positive probe_rows",
        under=("probe_rows", "eval_data", "eval_fraction"),
    ),
    IgnoredKeys(
        "eval_steps without evaluation by steps",
        ("eval_steps",),
        lambda c: c.eval_strategy != "steps",
        "it counts the steps between evaluations",
        "write eval_strategy: steps",
        under=("eval_strategy",),
    ),
    IgnoredKeys(
        "save_steps without saving by steps",
        ("save_steps",),
        lambda c: c.save_strategy != "steps",
        "it counts the steps between checkpoints",
        "write save_strategy: steps",
        under=("save_strategy",),
    ),
    IgnoredKeys(
        "save_total_limit without checkpoints",
        ("save_total_limit",),
        lambda c: c.save_strategy == "no" and not c.load_best_model_at_end,
        "there are no checkpoints to limit",
        "write save_strategy: steps or save_strategy: epoch",
        under=("save_strategy", "load_best_model_at_end"),
    ),
    IgnoredKeys(
        "dataset_num_proc with streaming",
        ("dataset_num_proc",),
        lambda c: c.streaming,
        "a stream is tokenised while training",
        "write streaming: false",
        under=("streaming",),
    ),
    IgnoredKeys(
        "num_train_epochs with max_steps",
        ("num_train_epochs",),
        lambda c: c.max_steps > 0,
        "max_steps decides the length of training",
        "write max_steps: -1",
        under=("max_steps",),
    ),
    IgnoredKeys(
        "warm-up with a constant schedule",
        ("warmup_steps",),
        lambda c: c.lr_scheduler_type == "constant" and not is_schedule_free(c.optim),
        "this schedule has no warm-up",
        "write lr_scheduler_type: constant_with_warmup",
        under=("lr_scheduler_type", "optim"),
    ),
    IgnoredKeys(
        "keep_best with load_best_model_at_end",
        ("keep_best",),
        lambda c: c.load_best_model_at_end,
        "the checkpoint of the best evaluation is kept then",
        "write load_best_model_at_end: false",
        under=("load_best_model_at_end",),
    ),
    IgnoredKeys(
        "what is best where nothing is compared",
        ("metric_for_best_model", "greater_is_better"),
        lambda c: not c.load_best_model_at_end and c.early_stopping_patience is None,
        "evaluations are not compared",
        "write load_best_model_at_end: true",
        under=("load_best_model_at_end", "early_stopping_patience"),
    ),
    IgnoredKeys(
        "early_stopping_threshold without patience",
        ("early_stopping_threshold",),
        lambda c: c.early_stopping_patience is None,
        "the run does not end early",
        "write early_stopping_patience: 3",
        under=("early_stopping_patience",),
    ),
    IgnoredKeys(
        "run_name without a tracker",
        ("run_name",),
        lambda c: c.report_to in ("none", ["none"], []),
        "no tracker is told of it",
        "write report_to: wandb",
        under=("report_to",),
    ),
    IgnoredKeys(
        "Adam's epsilon with another optimizer",
        ("adam_epsilon",),
        lambda c: not OPTIMIZERS[c.optim].epsilon,
        "this optimizer does not read it",
        "write optim: adamw_torch",
        under=("optim",),
    ),
    IgnoredKeys(
        "betas with an optimizer that has none",
        ("adam_beta1", "adam_beta2"),
        lambda c: not OPTIMIZERS[c.optim].betas,
        "this optimizer does not read it",
        "write optim: adamw_torch",
        under=("optim",),
    ),
    IgnoredKeys(
        "gradient rule in a warm-up that there is not",
        ("rule_in_warmup",),
        lambda c: c.warmup_steps == 0,
        "there is no warm-up",
        "write warmup_steps: 0.05",
        under=("warmup_steps",),
    ),
    IgnoredKeys(
        "sample length without samples",
        ("sample_max_new_tokens",),
        lambda c: c.num_samples == 0,
        "no answers are generated",
        "write a positive num_samples",
        under=("num_samples",),
    ),
    IgnoredKeys(
        "Hub options without push_to_hub",
        ("hub_model_id", "hub_private"),
        lambda c: not c.push_to_hub,
        "nothing is uploaded",
        "write push_to_hub: true",
        under=("push_to_hub",),
    ),
)
