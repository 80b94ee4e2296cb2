"""What candidate rows are given before training, where the method asks for more than they bring."""

from __future__ import annotations

from pathlib import Path

from accelerate import PartialState
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import DPOConfig

from alignkit.config import PreferenceConfig
from alignkit.data.contrast import ContrastPrompts, load_contrast_prompts
from alignkit.data.negatives import check_prompts, lack_samples
from alignkit.environment import launched_with_fsdp
from alignkit.errors import ConfigError, DataError
from alignkit.evals.resampling import Resampler
from alignkit.evals.sampling import SampleSettings
from alignkit.evals.self_samples import self_samples
from alignkit.methods._reference import default_cache_dir, weights_fingerprint
from alignkit.methods.method import load_method
from alignkit.model_steps import load_policy

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
) -> dict[str, Rows]:
    """Rows of prompt and rejected given answers of the starting model, kept in the cache; others as they are.

    A collective.

    Raises:
        DataError: Samples are missing, and the model is sharded or the rows are streamed.
    """
    wanting = [name for name, rows in splits.items() if lack_samples(rows, name)]
    if not wanting:
        return splits
    advice = "run scripts/sample_candidates.py first, and train on what it writes"
    if _is_sharded():
        raise DataError("these rows have no samples", [f"a sharded model cannot draw any here: {advice}"])
    if config.streaming:
        raise DataError("these rows have no samples", [f"streamed rows cannot be given any: {advice}"])
    settings = _sample_settings(config)
    for name in wanting:
        check_prompts(list(splits[name]), name=name)
    model = load_policy(config)
    weights = weights_fingerprint(model, "default" if config.adapter is not None else None)
    # Quantised weights stand where they were loaded.
    model = (model if config.quantization != "none" else model.to(args.device)).eval()
    sampled: dict[str, Rows] = {}
    for name in wanting:
        cache = default_cache_dir().with_name("samples")
        result = self_samples(splits[name], model, tokenizer, settings, cache, weights=weights, name=name)
        if PartialState().is_main_process:
            print(result.report)
        sampled[name] = Dataset.from_list(result.rows)
    return splits | sampled


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


def check_negatives(rows: Rows, name: str) -> None:
    """K samples of one score, then one negative below them.

    Raises:
        DataError: Rows are of another form.
    """
    if isinstance(rows, IterableDataset):
        return
    bad = [i for i, scores in enumerate(rows["scores"]) if len({*scores[:-1]}) != 1 or not scores[-1] < scores[0]]
    if bad:
        advice = "give every sample the score 1 and the negative the score 0, or take adpo for ranked lists"
        raise DataError(
            f"{name}: {len(bad)} rows are not samples and one negative, the first is row {bad[0]}",
            [f"scores {rows[bad[0]]['scores']}: {advice}"],
        )


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
