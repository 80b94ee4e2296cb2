"""The rows of a preference run: loaded, given what the method asks of them, checked, tokenised and reported on."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import DPOConfig

from alignkit.config import PreferenceConfig
from alignkit.data.contrast import ContrastPrompts, load_contrast_prompts
from alignkit.data.convert import to_candidate_rows
from alignkit.data.load import first_rows, load_rows, parse_sources, split_held_out
from alignkit.data.negatives import check_prompts, load_prompts
from alignkit.data.readers import open_source
from alignkit.data.report import data_report
from alignkit.environment import launched_with_fsdp
from alignkit.errors import DataError
from alignkit.evals.sampling import SampleSettings
from alignkit.evals.self_samples import self_samples
from alignkit.methods._reference import default_cache_dir, weights_fingerprint
from alignkit.methods.method import load_method
from alignkit.model_steps import load_policy
from alignkit.parametrizations import loading
from alignkit.run_directory import RunDirectory

STREAM_BUFFER = 1000  # rows a stream is shuffled within; rows at hand are shuffled by the trainer, anew each epoch
Rows = Dataset | IterableDataset


@dataclass(frozen=True)
class PreparedData:
    """Candidate rows of a run; ``evaluation`` is None where nothing is held out, its first rows are the probe."""

    train: Rows
    evaluation: Rows | None
    num_probe_rows: int


def prepare_data(
    config: PreferenceConfig, args: DPOConfig, tokenizer: PreTrainedTokenizerBase, directory: RunDirectory
) -> PreparedData:
    """Load, check, tokenise and report on the rows; rank 0 first, so that the others read its cache.

    Raises:
        DataError: The rows cannot be trained on; all kinds of problem together.
    """
    method = load_method(config.method)
    with args.main_process_first(desc="data"):
        splits = _load_splits(config)
    if method.rows == "negatives" and any("completions" not in (rows.column_names or ()) for rows in splits.values()):
        splits = _with_samples(config, args, tokenizer, splits)
    with args.main_process_first(desc="tokens"):
        converted = {
            name: to_candidate_rows(
                rows,
                tokenizer,
                max_length=config.max_length,
                num_candidates=method.num_candidates,
                max_dropped_fraction=config.max_dropped_fraction,
                num_proc=config.dataset_num_proc,
                name=name,
                stop_token_ids=loading.generation_stop_ids(config.model, config.model_revision),
                contrast=_contrast_prompts(config),
            )
            for name, rows in splits.items()
        }
    if method.rows == "negatives":
        for name, (rows, _) in converted.items():
            _check_negatives(rows, name)
    report = data_report(converted, tokenizer)
    if args.process_index == 0:
        report.print_to(sys.stdout)
    directory.record(data=report.to_dict())
    report.raise_for_failures()
    evaluation = converted["held-out"][0] if "held-out" in converted else None
    num_probe_rows = min(config.probe_rows, len(evaluation)) if evaluation is not None and config.probe_steps else 0
    return PreparedData(converted["train"][0], evaluation, num_probe_rows)


def _load_splits(config: PreferenceConfig) -> dict[str, Rows]:
    seed = config.seed if config.data_seed is None else config.data_seed
    rows = _load(config, config.data, config.data_split, seed, config.max_rows, config.streaming)
    splits = {"train": rows.shuffle(seed=seed, buffer_size=STREAM_BUFFER) if config.streaming else rows}
    if config.eval_data is not None:
        splits["held-out"] = _load(config, config.eval_data, config.eval_split, seed, config.max_eval_rows)
    elif config.eval_fraction > 0:
        splits["train"], splits["held-out"] = split_held_out(rows, config.eval_fraction, seed)
    return splits


def _load(
    config: PreferenceConfig, data: Any, split: str, seed: int, max_rows: int | None, streaming: bool = False
) -> Rows:
    if load_method(config.method).rows == "negatives":
        sources = parse_sources(data, split)
        _, columns = first_rows(open_source(sources[0], streaming=streaming), sources[0].path)
        if config.column_map.get("completions", "completions") not in columns:
            rows = load_prompts(
                [data] if isinstance(data, (str, dict)) else data,
                column_map=config.column_map,
                split=split,
                max_rows=max_rows,
            )
            check_prompts(rows, name=sources[0].path)
            return Dataset.from_list(rows)
    options: dict[str, Any] = {"column_map": config.column_map, "seed": seed, "streaming": streaming}
    return load_rows(data, split=split, max_rows=max_rows, **options)


def _contrast_prompts(config: PreferenceConfig) -> ContrastPrompts | None:
    """The prompts token rewards are made with, for a method that needs them; rows may bring their own rewards."""
    options = config.method_options
    if "token_rewards" not in load_method(config.method).needs(options):
        return None
    path = None if options.contrast_prompts is None else Path(options.contrast_prompts)
    return load_contrast_prompts(path, include_response=options.include_response)


def _with_samples(
    config: PreferenceConfig, args: DPOConfig, tokenizer: PreTrainedTokenizerBase, splits: dict[str, Rows]
) -> dict[str, Rows]:
    """Rows of prompt and rejected with answers sampled from the starting model, kept in the cache; a collective.

    Raises:
        DataError: The model is sharded or the rows are streamed.
    """
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
    model = load_policy(config)
    weights = weights_fingerprint(model, "default" if config.adapter is not None else None)
    model = model.to(args.device).eval()
    sampled = {}
    for name, rows in splits.items():
        result = self_samples(
            rows, model, tokenizer, settings, default_cache_dir().parent / "samples", weights=weights, name=name
        )
        if PartialState().is_main_process:
            print(result.report)
        sampled[name] = Dataset.from_list(result.rows)
    return sampled


def _check_negatives(rows: Rows, name: str) -> None:
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
