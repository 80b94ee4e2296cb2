"""The steps of a supervised run that are its own."""

from __future__ import annotations

from functools import partial

from transformers import PreTrainedTokenizerBase
from trl import SFTConfig as SFTArguments

from alignkit.runs import steps
from alignkit.config import SFTConfig
from alignkit.data.supervised import prompts_of, to_supervised_rows
from alignkit.data.supervised_tokens import TrainedTokens
from alignkit.gradients._hook import chosen_rule
from alignkit.shapes._tokens import SupervisedTrainer, template_with_marks
from alignkit.parts.method import load_method
from alignkit.runs.model_steps import load_policy, new_adapter
from alignkit.models.vocabulary import check_token_ids
from alignkit.runs.directory import RunDirectory


def training_arguments(config: SFTConfig) -> SFTArguments:
    """TRL's arguments; creating them also sets up the processes (and ZeRO-3, before a model is loaded).

    Raises:
        ConfigError: The config needs an accelerator and there is none, or does not fit the launcher.
    """
    steps.check_bf16(config)
    args = SFTArguments(
        **steps.common_arguments(config),
        packing=config.packing,
        packing_strategy=config.packing_strategy,
        # Held-out rows stay apart, so that every process count evaluates each of them once.
        eval_packing=False,
        # Rows are cut before they get here; packing fills rows up to this length.
        max_length=config.max_length if config.packing else None,
    )
    steps.check_device(config, args)
    steps.check_gradient_rule(config, args)
    return args


def prepare_data(
    config: SFTConfig, args: SFTArguments, tokenizer: PreTrainedTokenizerBase, directory: RunDirectory
) -> steps.PreparedData:
    """Load, check, tokenise and report on the rows; rank 0 first, so that the others read its cache.

    Raises:
        DataError: The rows cannot be trained on; all kinds of problem together.
    """
    splits_rows = config.packing and config.packing_strategy == "bfd_split"
    template = template_with_marks(tokenizer) if config.assistant_only_loss else None
    convert = partial(
        to_supervised_rows,
        tokenizer=tokenizer,
        max_length=None if splits_rows else config.max_length,
        trained=TrainedTokens(config.completion_only_loss, config.assistant_only_loss, template),
    )
    with args.main_process_first(desc="data"):
        splits = steps.load_splits(config, tokenizer)
        converted = steps.convert_splits(config, splits, convert)
    steps.report_data(config, converted, tokenizer, args, directory)
    if "held-out" not in converted:
        return steps.PreparedData(converted["train"][0], None, [])
    prompts = prompts_of(splits["held-out"], tokenizer, config.num_samples)
    return steps.PreparedData(converted["train"][0], converted["held-out"][0], prompts)


def build_trainer(
    config: SFTConfig,
    args: SFTArguments,
    tokenizer: PreTrainedTokenizerBase,
    data: steps.PreparedData,
    directory: RunDirectory,
) -> SupervisedTrainer:
    """Load the model and put the trainer together with its callbacks."""
    model = load_policy(config)
    used = {"a training row": data.train, "a held-out row": data.evaluation, "a prompt": data.prompts}
    check_token_ids(model, tokenizer, used, name=repr(config.model))
    trainer = SupervisedTrainer(
        model,
        args,
        method=load_method(config.method),
        options=config.method_options,
        gradient_rule=chosen_rule(config.gradient_rule, config.gradient_options),
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        processing_class=tokenizer,
        peft_config=new_adapter(config, model),
        callbacks=steps.run_callbacks(config, directory, data),
    )
    steps.introduce(config, trainer, directory)
    return trainer
