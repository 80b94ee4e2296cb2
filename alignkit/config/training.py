"""The keys that say how training proceeds: optimisation, precision, logging, saving, reports and the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from alignkit.config.optimizers import OPTIMIZERS
from alignkit.config.schedules import SETTINGS
from alignkit.config.sections import TRANSFORMERS, TRL, Section
from alignkit.parts.options import DerivedDefault, option
from alignkit.parts.parametrization import parametrizations

SCHEDULERS = tuple(SETTINGS)
TRACKERS = ("none", "tensorboard", "wandb", "trackio", "mlflow", "swanlab")
KERNELS = ("auto", "none", "liger", "compile")
INTERVALS = ("no", "steps", "epoch")
TEN_TIMES = "10 times full: Schulman et al. 2025, LoRA Without Regret; TRL's PEFT guide"
"""Found there to hold over ranks, models and tasks; with zero at the start of one factor, a short run can bear more."""


def rate_by_parametrization(*, adapter: float, full: float) -> DerivedDefault:
    """The default learning rate: TRL's for all weights, ten times that for an adapter."""
    has_adapter = {record.name: record.has_adapter for record in parametrizations()}
    return DerivedDefault(
        "parametrization",
        {name: adapter if has_adapter[name] else full for name in has_adapter},
        {name: TEN_TIMES if has_adapter[name] else TRL for name in has_adapter},
    )


@dataclass(frozen=True, kw_only=True)
class RunSection(Section):
    """The run directory and what identifies a run."""

    title: ClassVar[str] = "Run"

    output_dir: str = option(
        help="Run directory: weights, metrics, plot, model card.",
        passes_to_trainer=True,
        free_on_resume=True,
        is_path=True,
    )
    resume: bool | Literal["auto"] = option(
        False,
        help="Continue from the last complete checkpoint in output_dir; auto does so where there is one and starts "
        "the run where there is none, so that one command serves both.",
        free_on_resume=True,
    )
    overwrite: bool = option(False, help="Delete what an earlier run left in output_dir.", free_on_resume=True)
    seed: int = option(
        42,
        ge=0,
        lt=2**32,
        help="Seed of adapters, dropout and data order.",
        source=TRANSFORMERS,
        passes_to_trainer=True,
    )


