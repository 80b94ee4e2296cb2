"""The steps of a preference run that are its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOConfig

from alignkit.runs import steps
from alignkit.shapes._probe import DispersionProbe
from alignkit.sampling.refresh import SampleRefresh
from alignkit.config import PreferenceConfig
from alignkit.data.convert import to_candidate_rows
from alignkit.environment import launched_with_fsdp
from alignkit.errors import ConfigError
from alignkit.sampling.report import SamplingReport
from alignkit.references.token_reward_report import NUM_SHOWN, write_heatmap
from alignkit.gradients._hook import chosen_rule
from alignkit.shapes._late_rows import LateRowsTrainer
from alignkit.shapes._candidates import BridgeSettings, PreferenceTrainer
from alignkit.parts.method import load_method
from alignkit.runs.model_steps import check_references, load_negative_reference, load_policy, load_reference, new_adapter
from alignkit.models.vocabulary import check_token_ids
from alignkit.runs.row_steps import check_refresh, contrast_prompts, refresh_steps, resampler, with_samples
from alignkit.runs.directory import RunDirectory


@dataclass(frozen=True)
class PreparedLists(steps.PreparedData):
    """Tokenised rows of a run, and what they were made of.

    Attributes:
        source: The training rows as text, samples included.
    """

    source: Dataset | IterableDataset


def training_arguments(config: PreferenceConfig) -> DPOConfig:
    """TRL's arguments; creating them also sets up the processes (and ZeRO-3, before a model is loaded).

    Raises:
        ConfigError: The config needs an accelerator and there is none, or does not fit the launcher.
    """
    if config.reference == "precomputed" and launched_with_fsdp():
        why = "`reference: precomputed`: FSDP shards the weights that the cache is keyed by. Write reference: auto"
        raise ConfigError("the launcher uses FSDP", [why])
    steps.check_bf16(config)
    args = DPOConfig(
        **steps.common_arguments(config),
        disable_dropout=config.disable_dropout,
        precompute_ref_log_probs=config.reference == "precomputed",
        precompute_ref_batch_size=config.reference_batch_size,
        max_length=None,
    )
    steps.check_device(config, args)
    steps.check_gradient_rule(config, args)
    check_refresh(config)
    return args


def prepare_data(
    config: PreferenceConfig, args: DPOConfig, tokenizer: PreTrainedTokenizerBase, directory: RunDirectory
) -> PreparedLists:
    """Load, check, tokenise and report on the rows; rank 0 first, so that the others read its cache.

    Raises:
        DataError: The rows cannot be trained on; all kinds of problem together.
        ModelError: A model that the config names will not do.
    """
    method, contrast = load_method(config.method), contrast_prompts(config)
    check_references(config, tokenizer)
    with args.main_process_first(desc="data"):
        splits = steps.load_splits(config, tokenizer)
    sampling: dict[str, SamplingReport] = {}
    if method.rows == "negatives":
        splits, sampling = with_samples(config, args, tokenizer, splits)
        if sampling:
            directory.record(sampling={split: report.to_dict() for split, report in sampling.items()})

    def convert(rows: Any, *, name: str, **shared: Any) -> Any:
        lost = sampling[name].dropped_rows if name in sampling else {}
        limits = {"max_length": config.max_length, "num_candidates": method.num_candidates}
        return to_candidate_rows(rows, tokenizer, name=name, contrast=contrast, lost=lost, **limits, **shared)

    with args.main_process_first(desc="tokens"):
        converted = steps.convert_splits(config, splits, convert)
    steps.report_data(config, converted, tokenizer, args, directory)
    evaluation = converted["held-out"][0] if "held-out" in converted else None
    prompts: list[tuple[int, ...]] = []
    if isinstance(evaluation, Dataset):
        prompts = list(dict.fromkeys(tuple(ids) for ids in evaluation["prompt_ids"]))[: config.num_samples]
    return PreparedLists(converted["train"][0], evaluation, prompts, splits["train"])


def build_trainer(
    config: PreferenceConfig,
    args: DPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedLists,
    directory: RunDirectory,
) -> PreferenceTrainer:
    """Load the models and put the trainer together with its callbacks."""
    model = load_policy(config)
    cache = None if config.reference_cache is None else Path(config.reference_cache)
    layout: Any = config.layout
    negative_reference, reference = load_negative_reference(config), load_reference(config)
    _check_vocabularies([model, reference, negative_reference], tokenizer, data)
    refreshed = refresh_steps(config)
    trainer = (LateRowsTrainer if refreshed else PreferenceTrainer)(
        model,
        args,
        method=load_method(config.method),
        options=config.method_options,
        settings=BridgeSettings(layout, config.max_length, cache, negative_reference=negative_reference),
        gradient_rule=chosen_rule(config.gradient_rule, config.gradient_options),
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        processing_class=tokenizer,
        ref_model=reference,
        peft_config=new_adapter(config, model),
        callbacks=steps.run_callbacks(config, directory, data),
    )
    if data.evaluation is not None and config.probe_rows and config.probe_steps:
        probe = trainer.eval_dataset.select(range(min(config.probe_rows, len(data.evaluation))))
        trainer.add_callback(DispersionProbe(trainer, probe, config.probe_steps))
    if refreshed:
        trainer.add_callback(SampleRefresh(trainer, resampler(config, tokenizer, data.source), refreshed))
    if "token_rewards" in trainer.needs and args.process_index == 0:
        _report_token_rewards(trainer, directory)
    if args.process_index == 0:
        print(f"layout: {trainer.layout.layout} ({trainer.layout.reason})")
    in_force = reference_in_force(config, trainer)
    steps.introduce(config, trainer, directory, reference=in_force, batch_layout=asdict(trainer.layout))
    return trainer


def _check_vocabularies(
    models: Sequence[PreTrainedModel | PeftModel | None], tokenizer: PreTrainedTokenizerBase, data: PreparedLists
) -> None:
    """Refuse models that lack the embedding of a token of the rows."""
    used = {"a training row": data.train, "a held-out row": data.evaluation}
    for model in models:
        if model is not None:
            check_token_ids(model, tokenizer, used, name=repr(model.name_or_path))


def reference_in_force(config: PreferenceConfig, trainer: PreferenceTrainer) -> str:
    """What log-ratios are taken against, in words."""
    if "reference" not in trainer.needs:
        return "none"
    anchor = trainer.method.anchor(trainer.method_options)
    if anchor is not None:
        return f"moves with the policy ({anchor.kind})"
    model = config.reference_model or config.model
    if config.reference == "precomputed":
        return f"log-probs of {model}, precomputed"
    if trainer.ref_model is not None:
        return f"{model}, a second model in memory"
    return "a frozen copy of the adapter" if config.adapter else "the policy with its adapter off"


def _report_token_rewards(trainer: PreferenceTrainer, directory: RunDirectory) -> None:
    """Print and record what the token rewards are like, with a picture of some."""
    reports = trainer.token_reward_reports
    for report in reports.values():
        print(report)
    directory.record(token_rewards={name: report.to_dict() for name, report in reports.items()})
    if isinstance(trainer.train_dataset, Dataset):
        picture = directory.path / "token_rewards.html"
        directory.manifest.claim(picture.name)
        write_heatmap(picture, trainer.train_dataset.take(NUM_SHOWN), trainer.processing_class)
        print(f"  {picture} shows some of them")
