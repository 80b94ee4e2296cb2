"""The bridge of online runs: what a run calls, around the trainer in ``_policy_trainer.py``.

No upstream name is a private one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from functools import partial
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import get_json_schema
from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException
from trl import GRPOConfig
from trl.chat_template_utils import add_response_schema, supports_tool_calling

from alignkit.config.reward_names import columns_of_rewards
from alignkit.data.lengths import SAMPLED_ROWS
from alignkit.data.prompts import prompt_ids_of, to_prompt_rows
from alignkit.errors import ConfigError
from alignkit.models.choices import Choice
from alignkit.models.vocabulary import check_token_ids
from alignkit.parametrizations._policy import load_model
from alignkit.parts.method import load_method
from alignkit.parts.parametrization import load_parametrization
from alignkit.rewards import file_function, load_rewards
from alignkit.shapes._policy_trainer import METRICS, OnlineTrainer, UpdateSettings
from alignkit.shapes._rollout_files import RolloutFiles

__all__ = ["METRICS"]


def training_arguments(config: Any, common: Mapping[str, Any]) -> GRPOConfig:
    """TRL's arguments.

    Args:
        config: A :class:`~alignkit.shapes.policy.OnlineConfig`.
        common: The arguments that all trainers share.

    Raises:
        ConfigError: Completions of a prompt would be torn apart.
    """
    check_groups(config, PartialState().num_processes)
    return GRPOConfig(**common, disable_dropout=config.disable_dropout, pad_to_multiple_of=None, log_completions=False)


def check_groups(config: Any, ranks: int) -> None:
    """Refuse batches that do not hold whole groups of completions.

    Args:
        config: A :class:`~alignkit.shapes.policy.OnlineConfig`.
        ranks: Processes of the launch.

    Raises:
        ConfigError: Lists what does not divide.
    """
    steps, group = config.steps_per_generation or config.gradient_accumulation_steps, config.num_generations
    drawn = config.per_device_train_batch_size * ranks * steps
    problems = []
    if drawn % group:
        parts = f"per_device_train_batch_size {config.per_device_train_batch_size} x {ranks} processes x {steps} "
        parts += "steps_per_generation" if config.steps_per_generation else "gradient_accumulation_steps"
        problems.append(
            f"`num_generations: {group}` does not divide the {drawn} completions drawn at a time ({parts}). "
            f"Write a num_generations that does, or a batch size that makes them a multiple of {group}"
        )
    evaluated, of_each = config.per_device_eval_batch_size * ranks, config.num_generations_eval or group
    if (config.eval_data is not None or config.eval_fraction > 0) and evaluated % of_each:
        problems.append(
            f"`per_device_eval_batch_size: {config.per_device_eval_batch_size}` on {ranks} processes holds {evaluated} "
            f"completions, and a held-out prompt has {of_each}. Write a multiple, or another num_generations_eval"
        )
    if problems:
        raise ConfigError("completions of a prompt must be rewarded together", problems)


def batches_an_epoch(args: GRPOConfig, num_rows: int) -> int:
    """Micro-batches of each process in one pass over the prompts; a last, incomplete draw is left out."""
    prompts = args.generation_batch_size // args.num_generations
    return num_rows // prompts * args.steps_per_generation * args.num_iterations


def other_models(config: Any) -> dict[str, str]:
    """There are none that the config names: the reference is the policy as it was."""
    return {}


def converter(config: Any, tokenizer: PreTrainedTokenizerBase) -> Callable[..., Any]:
    """What checks rows of prompts.

    Raises:
        ConfigError: The model cannot be given the tools.
    """
    check_tools(config, tokenizer)
    return partial(
        to_prompt_rows,
        tokenizer=tokenizer,
        max_prompt_length=config.max_prompt_length,
        required_columns=columns_of_rewards(vars(config)),
        template=_template(config),
    )


def _template(config: Any) -> dict[str, Any]:
    """Arguments that the chat template is given for every prompt."""
    tools = [get_json_schema(tool) for tool in map(file_function, config.tools)]
    return {**({"tools": tools} if tools else {}), **(config.chat_template_kwargs or {})}


def check_tools(config: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse tools that the model could not be told of, or whose calls could not be read.

    Raises:
        ConfigError: A function says too little of itself, or nothing in the template says what a call looks like.
    """
    if not config.tools and not config.environment:
        return
    key, problem = ("tools", None) if config.tools else ("environment", None)
    advice = "Take a model whose template has tools, such as Qwen3, or write chat_template: FILE"
    if not supports_tool_calling(tokenizer):
        problem = f"the chat template of {config.model} cannot write a call of a tool and its answer. {advice}"
    elif tokenizer.response_template is None:
        try:
            add_response_schema(tokenizer)
        except ValueError:
            problem = f"TRL does not know how calls of tools are read under this chat template. {advice}"
    for place in config.tools:
        try:
            get_json_schema(file_function(place))
        except (DocstringParsingException, TypeHintParsingException) as error:
            problem = (
                f"{place} cannot be described to a model: {error} Give every argument a type and a line under Args:"
            )
    if problem is not None:
        raise ConfigError("tools cannot be called", [f"`{key}`: {problem}"])