@dataclass(frozen=True, kw_only=True)
class OptimizerSection(Section):
    """Length of training, batch size and optimizer, of any model."""

    title: ClassVar[str] = "Optimization"

    num_train_epochs: float = option(
        1.0,
        gt=0,
        le=100_000,
        help="Passes over the training rows.",
        source="alignkit (TRL 1.16: 3)",
        passes_to_trainer=True,
    )
    max_steps: int = option(
        -1,
        ge=-1,
        le=10**9,
        help="Optimizer steps in place of num_train_epochs; -1 is off.",
        source=TRANSFORMERS,
        passes_to_trainer=True,
    )
    per_device_train_batch_size: int = option(
        8,
        ge=1,
        le=2**20,
        help="Rows (prompts with all their completions) per device and micro-batch.",
        source=TRANSFORMERS,
        passes_to_trainer=True,
    )
    gradient_accumulation_steps: int = option(
        1, ge=1, le=2**20, help="Micro-batches per optimizer step.", source=TRANSFORMERS, passes_to_trainer=True
    )
    learning_rate: float | None = option(
        None,
        gt=0,
        help="Peak learning rate; null is 1e-5 under lora, 1e-6 under full. Small models and short runs want more.",
        derived=rate_by_parametrization(adapter=1e-5, full=1e-6),
        passes_to_trainer=True,
    )
    lr_scheduler_type: str = option(
        "linear", choices=SCHEDULERS, help="Learning-rate schedule.", source=TRANSFORMERS, passes_to_trainer=True
    )
    lr_scheduler_kwargs: dict[str, Any] | None = option(
        None,
        help="Settings of the schedule, by transformers' names, such as {min_lr_rate: 0.1} of cosine_with_min_lr, "
        "{num_cycles: 3} of cosine_with_restarts, {power: 2} of polynomial or {num_decay_steps: 100} of "
        "warmup_stable_decay.",
        source=TRANSFORMERS,
        passes_to_trainer=True,
    )
    warmup_steps: float = option(
        0.0,
        ge=0,
        help="Steps of linear warm-up; a value below 1 is a share of all steps.",
        source=TRANSFORMERS,
        passes_to_trainer=True,
    )
    optim: str = option(
        "adamw_torch",
        choices=OPTIMIZERS,
        help="Optimizer: AdamW, Lion or AdEMAMix of torch or, with states of 8 bits or paged ones, of bitsandbytes; "
        "muon on hidden matrices with AdamW on the rest; Adafactor, SGD, Adagrad, RMSprop; or one that needs no "
        "schedule (schedulefree).",
        passes_to_trainer=True,
    )
    optim_args: dict[str, Any] | None = option(
        None,
        help="Settings of the optimizer that have no key of their own, such as {momentum: 0.9} of sgd and muon or "
        "{scale_parameter: true} of adafactor.",
        source=TRANSFORMERS,
    )
    weight_decay: float = option(0.0, ge=0, help="Decoupled weight decay.", source=TRANSFORMERS, passes_to_trainer=True)
    adam_beta1: float = option(
        0.9, ge=0, lt=1, help="AdamW decay of the mean.", source=TRANSFORMERS, passes_to_trainer=True
    )
    adam_beta2: float = option(
        0.999, ge=0, lt=1, help="AdamW decay of the variance.", source=TRANSFORMERS, passes_to_trainer=True
    )
    adam_epsilon: float = option(1e-8, gt=0, help="AdamW epsilon.", source=TRANSFORMERS, passes_to_trainer=True)
    max_grad_norm: float = option(
        1.0, ge=0, help="Clip the gradient norm to this; 0 is off.", source=TRANSFORMERS, passes_to_trainer=True
    )


@dataclass(frozen=True, kw_only=True)
class OptimizationSection(OptimizerSection):
    """Length of training, batch size and optimizer, of language models."""

    router_aux_loss_coef: float | None = option(
        None,
        ge=0,
        help="Weight of the load-balancing loss of a mixture of experts; null takes the model's own, 0 is off.",
        source=TRL,
        passes_to_trainer=True,
    )


@dataclass(frozen=True, kw_only=True)
class TokenBudgetSection(Section):
    """Micro-batches of so many tokens in place of so many rows, where the rows are known before a step."""

    title: ClassVar[str] = OptimizationSection.title

    tokens_per_batch: int | Literal["auto"] | None = option(
        None,
        ge=1,
        help="Most tokens of a micro-batch, padding included: the rows of each step, which stay what they are, are put "
        "longest first into few micro-batches, and a row that has more is one of its own. auto is as many tokens as "
        "per_device_train_batch_size of the longest rows have, doubled while the memory estimate leaves room (where "
        "gradient_checkpointing is auto, too), or 2,048 on a CPU; null keeps "
        "micro-batches of per_device_train_batch_size rows.",
    )

    train_sampling_strategy: str = option(
        "random",
        choices=("random", "group_by_length", "sequential"),
        help="Order of the rows: random; group_by_length, rows of similar length together, which saves padding and "
        "makes losses of steps differ; or sequential, as they stand in data.",
        source=TRANSFORMERS,
        passes_to_trainer=True,
    )


@dataclass(frozen=True, kw_only=True)
class DropoutSection(Section):
    """Dropout, which would tell a policy from its reference where they are the same."""

    title: ClassVar[str] = OptimizationSection.title

    disable_dropout: bool = option(True, help="Switch off all dropout, LoRA's included.", source=TRL)


@dataclass(frozen=True, kw_only=True)
class EmbeddingNoiseSection(Section):
    """Noise on what is read, which keeps a model from learning rows by heart."""

    title: ClassVar[str] = OptimizationSection.title

    neftune_noise_alpha: float | None = option(
        None,
        gt=0,
        help="Add noise to the policy's embeddings while training (NEFTune, arXiv 2310.05914), as large for a short "
        "example as for a long one: 5 to 15 in the paper; null is off.",
        source=TRANSFORMERS,
        passes_to_trainer=True,
    )


