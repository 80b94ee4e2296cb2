"""What candidate rows are given before training, where the method asks for more than they bring."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import DPOConfig

from alignkit.config import PreferenceConfig
from alignkit.data.contrast import ContrastPrompts, load_contrast_prompts
from alignkit.data.json_files import HEAD_ROWS
from alignkit.data.json_values import dataset_of
from alignkit.data.negatives import lack_samples
from alignkit.data.problems import Problem
from alignkit.data.schema import describe_problems
from alignkit.environment import launched_with_fsdp
from alignkit.errors import ConfigError, DataError
from alignkit.sampling.resampling import Resampler
from alignkit.sampling.candidates import SampleSettings, prepare_prompts
from alignkit.sampling.report import SamplingReport
from alignkit.sampling.room import check_room
from alignkit.sampling.self_samples import SETTING_NAMES, self_samples
from alignkit.references._cache import default_cache_dir, model_fingerprint
from alignkit.parts.method import load_method
from alignkit.runs.model_steps import load_policy, new_adapter
from alignkit.models.loading import is_quantized
from alignkit.models.vocabulary import check_token_ids

Rows = Dataset | IterableDataset


def contrast_prompts(config: PreferenceConfig) -> ContrastPrompts | None:
    """The prompts token rewards are made with, for a method that needs them; rows may bring their own rewards."""
    options = config.method_options
    if "token_rewards" not in load_method(config.method).needs(options):
        return None
    path = None if options.contrast_prompts is None else Path(options.contrast_prompts)
    return load_contrast_prompts(path, include_response=options.include_response)


def with_samples(
    config: PreferenceConfig, args: DPOConfig, tokenizer: PreTrainedTokenizerBase, splits: dict[str, Rows]
) -> tuple[dict[str, Rows], dict[str, SamplingReport]]:
    """Rows of prompt and rejected given answers of the starting model, kept in the cache; others are checked.

    A collective. The form of all rows, the model and its adapter are checked before the first sample is drawn.

    Returns:
        The rows, and the account of the sampling for those sampled for.

    Raises:
        DataError: The rows are malformed; or samples are missing, and the model is sharded or the rows are streamed.
        ModelError: The model cannot be loaded, or cannot take the adapter of the config.
    """
    wanting = [name for name, rows in splits.items() if lack_samples(rows, name)]
    splits = {name: rows if name in wanting else checked_lists(rows, name) for name, rows in splits.items()}
    if not wanting:
        return splits, {}
    _refuse_sampling(config)
    settings = _sample_settings(config)
    how = {"instruction": settings.instruction}
    prompts = {name: prepare_prompts(list(splits[name]), tokenizer, name=name, **how) for name in wanting}
    model = load_policy(config)
    asked = {f"a prompt of {name}": prompts[name].token_ids for name in wanting}
    check_token_ids(model, tokenizer, asked, name=repr(config.model))
    new_adapter(config, model)  # The trainer makes its own; here it is tried.
    fit = {"max_dropped_fraction": config.max_dropped_fraction}
    limits = {
        name: check_room(prompts[name], settings, model.config, SETTING_NAMES, name=name, **fit) for name in wanting
    }
    weights = model_fingerprint(model, "default" if config.adapter is not None else None)
    # Quantised weights stand where they were loaded.
    model = (model if is_quantized(model) else model.to(args.device)).eval()
    cache, reports = default_cache_dir().with_name("samples"), {}
    for name in wanting:
        place = {"weights": weights, "prompt_limit": limits[name], "name": name}
        result = self_samples(prompts[name], model, tokenizer, settings, cache, **place)
        if PartialState().is_main_process:
            print(result.report.render(f"samples of {name}"))
        splits[name], reports[name] = dataset_of(result.rows), result.report
    return splits, reports


def _refuse_sampling(config: PreferenceConfig) -> None:
    """Raise where no samples can be drawn before training."""
    advice = "run scripts/sample_candidates.py first, and train on what it writes"
    if _is_sharded():
        raise DataError("these rows have no samples", [f"a sharded model cannot draw any here: {advice}"])
    if config.streaming:
        raise DataError("these rows have no samples", [f"streamed rows cannot be given any: {advice}"])


def refresh_steps(config: PreferenceConfig) -> int:
    """Interval at which self-samples are drawn anew, optimizer steps; 0 for never."""
    has_samples = load_method(config.method).rows == "negatives"
    return config.method_options.sample_refresh_steps if has_samples else 0


def check_refresh(config: PreferenceConfig) -> None:
    """Refuse to draw samples from a policy that is in pieces; once the arguments of the run have been made.

    Raises:
        ConfigError: The launcher shards the policy.
    """
    if refresh_steps(config) and _is_sharded():
        advice = "Write sample_refresh_steps: 0, or launch with DDP or ZeRO-2"
        why = f"`sample_refresh_steps: {refresh_steps(config)}`: such a policy cannot draw samples. {advice}"
        raise ConfigError("the launcher shards the policy (ZeRO-3 or FSDP)", [why])


def resampler(config: PreferenceConfig, tokenizer: PreTrainedTokenizerBase, lists: Dataset) -> Resampler:
    """What draws the samples of the training rows anew.

    Args:
        config: The config.
        tokenizer: The tokenizer of the model.
        lists: The candidate lists that the training rows were made of.
    """
    return Resampler.of_lists(lists, tokenizer, _sample_settings(config), config.max_length)


def checked_lists(rows: Rows, name: str) -> Rows:
    """Candidate lists, which must be K samples of one score and one negative below them; those of a stream when read.

    Lists whose scores prefer nothing or are no numbers are left to the conversion.

    Raises:
        DataError: Rows are of another form.
    """
    if isinstance(rows, Dataset):
        _check_scores({"scores": rows["scores"]}, range(len(rows)), name)
        return rows
    options = {"batched": True, "batch_size": HEAD_ROWS, "with_indices": True, "features": rows.features}
    return rows.map(_check_scores, fn_kwargs={"name": name}, **options)


def _check_scores(batch: Mapping[str, Sequence[Any]], indices: Sequence[int], name: str) -> Mapping[str, Sequence[Any]]:
    """The batch as it is."""
    kind = (
        "scores are not those of samples and one negative: give every sample the score 1 and the negative the score 0, "
        "or take adpo for ranked lists"
    )
    ranked = [(i, scores) for i, scores in zip(indices, batch["scores"], strict=True) if _are_ranks(scores)]
    if ranked:
        problems = describe_problems((i, Problem(kind, f"scores {scores}")) for i, scores in ranked)
        raise DataError(f"{name}: rows that are not samples and one negative (the first row is row 0)", problems)
    return batch


def _are_ranks(scores: Any) -> bool:
    """Whether there is a score between the highest and the lowest, or the lowest is there more than once."""
    if not isinstance(scores, list) or not all(isinstance(s, (int, float)) and math.isfinite(s) for s in scores):
        return False
    ordered = sorted(scores)
    return len({*ordered}) > 1 and ordered[1] != ordered[-1]


def _sample_settings(config: PreferenceConfig) -> SampleSettings:
    options = config.method_options
    return SampleSettings(
        num_samples=options.num_samples_per_prompt,
        max_new_tokens=options.sampling_max_new_tokens,
        temperature=options.sampling_temperature,
        top_p=options.sampling_top_p,
        seed=config.seed,
        batch_size=config.per_device_eval_batch_size,
        instruction=options.sampling_instruction,
    )


def _is_sharded() -> bool:
    return bool(is_deepspeed_zero3_enabled()) or launched_with_fsdp()
