"""The table of values that cannot go together; :mod:`alignkit.config.refusals` says how a row is read."""

from __future__ import annotations

import re
from typing import Any

from alignkit.config.ignored import EVERY_ROW_COUNTS
from alignkit.config.kernels import computes_in_half, needs_accelerator
from alignkit.config.optimizers import is_schedule_free
from alignkit.config.refusals import Refusal, edits_gradients, no_heldout_rows
from alignkit.parts.parametrization import load_parametrization


def _has_adapter(c: Any) -> bool:
    return load_parametrization(c.parametrization).has_adapter


def _has_factors(c: Any) -> bool:
    return any(load_parametrization(name).has_factors for name in load_parametrization(c.parametrization).also)


CONFLICTS: tuple[Refusal, ...] = (
    # --- parametrization -------------------------------------------------------------------------------------------
    Refusal(
        "quantization with full fine-tuning",
        ("quantization", "parametrization"),
        lambda c: c.quantization != "none" and not _has_adapter(c),
        "quantized weights are integers and cannot be trained",
        "Write parametrization: lora (QLoRA), or quantization: none",
    ),
    Refusal(
        "adapter with full fine-tuning",
        ("adapter", "parametrization"),
        lambda c: c.adapter is not None and not _has_adapter(c),
        "full fine-tuning has no adapter to continue",
        "Write parametrization: lora, or merge the adapter first (alignkit merge) and train the merged model",
    ),
    Refusal(
        "new tokens where embeddings do not train",
        ("new_tokens", "parametrization"),
        lambda c: bool(c.new_tokens) and c.parametrization not in ("full", "lora"),
        "their embeddings would stay where they begin",
        "Write parametrization: lora or full, or remove new_tokens",
    ),
    Refusal(
        "new tokens with a continued adapter",
        ("new_tokens", "adapter"),
        lambda c: bool(c.new_tokens) and c.adapter is not None,
        "an adapter goes on with the modules that it has",
        "Merge it first (alignkit merge) and start a new adapter, or remove new_tokens",
    ),
    Refusal(
        "new tokens with quantization",
        ("new_tokens", "quantization"),
        lambda c: bool(c.new_tokens) and c.quantization != "none",
        "a quantised model is loaded with the embeddings that it was saved with",
        "Write quantization: none, or resize the model's embeddings and save it first",
    ),
    # --- precision and kernels -------------------------------------------------------------------------------------
    Refusal(
        "bf16 with fp16",
        ("bf16", "fp16"),
        lambda c: c.bf16 is True and c.fp16,
        "a run has one mixed precision",
        "Keep one of the two; bf16 needs no loss scaling where the hardware has it",
    ),
    Refusal(
        "fp16 on the CPU",
        ("fp16", "use_cpu"),
        lambda c: c.fp16 and c.use_cpu,
        "float16 mixed precision needs an accelerator",
        "Write bf16: true, or remove both for float32",
    ),
    Refusal(
        "fp16 with float16 weights that train",
        ("fp16", "dtype", "parametrization"),
        lambda c: c.fp16 and c.dtype == "float16" and not _has_adapter(c),
        "loss scaling cannot unscale float16 gradients",
        "Write dtype: float32; fp16 then computes in float16 and updates in float32",
    ),
    Refusal(
        "flash attention in float32",
        ("attn_implementation", "dtype", "bf16", "fp16"),
        lambda c: (
            computes_in_half(c.attn_implementation)
            and c.dtype in (None, "float32")
            and not c.fp16
            and (c.bf16 is False or (c.bf16 == "auto" and c.dtype == "float32"))
        ),
        "flash attention computes in bfloat16 or float16 only",
        "Write bf16: true, or attn_implementation: sdpa",
    ),
    Refusal(
        "flash or flex attention on the CPU",
        ("attn_implementation", "use_cpu"),
        lambda c: needs_accelerator(c.attn_implementation) and c.use_cpu,
        "it has no backward pass on the CPU",
        "Write attn_implementation: sdpa",
    ),
    Refusal(
        "kernels with torch_compile",
        ("kernels", "torch_compile"),
        lambda c: c.torch_compile and c.kernels in ("liger", "compile"),
        "one compiles the whole model, the other says what computes its layers",
        "Remove torch_compile: kernels: compile compiles layer by layer, once for all lengths of rows",
    ),
    Refusal(
        "Liger's kernels on the CPU",
        ("kernels", "use_cpu"),
        lambda c: c.kernels == "liger" and c.use_cpu,
        "they are written in Triton, which needs a CUDA device",
        "Write kernels: none or compile",
    ),
    Refusal(
        "compiled layers with quantization",
        ("kernels", "quantization"),
        lambda c: c.kernels == "compile" and c.quantization != "none",
        "quantised layers are not compiled",
        "Write kernels: liger or none, or quantization: none",
    ),
    # --- reference -------------------------------------------------------------------------------------------------
    Refusal(
        "adapter_disabled with full fine-tuning",
        ("reference", "parametrization"),
        lambda c: c.reference == "adapter_disabled" and not _has_adapter(c),
        "there is no adapter to switch off, so the reference would move with the policy",
        "Write reference: copy or reference: precomputed, or parametrization: lora",
    ),
    Refusal(
        "adapter_disabled with a continued adapter",
        ("reference", "adapter"),
        lambda c: c.reference == "adapter_disabled" and c.adapter is not None,
        "a run that continues an adapter is compared with that adapter as it was, of which a frozen copy is kept",
        "Remove reference; to compare with the bare base, write reference: copy and reference_model: the base",
    ),
    Refusal(
        "copied reference with a continued adapter",
        ("reference", "adapter", "reference_model"),
        lambda c: c.reference == "copy" and c.adapter is not None and c.reference_model is None,
        "the copy would be the base without the adapter the run starts from",
        "Remove reference, which keeps a frozen copy of the adapter, or name the base as reference_model",
    ),
    Refusal(
        "adapter_disabled with another reference model",
        ("reference_model", "reference"),
        lambda c: c.reference_model is not None and c.reference == "adapter_disabled",
        "the reference is either the policy without its adapter or another model",
        "Remove reference_model, or write reference: copy or reference: precomputed",
    ),
    Refusal(
        "reference model equal to the model",
        ("reference_model", "model", "model_revision", "adapter"),
        lambda c: c.reference_model == c.model and c.model_revision is None and c.adapter is None,
        "the starting model is the reference anyway; naming it again only loads it twice",
        "Remove reference_model; reference: copy forces a second copy in memory",
    ),
    Refusal(
        "precomputed reference with streaming",
        ("reference", "streaming"),
        lambda c: c.reference == "precomputed" and c.streaming,
        "a stream cannot be passed over before training",
        "Write streaming: false, or reference: auto",
    ),
    # --- data and evaluation ---------------------------------------------------------------------------------------
    Refusal(
        "eval_fraction with streaming",
        ("eval_fraction", "streaming"),
        lambda c: c.eval_fraction > 0 and c.streaming,
        "the length of a stream is unknown, so no share of it can be held out",
        "Give the held-out rows as eval_data, or write streaming: false",
    ),
    Refusal(
        "streaming without max_steps",
        ("streaming", "max_steps"),
        lambda c: c.streaming and c.max_steps < 1,
        "the length of a stream is unknown, so the schedule needs a number of steps",
        "Write max_steps: 1000, or streaming: false",
    ),
    Refusal(
        "eval_fraction with eval_data",
        ("eval_fraction", "eval_data"),
        lambda c: c.eval_fraction > 0 and c.eval_data is not None,
        "held-out rows come from one place",
        "Remove one of the two",
    ),
    Refusal(
        "evaluation without held-out rows",
        ("eval_strategy", "eval_data", "eval_fraction"),
        lambda c: c.eval_strategy != "no" and no_heldout_rows(c),
        "there are no held-out rows to evaluate on",
        "Write eval_data: FILE, or eval_fraction: 0.05, or eval_strategy: no",
    ),
    Refusal(
        "keep_best without evaluations",
        ("keep_best", "eval_strategy"),
        lambda c: c.keep_best and c.eval_strategy == "no",
        "nothing is evaluated while training, so that no checkpoint is known to be the best",
        "Write eval_strategy: steps with eval_data or eval_fraction, or keep_best: false",
    ),
    # --- gradient rule -----------------------------------------------------------------------------------------------
    Refusal(
        "gradient rule with fp16",
        ("gradient_rule", "fp16"),
        lambda c: edits_gradients(c.gradient_rule) and c.fp16,
        "a rule takes its gradients without the loss scaling that float16 needs",
        "Write bf16: true, or remove fp16",
    ),
    Refusal(
        "gradient rule with torch.compile",
        ("gradient_rule", "torch_compile"),
        lambda c: edits_gradients(c.gradient_rule) and c.torch_compile,
        "a compiled model does not see displaced weights",
        "Remove torch_compile, or the gradient rule",
    ),
    Refusal(
        "gradient rule with compiled layers",
        ("gradient_rule", "kernels"),
        lambda c: edits_gradients(c.gradient_rule) and c.kernels == "compile",
        "a compiled layer need not see displaced weights",
        "Remove kernels, or the gradient rule",
    ),
    Refusal(
        "gradient rule with half-precision weights that train",
        ("gradient_rule", "dtype", "parametrization"),
        lambda c: c.gradient_rule is not None and c.dtype in ("bfloat16", "float16") and not _has_adapter(c),
        "rounding to half precision swallows displacements and pulls of the size a rule makes",
        "Write dtype: float32 and bf16: true, which computes in bfloat16 and keeps the weights in float32",
    ),
    Refusal(
        "gradient rule on LoRA with full fine-tuning",
        ("rule_targets", "gradient_rule", "parametrization"),
        lambda c: c.rule_targets != "all" and not _has_factors(c),
        "there are no LoRA factors to edit the gradient of",
        "Write rule_targets: all, or parametrization: lora",
    ),
    Refusal(
        "tokens_per_batch with a gradient rule",
        ("tokens_per_batch", "gradient_rule"),
        lambda c: c.tokens_per_batch is not None and edits_gradients(c.gradient_rule),
        "a rule acts on one micro-batch at a time, and which rows are together would go by their tokens",
        "Remove one of the two",
    ),
    # --- completions drawn while training --------------------------------------------------------------------------
    *(
        Refusal(
            f"max_tokens_per_micro_batch with {name}",
            ("max_tokens_per_micro_batch", key),
            lambda c, condition=condition: c.max_tokens_per_micro_batch is not None and condition(c),  # type: ignore[misc]
            "the rows of a micro-batch would decide the loss, which are dealt by their tokens then",
            f"Remove max_tokens_per_micro_batch, or write {key}: {value}",
        )
        for name, (condition, key, value) in EVERY_ROW_COUNTS.items()
        if key != "beta"
    ),
    Refusal(
        "max_tokens_per_micro_batch below the longest row",
        ("max_tokens_per_micro_batch", "max_prompt_length", "max_completion_length"),
        lambda c: (
            c.max_tokens_per_micro_batch is not None
            and c.max_tokens_per_micro_batch < c.max_prompt_length + c.max_completion_length
        ),
        "a prompt with its completion can be longer, and is never split",
        "Write at least their sum, or shorter ones",
    ),
    Refusal(
        "dynamic_sampling with an environment",
        ("dynamic_sampling", "environment"),
        lambda c: c.dynamic_sampling > 0 and c.environment is not None,
        "an environment has one state for each completion, and would have to begin again",
        "Remove one of the two",
    ),
    Refusal(
        "schedule-free optimizer with a schedule",
        ("optim", "lr_scheduler_type"),
        lambda c: is_schedule_free(c.optim) and c.lr_scheduler_type != "constant",
        "it averages weights in place of a schedule, and would be slowed down twice",
        "Write lr_scheduler_type: constant; warmup_steps are the optimizer's own then",
    ),
    Refusal(
        "schedule-free optimizer that warms up for a share of the steps",
        ("optim", "warmup_steps"),
        lambda c: is_schedule_free(c.optim) and 0 < c.warmup_steps < 1,
        "the optimizer does not know how many steps there are",
        "Write warmup_steps as a whole number",
    ),
    Refusal(
        "order of rows of a stream",
        ("train_sampling_strategy", "streaming"),
        lambda c: c.train_sampling_strategy != "random" and c.streaming,
        "the rows of a stream come in its own order",
        "Write streaming: false",
    ),
    *(
        Refusal(
            f"{key} that is neither steps nor a share",
            (key,),
            lambda c, key=key: isinstance(step := vars(c)[key], float) and step >= 1,  # type: ignore[misc]
            "is no whole number, and as a share of all steps it is more than all",
            "Write a whole number of steps, or a share below 1",
        )
        for key in ("logging_steps", "eval_steps", "save_steps")
    ),
    Refusal(
        "best or early end without evaluations",
        ("load_best_model_at_end", "early_stopping_patience", "eval_strategy"),
        lambda c: (c.load_best_model_at_end or c.early_stopping_patience is not None) and c.eval_strategy == "no",
        "nothing is evaluated while training, so that nothing is known to be better",
        "Write eval_strategy: steps with eval_data or eval_fraction, or remove it",
    ),
    Refusal(
        "best or early end of what is pruned while training",
        ("load_best_model_at_end", "early_stopping_patience", "parametrization"),
        lambda c: (
            (c.load_best_model_at_end or c.early_stopping_patience is not None)
            and load_parametrization(c.parametrization).ends_on_schedule
        ),
        "what is removed is settled by the end of the run, and the model before it was another",
        "Remove it: the last checkpoint is the result",
    ),
    Refusal(
        "no tracker beside trackers",
        ("report_to",),
        lambda c: isinstance(c.report_to, list) and len(c.report_to) > 1 and "none" in c.report_to,
        "asks for trackers and for none",
        "Remove none from the list",
    ),
    # --- run -------------------------------------------------------------------------------------------------------
    Refusal(
        "zero steps",
        ("max_steps",),
        lambda c: c.max_steps == 0,
        "trains nothing",
        "Write a positive number, or -1 to train for num_train_epochs",
    ),
    Refusal(
        "resume with overwrite",
        ("resume", "overwrite"),
        lambda c: c.resume and c.overwrite,
        "one continues from what the other deletes",
        "Keep one of the two",
    ),
    Refusal(
        "push_to_hub without a repository",
        ("push_to_hub", "hub_model_id"),
        lambda c: c.push_to_hub and c.hub_model_id is None,
        "the upload has no destination",
        "Write hub_model_id: your-name/your-model",
    ),
    Refusal(
        "hub_model_id that names no repository",
        ("hub_model_id",),
        lambda c: c.hub_model_id is not None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", c.hub_model_id, re.ASCII),
        "is not the id of a repository",
        "Write your-name/your-model: letters, digits, dot, dash, underscore and one slash",
    ),
)