@dataclass(frozen=True, kw_only=True)
class SupervisedOptimizationSection(OptimizationSection):
    """Length of training, batch size and optimizer, of supervised rows."""

    per_device_train_batch_size: int = option(
        8,
        ge=1,
        le=2**20,
        help="Rows per device and micro-batch; with packing, packed rows.",
        source=TRANSFORMERS,
        passes_to_trainer=True,
    )
    learning_rate: float | None = option(
        None,
        gt=0,
        help="Peak learning rate; null is 2e-4 under lora, 2e-5 under full. Small models and short runs want more.",
        derived=rate_by_parametrization(adapter=2e-4, full=2e-5),
        passes_to_trainer=True,
    )


@dataclass(frozen=True, kw_only=True)
class HardwareSection(Section):
    """Precision, memory and processes. Their number belongs to the launcher, not here."""

    title: ClassVar[str] = "Hardware"

    bf16: Literal["auto"] | bool = option(
        "auto",
        help="Compute in bfloat16 (mixed precision). auto does so where the accelerator has it, but not on a CPU, nor "
        "under fp16: true, dtype: float32 or dtype: float16; a precision in the launcher's file is followed.",
        source="alignkit (TRL 1.16: true)",
        passes_to_trainer=True,
    )
    fp16: bool = option(
        False,
        help="Compute in float16 with loss scaling (mixed precision).",
        source=TRANSFORMERS,
        passes_to_trainer=True,
    )
    gradient_checkpointing: Literal["auto"] | bool = option(
        "auto",
        help="Recompute activations in the backward pass: less memory, a third slower. auto does so where a step over "
        "the longest rows would not fit without, which is estimated, and measured where it is close.",
        source="alignkit (TRL 1.16: true)",
        passes_to_trainer=True,
    )
    kernels: str = option(
        "auto",
        choices=KERNELS,
        help="What computes the layers: liger, Liger's kernels for rotary positions, RMSNorm and SwiGLU; compile, each "
        "decoder layer by torch.compile; none, the model's own code. auto takes liger on CUDA where it is installed, "
        "else compile for long runs on an accelerator. Numbers are compared with those of none first.",
    )
    torch_compile: bool = option(
        False,
        help="Compile the whole model with torch.compile, anew for every length of rows; see kernels.",
        source=TRANSFORMERS,
        passes_to_trainer=True,
    )
    use_cpu: bool = option(
        False, help="Train on the CPU even where there is an accelerator.", source=TRANSFORMERS, passes_to_trainer=True
    )
    dataloader_num_workers: int = option(
        0,
        ge=0,
        le=256,
        help="Processes that load batches.",
        source=TRANSFORMERS,
        passes_to_trainer=True,
        free_on_resume=True,
    )
    ddp_timeout: int = option(
        1800,
        ge=1,
        help="Seconds one process may wait for another before the launch is ended.",
        source=TRANSFORMERS,
        passes_to_trainer=True,
        free_on_resume=True,
    )


