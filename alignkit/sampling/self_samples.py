"""Rows of prompt and rejected made into candidate lists with samples of the model that is about to be trained."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignkit.sampling.candidates import Prompts, Sampled, SampleSettings, candidate_lists, sample_candidates
from alignkit.sampling.engines import HuggingFaceEngine
from alignkit.sampling.report import SettingNames
from alignkit.sampling.store import ChunkStore, fingerprint, on_first_process

SETTING_NAMES = SettingNames("sampling_max_new_tokens")
"""What the settings are called in the config of a run."""


def self_samples(
    prompts: Prompts,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: SampleSettings,
    directory: Path,
    *,
    weights: str,
    prompt_limit: int | None = None,
    name: str = "train",
) -> Sampled:
    """Candidate lists of the model's own samples for rows of prompt and rejected, kept on disk. A collective.

    Args:
        prompts: The rows.
        model: Draws the samples; on its device.
        settings: How.
        directory: Where samples are kept; those of the same rows, weights and settings are found there again.
        weights: Identity of the model, for instance ``model_fingerprint``.
        prompt_limit: Rows with longer prompts, tokens, are left out; None for no limit.
        name: What the rows are called in messages.

    Returns:
        The rows and the report, on every process.

    Raises:
        DataError: No row is left.
    """
    state = PartialState()
    engine = HuggingFaceEngine(model, tokenizer, settings.drawing, state)
    identity = {"weights": weights, "stop_token_ids": engine.stops, **asdict(settings), **prompts.settings()}
    store = ChunkStore(directory / fingerprint(identity), identity)
    records = sample_candidates(
        prompts,
        engine,
        settings,
        store=store,
        prompt_limit=prompt_limit,
        state=state,
        progress=f"Sampling for {len(prompts.rows)} {name} rows",
    )
    return on_first_process(lambda: candidate_lists(prompts, records, SETTING_NAMES), state)