def prompts(config: Any, tokenizer: PreTrainedTokenizerBase, rows: Any, converted: Any) -> list[tuple[int, ...]]:
    """Token ids of the first held-out prompts."""
    return prompt_ids_of(converted, tokenizer, config.num_samples, _template(config))


def build(
    config: Any,
    args: GRPOConfig,
    policy: Any,
    tokenizer: PreTrainedTokenizerBase,
    data: Any,
    *,
    exchanges_rows: bool,
    choices: dict[str, Choice],
    **inherited: Any,
) -> OnlineTrainer:
    """Load the reference and put the trainer together.

    Args:
        config: A :class:`~alignkit.shapes.policy.OnlineConfig`.
        args: TRL's arguments.
        data: ``train`` and ``evaluation``, checked.
        exchanges_rows: Never: completions are drawn by the trainer.
        choices: What has been chosen already; what is chosen here is added.
        **inherited: ``gradient_rule``, ``peft_config`` and ``callbacks`` of the trainer.
    """
    check_prompts(config, args, data.train)
    looked_at = prompt_ids_of(data.train, tokenizer, SAMPLED_ROWS, _template(config))
    used = {"a training prompt": looked_at, "a held-out prompt": data.prompts}
    check_token_ids(policy, tokenizer, used, name=repr(config.model))
    method, has_adapter = load_method(config.method), load_parametrization(config.parametrization).has_adapter
    needs_model = "reference" in method.needs(config.method_options) and not has_adapter
    rewards = load_rewards(config.rewards)
    args.reward_weights = [reward.weight for reward in rewards]
    trainer = OnlineTrainer(
        policy,
        args,
        method=method,
        options=config.method_options,
        reward_funcs=[reward.function for reward in rewards],
        settings=UpdateSettings(**{field.name: getattr(config, field.name) for field in fields(UpdateSettings)}),
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        processing_class=tokenizer,
        tools=[file_function(place) for place in config.tools] or None,
        environment_factory=file_function(config.environment) if config.environment else None,
        ref_model=load_model(config, config.model, config.model_revision) if needs_model else None,
        **inherited,
    )
    if config.rollout_steps:
        trainer.watch.consumers.append(RolloutFiles(trainer, config.rollout_steps))
    return trainer


def check_prompts(config: Any, args: GRPOConfig, rows: Dataset) -> None:
    """Refuse fewer prompts than are drawn at a time, of which no step would be made, and plain text for tools.

    Raises:
        ConfigError: There are.
    """
    prompts = args.generation_batch_size // args.num_generations
    if (config.tools or config.environment) and isinstance(rows[0]["prompt"], str):
        problem = (
            "calls of tools are turns of a conversation, and prompts are plain text. Write apply_chat_template: true"
        )
        raise ConfigError("tools cannot be called", [problem])
    if len(rows) < prompts:
        problem = (
            f"{len(rows)} training prompts are fewer than the {prompts} that one generation takes: "
            f"{args.generation_batch_size} completions, num_generations {args.num_generations} of each. Give more "
            "prompts, or write a smaller per_device_train_batch_size or steps_per_generation"
        )
        raise ConfigError("no step can be made", [problem])


def describe(config: Any, trainer: OnlineTrainer) -> dict[str, Any]:
    """The layout, recorded; rows and whether clipping can act, said; the reference in words."""
    reference = "none"
    if "reference" in trainer.needs:
        reference = f"{config.model}, a second model in memory"
        if trainer.ref_model is None:
            reference = "a frozen copy of the adapter" if config.adapter else "the policy with its adapter off"
    trainer.choices["layout"] = trainer.layout.as_choice()
    rows = trainer.described_rows()
    if trainer.args.process_index == 0:
        print(f"rows of an update: {rows}")
        if remark := on_policy_remark(trainer.args):
            print(remark)
    return {
        "reference": reference,
        "batch_layout": asdict(trainer.layout),
        "drawn": _drawn(trainer),
        "update_rows": rows,
        "best": "eval_reward" if config.keep_best else None,
    }


def _drawn(trainer: OnlineTrainer) -> str:
    """What is drawn at a time and what it is worth, for the line a run starts with."""
    args = trainer.args
    prompts = args.generation_batch_size // args.num_generations
    weights = zip(trainer.reward_func_names, trainer.reward_weights.tolist(), strict=True)
    worth = " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in weights)
    engine = f"vLLM ({args.vllm_mode})" if args.use_vllm else "transformers"
    return (
        f"{args.num_generations} completions of {prompts} prompts at a time by {engine}, temperature "
        f"{args.temperature:g}, at most {args.max_completion_length} tokens; reward: {worth}"
    )


def on_policy_remark(args: GRPOConfig) -> str | None:
    """What a user should know where every update is made on the policy that drew its completions; None elsewhere."""
    every = args.steps_per_generation * args.num_iterations
    if args.gradient_accumulation_steps % every or args.use_vllm:
        return None
    return (
        "updates are strictly on-policy: every completion is trained on once, by the weights that drew it, so the "
        "importance ratio is 1, clip_ratio stays 0 and clipping (or its guard) does nothing. Write num_iterations: 2, "
        "or steps_per_generation above gradient_accumulation_steps, to reuse completions."
    )