@dataclass(frozen=True, kw_only=True)
class LoggingSection(Section):
    """How often the run reports, evaluates and saves."""

    title: ClassVar[str] = "Logging, evaluation and saving"

    logging_steps: int | float = option(
        10,
        gt=0,
        help="Steps between two lines of metrics; a value below 1 is a share of all steps.",
        source=TRL,
        passes_to_trainer=True,
        free_on_resume=True,
    )
    run_name: str | None = option(
        None,
        help="Name of the run in its trackers (report_to); null leaves it to them.",
        source=TRANSFORMERS,
        passes_to_trainer=True,
        free_on_resume=True,
    )
    report_to: str | list[str] = option(
        "none",
        choices=TRACKERS,
        help="Tracker beside metrics.jsonl, or a list of trackers.",
        source=TRANSFORMERS,
        passes_to_trainer=True,
        free_on_resume=True,
    )
    eval_strategy: str = option(
        "no",
        choices=INTERVALS,
        help="When to evaluate while training.",
        source=TRANSFORMERS,
        passes_to_trainer=True,
        free_on_resume=True,
    )
    eval_steps: int | float | None = option(
        None,
        gt=0,
        help="Steps between evaluations; a value below 1 is a share of all steps, null takes logging_steps.",
        source=TRANSFORMERS,
        passes_to_trainer=True,
        free_on_resume=True,
    )
    per_device_eval_batch_size: int = option(
        8,
        ge=1,
        le=2**20,
        help="Rows per device in an evaluation.",
        source=TRANSFORMERS,
        passes_to_trainer=True,
        free_on_resume=True,
    )
    save_strategy: str = option(
        "steps",
        choices=INTERVALS,
        help="When to save a checkpoint.",
        source=TRANSFORMERS,
        passes_to_trainer=True,
        free_on_resume=True,
    )
    save_steps: int | float = option(
        500,
        gt=0,
        help="Steps between checkpoints; a value below 1 is a share of all steps.",
        source=TRANSFORMERS,
        passes_to_trainer=True,
        free_on_resume=True,
    )
    save_total_limit: int | None = option(
        None, ge=1, help="Checkpoints to keep; null is all.", source=TRANSFORMERS, free_on_resume=True
    )

    load_best_model_at_end: bool = option(
        False,
        help="End with the weights of the best evaluation: its checkpoint is saved when it is found and kept, and the "
        "result, its figures and its samples are those of that checkpoint.",
        source=TRANSFORMERS,
        free_on_resume=True,
    )
    metric_for_best_model: str = option(
        "eval_loss",
        help="What evaluations are compared by, such as eval_rewards/accuracies; eval_ may be left out.",
        source="transformers (loss)",
        free_on_resume=True,
    )
    greater_is_better: bool | None = option(
        None,
        help="Whether more of it is better; null knows of losses that it is not, and of rewards, accuracies and "
        "margins that it is.",
        source=TRANSFORMERS,
        free_on_resume=True,
    )
    early_stopping_patience: int | None = option(
        None,
        ge=1,
        help="Stop after so many evaluations in a row that are not better than the best before them; null is off.",
        source="alignkit",
        free_on_resume=True,
    )
    early_stopping_threshold: float = option(
        0.0,
        ge=0,
        help="By how much an evaluation must be better to count as such.",
        source=TRANSFORMERS,
        free_on_resume=True,
    )


@dataclass(frozen=True, kw_only=True)
class ProbeSection(Section):
    """Where likelihood goes while training."""

    title: ClassVar[str] = "Report"

    probe_rows: int = option(
        32,
        ge=0,
        help="Held-out rows whose responses are scored while training, to see where likelihood goes; 0 is off. Off as "
        "well where no rows are held out (eval_data, eval_fraction).",
    )
    probe_steps: int = option(
        10, ge=0, help="Steps between two scorings of the probe rows; 0 is off.", free_on_resume=True
    )


@dataclass(frozen=True, kw_only=True)
class ReportSection(Section):
    """What is looked at besides the loss."""

    title: ClassVar[str] = "Report"

    num_samples: int = option(4, ge=0, help="Prompts answered for the final report; 0 is off.", free_on_resume=True)
    sample_max_new_tokens: int = option(
        64, ge=1, help="Longest answer in the final report, in tokens.", free_on_resume=True
    )


@dataclass(frozen=True, kw_only=True)
class HubSection(Section):
    """Publishing. The token is read from the environment, never from here."""

    title: ClassVar[str] = "Hub"

    push_to_hub: bool = option(
        False, help="Upload the result after training.", source=TRANSFORMERS, free_on_resume=True
    )
    hub_model_id: str | None = option(
        None, help="Repository to upload to, such as name/my-model.", source=TRANSFORMERS, free_on_resume=True
    )
    hub_private: bool = option(False, help="Create the repository as private.", free_on_resume=True)
