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
from alignkit.errors import DataError
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
    if is_deepspeed_zero3_enabled() or launched_with_fsdp():
        raise DataError("these rows have no samples", [f"a sharded model cannot draw any here: {advice}"])
    if config.streaming:
        raise DataError("these rows have no samples", [f"streamed rows cannot be given any: {advice}"])
    options = config.method_options
    settings = SampleSettings(
        num_samples=options.num_samples_per_prompt,
        max_new_tokens=options.sampling_max_new_tokens,
        temperature=options.sampling_temperature,
        top_p=options.sampling_top_p,
        seed=config.seed,
        batch_size=config.per_device_eval_batch_size,
        instruction=options.sampling_instruction,
    )
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
