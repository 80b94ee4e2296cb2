"""Which of TRL's arguments a bridge has no use for: set to anything but their default they are refused by name.

Whoever writes a trainer in Python passes a ``DPOConfig`` or ``SFTConfig``, whose fields speak of an objective, a length
or a preparation of rows that the bridges replace. Silently left out they would be believed. No upstream name is a
private one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from peft import PeftModel
from transformers import TrainingArguments

from alignkit.errors import ConfigError

_METHOD = "the objective is that of `method` and its `options`"
_TOKENISED = "rows come tokenised. Say it where they are converted"
_LOADED = "the model comes loaded. Say it where it is loaded"
_ANCHOR = "a reference that follows the policy is the method adpo with anchor: ema or periodic"
_NO_LOGITS = "logits are never built. Use alignkit evaluate for predictions"

_BOTH: dict[str, str] = {
    "label_smoothing_factor": _METHOD,
    "average_tokens_across_devices": "items are always counted over all processes",
    "include_for_metrics": _NO_LOGITS,
    "batch_eval_metrics": _NO_LOGITS,
    "parallelism_config": "every process must hold whole rows of its own. Use DDP or DeepSpeed ZeRO",
    "model_init_kwargs": _LOADED,
    "pad_token": "set tokenizer.pad_token and pass the tokenizer as processing_class",
}
REFUSED_FOR_PREFERENCE: Mapping[str, str] = _BOTH | {
    **dict.fromkeys(
        ("loss_type", "loss_weights", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef", "label_smoothing"),
        _METHOD,
    ),
    **dict.fromkeys(("beta", "use_weighting", "discopop_tau"), _METHOD),
    "max_length": "rows come tokenised and cut. Cut them where they are converted, and write max_length: None",
    "truncation_mode": _TOKENISED,
    "dataset_num_proc": _TOKENISED,
    "padding_free": "write layout: packed in BridgeSettings, which leaves all padding out",
    **dict.fromkeys(("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"), _ANCHOR),
}
REFUSED_FOR_SUPERVISED: Mapping[str, str] = _BOTH | {
    "loss_type": _METHOD,
    **dict.fromkeys(
        ("chat_template_path", "dataset_text_field", "dataset_kwargs", "eos_token", "completion_only_loss"), _TOKENISED
    ),
    "assistant_only_loss": _TOKENISED,
}
REFUSED_FOR_REWARDS: Mapping[str, str] = _BOTH | {
    "center_rewards_coefficient": _METHOD,
    "max_length": "rows come tokenised and cut. Cut them where they are converted, and write max_length: None",
    **dict.fromkeys(("chat_template_path", "eos_token", "dataset_num_proc"), _TOKENISED),
}
_UPDATE = "say it in UpdateSettings"
REFUSED_FOR_ONLINE: Mapping[str, str] = _BOTH | {
    **dict.fromkeys(("beta", "epsilon", "epsilon_high", "delta", "loss_type", "importance_sampling_level"), _METHOD),
    **dict.fromkeys(("use_bias_correction_kl", "sapo_temperature_pos", "sapo_temperature_neg"), _METHOD),
    **dict.fromkeys(("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"), _METHOD),
    **dict.fromkeys(("entropy_coef", "use_adaptive_entropy"), _METHOD),
    "neftune_noise_alpha": "completions are drawn without noise, and would be trained on by another policy",
    **dict.fromkeys(("top_entropy_quantile", "off_policy_mask_threshold"), _UPDATE),
    **dict.fromkeys(
        ("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"), "the reference is the policy as it was"
    ),
}
"""Field to what there is in its place."""

INPUTS = ("eval_dataset", "processing_class", "peft_config", "callbacks", "optimizers")
"""What a bridge hands on to TRL's trainer beside its own parameters."""
_ORDERS = ("random", "sequential", "group_by_length")


def refuse_unused(args: TrainingArguments, refused: Mapping[str, str], given: Collection[str], *more: str) -> None:
    """Refuse arguments that would change nothing, before anything is loaded or computed.

    Args:
        args: TRL's arguments.
        refused: Fields of them that the bridge has no use for.
        given: Names of the other parameters the trainer was given.
        *more: Names it takes beside ``INPUTS``.

    Raises:
        ConfigError: Names every one of them.
    """
    kind = type(args).__name__
    problems = [
        f"`{field.name}={value!r}` of {kind} would change nothing: {refused[field.name]}"
        for field in dataclasses.fields(args)
        if field.name in refused and not _is_default(field, value := vars(args)[field.name])
    ]
    if args.train_sampling_strategy not in _ORDERS:
        found = f"`train_sampling_strategy={args.train_sampling_strategy!r}`"
        problems.append(f"{found}: rows are counted as accelerate shares them out. Write one of {', '.join(_ORDERS)}")
    if not args.accelerator_config.even_batches:
        problems.append(
            "`even_batches: False`: processes with fewer batches would be waited for without end. Remove it"
        )
    unknown = sorted(set(given) - {*INPUTS, *more})
    problems += [f"`{name}`: the trainer has no use for it. It takes {', '.join((*INPUTS, *more))}" for name in unknown]
    if problems:
        raise ConfigError("arguments that the trainer does not follow", problems)


def _is_default(field: dataclasses.Field[Any], value: Any) -> bool:
    if field.name == "max_length" and value is None:
        return True
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return bool(value == default)


def must_be_told_to_score_ahead(model: Any, inherited: Mapping[str, Any], *, wanted: bool) -> bool:
    """Whether DPOTrainer must take rows for scored ahead, for it would load a reference that nothing needs otherwise.

    It then hashes all weights for a cache that is not used here; with an adapter it loads nothing in any case.

    Args:
        model: The policy, plain or PEFT.
        inherited: What its constructor is given beside the policy and its arguments.
        wanted: Whether rows are scored while training.
    """
    has_adapter = isinstance(model, PeftModel) or inherited.get("peft_config") is not None
    return not (wanted or has_adapter or inherited.get("ref_model") is not None)
