"""What a run of d2o does beside its loss: rows of prompt and rejected answer are given samples of the model itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import PartialState
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled

from alignkit.data.json_files import HEAD_ROWS
from alignkit.data.json_values import dataset_of
from alignkit.data.negatives import lack_samples
from alignkit.data.problems import Problem
from alignkit.data.schema import describe_problems
from alignkit.environment import launched_with_fsdp
from alignkit.errors import ConfigError, DataError
from alignkit.models.loading import is_quantized
from alignkit.models.vocabulary import check_token_ids
from alignkit.parametrizations._policy import load_policy, prepare
from alignkit.parts.method import Preparation
from alignkit.references._cache import default_cache_dir, model_fingerprint
from alignkit.sampling.candidates import SampleSettings, check_room, prepare_prompts
from alignkit.sampling.refresh import SampleRefresh
from alignkit.sampling.report import SamplingReport
from alignkit.sampling.resampling import Resampler
from alignkit.sampling.self_samples import SETTING_NAMES, self_samples


class SelfSampled(Preparation):
    """Samples of the starting model for the rows that have none, drawn anew while training where that is asked for."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.reports: dict[str, SamplingReport] = {}

    @property
    def exchanges_rows(self) -> bool:  # type: ignore[override]
        """Whether samples are drawn anew."""
        return bool(self.config.method_options.sample_refresh_steps)

    def check_launch(self) -> None:
        """Refuse to draw samples from a policy that is in pieces.

        Raises:
            ConfigError: The launcher shards the policy.
        """
        if self.exchanges_rows and _is_sharded():
            steps = self.config.method_options.sample_refresh_steps
            advice = "Write sample_refresh_steps: 0, or launch with DDP or ZeRO-2"
            why = f"`sample_refresh_steps: {steps}`: such a policy cannot draw samples. {advice}"
            raise ConfigError("the launcher shards the policy (ZeRO-3 or FSDP)", [why])

    def complete(self, splits: dict[str, Any], tokenizer: PreTrainedTokenizerBase, device: Any) -> dict[str, Any]:
        """Rows of prompt and rejected given answers of the starting model, kept in the cache; others are checked.

        A collective. The form of all rows, the model and its adapter are checked before the first sample is drawn.

        Raises:
            DataError: The rows are malformed; or samples are missing, and the model is sharded or the rows are
                streamed.
            ModelError: The model cannot be loaded, or cannot take the adapter of the config.
        """
        config = self.config
        wanting = [name for name, rows in splits.items() if lack_samples(rows, name)]
        splits = {name: rows if name in wanting else checked_lists(rows, name) for name, rows in splits.items()}
        if not wanting:
            return splits
        self._refuse_sampling()
        settings = self._settings()
        prompts = {
            name: prepare_prompts(list(splits[name]), tokenizer, name=name, instruction=settings.instruction)
            for name in wanting
        }
        model = load_policy(config)
        asked = {f"a prompt of {name}": prompts[name].token_ids for name in wanting}
        check_token_ids(model, tokenizer, asked, name=repr(config.model))
        prepare(config, model)  # The trainer makes its own; here it is tried.
        fit = {"max_dropped_fraction": config.max_dropped_fraction}
        limits = {
            name: check_room(prompts[name], settings, model.config, SETTING_NAMES, name=name, **fit) for name in wanting
        }
        weights = model_fingerprint(model, "default" if config.adapter is not None else None)
        # Quantised weights stand where they were loaded.
        model = (model if is_quantized(model) else model.to(device)).eval()
        cache = default_cache_dir().with_name("samples")
        for name in wanting:
            place: dict[str, Any] = {"weights": weights, "prompt_limit": limits[name], "name": name}
            result = self_samples(prompts[name], model, tokenizer, settings, cache, **place)
            if PartialState().is_main_process:
                print(result.report.render(f"samples of {name}"))
            splits[name], self.reports[name] = dataset_of(result.rows), result.report
        return splits

    def sections(self) -> dict[str, Any]:
        """The account of the sampling."""
        return {"sampling": {split: report.to_dict() for split, report in self.reports.items()}} if self.reports else {}

    def for_conversion(self, split: str) -> dict[str, Any]:
        """Rows that got no samples, to be told in the report."""
        return {"lost": self.reports[split].dropped_rows} if split in self.reports else {}

    def attach(self, trainer: Any, tokenizer: PreTrainedTokenizerBase, source: Any, directory: Any) -> None:
        """Draw the samples of the training rows anew every ``sample_refresh_steps``."""
        if self.exchanges_rows:
            resampler = Resampler.of_lists(source, tokenizer, self._settings(), self.config.max_length)
            refresh = SampleRefresh(trainer, resampler, self.config.method_options.sample_refresh_steps)
            trainer.add_callback(refresh)
            trainer.persistent.append(refresh)

    def _refuse_sampling(self) -> None:
        """Raise where no samples can be drawn before training."""
        advice = "run alignkit sample first, and train on what it writes"
        if _is_sharded():
            raise DataError("these rows have no samples", [f"a sharded model cannot draw any here: {advice}"])
        if self.config.streaming:
            raise DataError("these rows have no samples", [f"streamed rows cannot be given any: {advice}"])

    def _settings(self) -> SampleSettings:
        options = self.config.method_options
        return SampleSettings(
            num_samples=options.num_samples_per_prompt,
            max_new_tokens=options.sampling_max_new_tokens,
            temperature=options.sampling_temperature,
            top_p=options.sampling_top_p,
            seed=self.config.seed,
            batch_size=self.config.per_device_eval_batch_size,
            instruction=options.sampling_instruction,
        )


def checked_lists(rows: Dataset | IterableDataset, name: str) -> Any:
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
    """The batch unchanged, once its scores are those of samples and one negative."""
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


def _is_sharded() -> bool:
    return bool(is_deepspeed_zero3_enabled()) or launched_with_fsdp()
