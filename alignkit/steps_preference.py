"""The steps of a preference run that are its own."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOConfig

from alignkit import steps
from alignkit.callbacks.probe import DispersionProbe
from alignkit.config import PreferenceConfig
from alignkit.data.convert import to_candidate_rows
from alignkit.errors import ModelError
from alignkit.gradients._hook import chosen_rule
from alignkit.methods._preference import BridgeSettings, PreferenceTrainer
from alignkit.methods.method import load_method
from alignkit.parametrizations import loading
from alignkit.run_directory import RunDirectory


def training_arguments(config: PreferenceConfig) -> DPOConfig:
    """TRL's arguments; creating them also sets up the processes (and ZeRO-3, before a model is loaded).

    Raises:
        ConfigError: The config needs an accelerator and there is none.
    """
    args = DPOConfig(
        **steps.common_arguments(config),
        disable_dropout=config.disable_dropout,
        precompute_ref_log_probs=config.reference == "precomputed",
        precompute_ref_batch_size=config.reference_batch_size,
        max_length=None,
    )
    steps.check_device(config, args)
    return args


def prepare_data(
    config: PreferenceConfig, args: DPOConfig, tokenizer: PreTrainedTokenizerBase, directory: RunDirectory
) -> steps.PreparedData:
    """Load, check, tokenise and report on the rows; rank 0 first, so that the others read its cache.

    Raises:
        DataError: The rows cannot be trained on; all kinds of problem together.
    """
    num_candidates = load_method(config.method).num_candidates
    convert = partial(
        to_candidate_rows, tokenizer=tokenizer, max_length=config.max_length, num_candidates=num_candidates
    )
    with args.main_process_first(desc="data"):
        converted = steps.convert_splits(config, steps.load_splits(config), convert)
    steps.report_data(converted, tokenizer, args, directory)
    evaluation = converted["held-out"][0] if "held-out" in converted else None
    prompts: list[tuple[int, ...]] = []
    if isinstance(evaluation, Dataset):
        prompts = list(dict.fromkeys(tuple(ids) for ids in evaluation["prompt_ids"]))[: config.num_samples]
    return steps.PreparedData(converted["train"][0], evaluation, prompts)


def build_trainer(
    config: PreferenceConfig,
    args: DPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    data: steps.PreparedData,
    directory: RunDirectory,
) -> PreferenceTrainer:
    """Load the models and put the trainer together with its callbacks."""
    model = steps.load_policy(config)
    ref_model = _load_reference(config, tokenizer)
    cache = None if config.reference_cache is None else Path(config.reference_cache)
    layout: Any = config.layout
    trainer = PreferenceTrainer(
        model,
        args,
        method=load_method(config.method),
        options=config.method_options,
        settings=BridgeSettings(layout=layout, max_length=config.max_length, reference_cache=cache),
        gradient_rule=chosen_rule(config.gradient_rule, config.gradient_options),
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        processing_class=tokenizer,
        ref_model=ref_model,
        peft_config=steps.new_adapter(config, model),
        callbacks=steps.run_callbacks(config, directory),
    )
    if args.process_index == 0:
        print(f"layout: {trainer.layout.layout} ({trainer.layout.reason})")
    steps.introduce(trainer, directory, batch_layout=asdict(trainer.layout))
    if data.evaluation is not None and config.probe_rows and config.probe_steps:
        probe = trainer.eval_dataset.select(range(min(config.probe_rows, len(data.evaluation))))
        trainer.add_callback(DispersionProbe(trainer, probe, config.probe_steps))
    return trainer


def _load_reference(config: PreferenceConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel | None:
    """The reference where it is a model of its own. The policy's token ids must mean the same to it."""
    wants_copy = config.reference == "copy" or (config.reference == "auto" and config.parametrization == "full")
    if "reference" not in load_method(config.method).needs or not (wants_copy or config.reference_model):
        return None
    if config.reference_model is None:
        return steps.load_model(config, config.model, config.model_revision)
    reference = loading.load_tokenizer(config.reference_model, trust_remote_code=config.trust_remote_code)
    theirs = reference.get_vocab()
    different = [token for token, index in tokenizer.get_vocab().items() if theirs.get(token) != index]
    if different:
        raise ModelError(
            f"the reference model {config.reference_model!r} has other token ids than {config.model!r}: "
            f"{len(different)} tokens differ, such as {different[0]!r}. Write a reference_model with the same "
            "tokenizer, or remove it to take the starting model."
        )
    return steps.load_model(config, config.reference_model)
