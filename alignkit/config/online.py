"""The keys of online RL beside those of every program: prompts, completions drawn while training, and their rewards.

Names and defaults are those of TRL's ``GRPOConfig`` unless a help says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from alignkit.config.sections import TRANSFORMERS, TRL, DataSection, DataValue, Section
from alignkit.config.training import LoggingSection, OptimizationSection
from alignkit.parts.options import only_with, option

RewardValue = str | dict[str, Any]
"""A reward by name, ``file.py:function``, or ``{name: ..., weight: ..., option: ...}``."""
VLLM = only_with("use_vllm", True)


@dataclass(frozen=True, kw_only=True)
class PromptDataSection(Section):
    """Which prompts are trained on and held out."""

    title: ClassVar[str] = DataSection.title
    streaming: ClassVar[bool] = False
    max_truncated_fraction: ClassVar[float] = 1.0

    data: DataValue = option(
        help="Training prompts with the columns that the rewards need: a jsonl, json, csv or parquet file, a folder of "
        "them, a Hub id, or a list of these. A source may be {path, weight, split, config}."
    )
    data_split: str = option("train", help="Split of a Hub data set, where an entry names none.", source=TRL)
    eval_data: DataValue | None = option(None, help="Held-out prompts, written like data.")
    eval_split: str = option("train", help="Split of eval_data, where an entry names none.")
    eval_fraction: float = option(0.0, ge=0, lt=1, help="Share of data held out when there is no eval_data.")
    column_map: dict[str, str] = option(
        default_factory=dict, help="Rename columns, ours: theirs, such as {prompt: question}."
    )
    apply_chat_template: bool = option(
        False, help="Turn plain prompts into a message of the user, for the chat template to write."
    )
    max_rows: int | None = option(None, ge=1, help="Use only that many training rows.")
    max_eval_rows: int | None = option(None, ge=1, help="Use only that many rows of eval_data.", free_on_resume=True)
    data_seed: int | None = option(
        None,
        ge=0,
        lt=2**32,
        help="Seed of mixing and splitting; null takes seed.",
        source=TRANSFORMERS,
        passes_to_trainer=True,
    )
    max_prompt_length: int = option(
        1024,
        ge=1,
        help="Longest prompt, in tokens; longer ones are dropped, never cut.",
        source="alignkit (TRL 1.16: none)",
    )
    max_dropped_fraction: float = option(
        0.1, ge=0, le=1, help="Refuse to train when a larger share of the rows cannot be used.", free_on_resume=True
    )
    allow_overlap: bool = option(
        False,
        help="Evaluate although held-out rows are trained on; they are compared token for token.",
        free_on_resume=True,
    )
    dataset_num_proc: Literal["auto"] | int = option(
        "auto",
        ge=1,
        le=256,
        help="Processes that check the rows; auto takes one for every 5,000 rows, up to the cores that this process "
        "may use.",
        source="alignkit (TRL 1.16: null, one)",
        free_on_resume=True,
    )


@dataclass(frozen=True, kw_only=True)
class RewardSection(Section):
    """What completions are worth."""

    title: ClassVar[str] = "Rewards"

    rewards: list[RewardValue] = option(
        help="Rewards, added up with their weights: names (alignkit rewards list), file.py:function, or {name, weight} "
        "with options of the reward beside them, such as {name: length, weight: 0.1, soft_limit: 200}."
    )
    scale_rewards: str = option(
        "group",
        choices=("group", "batch", "none"),
        help="Divide advantages by the standard deviation of the rewards of a prompt's completions, of the batch, or "
        "not at all (Dr. GRPO).",
        source=TRL,
        passes_to_trainer=True,
    )
    multi_objective_aggregation: str = option(
        "sum_then_normalize",
        choices=("sum_then_normalize", "normalize_then_sum"),
        help="Add rewards before advantages are taken, or after each was normalised (GDPO).",
        source=TRL,
        passes_to_trainer=True,
    )


@dataclass(frozen=True, kw_only=True)
class RolloutSection(Section):
    """How completions are drawn."""

    title: ClassVar[str] = "Completions"

    num_generations: int = option(
        8, ge=2, le=2**16, help="Completions a prompt (G).", source=TRL, passes_to_trainer=True
    )
    num_generations_eval: int | None = option(
        None,
        ge=1,
        help="Completions of a held-out prompt; null takes num_generations.",
        source=TRL,
        passes_to_trainer=True,
    )
    max_completion_length: int = option(
        512, ge=1, help="Longest completion, in tokens.", source=TRL, passes_to_trainer=True
    )
    steps_per_generation: int | None = option(
        None,
        ge=1,
        help="Micro-batches that one generation fills; null takes gradient_accumulation_steps.",
        source=TRL,
        passes_to_trainer=True,
    )
    num_iterations: int = option(
        1,
        ge=1,
        help="Times that completions are trained on before new ones are drawn.",
        source=TRL,
        passes_to_trainer=True,
    )
    temperature: float = option(
        1.0,
        gt=0,
        help="Sampling temperature; log-probs of the update are taken at it as well.",
        source=TRL,
        passes_to_trainer=True,
    )
    top_p: float = option(1.0, gt=0, le=1, help="Nucleus sampling; 1 is off.", source=TRL, passes_to_trainer=True)
    top_k: int = option(
        0, ge=0, help="Sample from the k likeliest tokens; 0 is off.", source=TRL, passes_to_trainer=True
    )
    min_p: float | None = option(
        None,
        ge=0,
        le=1,
        help="Sample from tokens at least this share as likely as the likeliest.",
        source=TRL,
        passes_to_trainer=True,
    )
    repetition_penalty: float = option(
        1.0, gt=0, help="Penalty on tokens that were there before; 1 is off.", source=TRL, passes_to_trainer=True
    )
    generation_kwargs: dict[str, Any] | None = option(
        None, help="More arguments for transformers' or vLLM's generation.", source=TRL, passes_to_trainer=True
    )
    chat_template_kwargs: dict[str, Any] | None = option(
        None, help="More arguments for the chat template.", source=TRL, passes_to_trainer=True
    )
    mask_truncated_completions: bool = option(
        False,
        help="Do not train on completions that did not stop.",
        source=TRL,
        passes_to_trainer=True,
    )
    tools: list[str] = option(
        default_factory=list, help="Functions that the model may call, each as file.py:function.", source=TRL
    )
    environment: str | None = option(
        None, help="Class of the environment that completions act in, as file.py:Class.", source=TRL
    )
    max_tool_calling_iterations: int | None = option(
        None,
        ge=1,
        help="Most rounds of tool calls in one completion; null is no limit.",
        source=TRL,
        passes_to_trainer=True,
    )


@dataclass(frozen=True, kw_only=True)
class EngineSection(Section):
    """What draws completions: transformers, or vLLM."""

    title: ClassVar[str] = "Generation engine"

    use_transformers_continuous_batching: bool = option(
        False, help="Generate with transformers' continuous batching.", source=TRL, passes_to_trainer=True
    )
    use_vllm: bool = option(False, help="Generate with vLLM.", source=TRL, passes_to_trainer=True)
    vllm_mode: str = option(
        "colocate",
        choices=("colocate", "server"),
        help="vLLM in the training processes, or in a server started with trl vllm-serve.",
        source=TRL,
        only_with=VLLM,
        passes_to_trainer=True,
    )
    vllm_server_base_url: str | None = option(
        None, help="Address of the server.", source=TRL, only_with=VLLM, passes_to_trainer=True
    )
    vllm_gpu_memory_utilization: float = option(
        0.3,
        gt=0,
        le=1,
        help="Share of the device's memory for colocated vLLM.",
        source=TRL,
        only_with=VLLM,
        passes_to_trainer=True,
    )
    vllm_tensor_parallel_size: int = option(
        1,
        ge=1,
        help="Devices a colocated vLLM model is split over.",
        source=TRL,
        only_with=VLLM,
        passes_to_trainer=True,
    )
    vllm_max_model_length: int | None = option(
        None, ge=1, help="Longest row vLLM plans for.", source=TRL, only_with=VLLM, passes_to_trainer=True
    )
    vllm_enable_sleep_mode: bool = option(
        False, help="Free vLLM's memory during the update.", source=TRL, only_with=VLLM, passes_to_trainer=True
    )
    vllm_importance_sampling_correction: bool = option(
        True,
        help="Weigh tokens by what training over vLLM says of them.",
        source=TRL,
        only_with=VLLM,
        passes_to_trainer=True,
    )
    vllm_importance_sampling_mode: str = option(
        "sequence_mask",
        choices=("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
        help="Whether ratios beyond the bounds are cut or masked, a token or a sequence at a time.",
        source=TRL,
        only_with=VLLM,
        passes_to_trainer=True,
    )
    vllm_importance_sampling_clip_max: float | None = option(
        3.0, gt=0, help="Upper bound of the ratio.", source=TRL, only_with=VLLM, passes_to_trainer=True
    )
    vllm_importance_sampling_clip_min: float | None = option(
        None, ge=0, help="Lower bound of the ratio.", source=TRL, only_with=VLLM, passes_to_trainer=True
    )


@dataclass(frozen=True, kw_only=True)
class UpdateSection(Section):
    """Which tokens an update is made of, and how it is laid out."""

    title: ClassVar[str] = "Update"

    layout: str = option(
        "auto",
        choices=("auto", "padded", "packed"),
        help="padded: a row a completion, as TRL; packed: one row for all of a batch without padding, every prompt "
        "computed once for its completions; auto: packed where the architecture allows it.",
        free_on_resume=True,
    )
    arrange_rows: bool = option(
        True,
        help="Lay completions out by prompt and length within an optimizer step, as far as that changes no number, and "
        "cut every micro-batch to its longest row; false leaves them as TRL draws and pads them.",
    )
    skip_dead_rows: bool = option(
        True,
        help="Leave completions that move nothing (all of their prompt are worth the same) out of the update, where "
        "nothing else sees them.",
        only_with=only_with("arrange_rows", True),
    )
    max_tokens_per_micro_batch: int | None = option(
        None,
        ge=1,
        help="Most tokens of a forward pass of the update, padding included: completions are dealt over the "
        "micro-batches of a step by tokens, and a micro-batch with more is run in parts. null is no limit.",
        only_with=only_with("arrange_rows", True),
    )
    dynamic_sampling: int = option(
        0,
        ge=0,
        le=64,
        help="Times that completions are drawn again for a prompt whose completions are all worth the same. DAPO takes "
        "further prompts instead; here the prompts of a draw stay what they are, so that none is passed over.",
    )
    top_entropy_quantile: float = option(
        1.0,
        gt=0,
        le=1,
        help="Train on that share of the tokens alone, those of the largest entropy.",
        source=TRL,
    )
    off_policy_mask_threshold: float | None = option(
        None,
        gt=0,
        help="Leave out completions with a negative advantage whose mean log-ratio has moved further than this.",
        source=TRL,
    )


@dataclass(frozen=True, kw_only=True)
class OnlineOptimizationSection(OptimizationSection):
    """Length of training, batch size and optimizer, of completions."""

    per_device_train_batch_size: int = option(
        8,
        ge=1,
        le=2**20,
        help="Completions per device and micro-batch.",
        source=TRANSFORMERS,
        passes_to_trainer=True,
    )


@dataclass(frozen=True, kw_only=True)
class OnlineLoggingSection(LoggingSection):
    """How often the run reports, evaluates and saves, and what it keeps of its completions."""

    rollout_steps: int = option(
        50,
        ge=0,
        help="Steps between two files of completions with their rewards (rollouts/), beside those of the first and the "
        "last step; 0 writes none.",
        free_on_resume=True,
    )
    success_threshold: float | None = option(
        None,
        help="Reward, weighted and added up, from which a held-out completion counts as right in pass@k; null gives "
        "pass@k where all rewards are 0 or 1.",
        free_on_resume=True,
    )
    metric_for_best_model: str = option(
        "eval_reward",
        help="What evaluations are compared by, such as eval_pass@1; eval_ may be left out.",
        source="alignkit (transformers: loss)",
        free_on_resume=True,
    )
    keep_best: bool = option(
        False,
        help="Save a checkpoint at every evaluation with the best eval_reward so far, and never delete that of the "
        "best.",
        free_on_resume=True,
    )
