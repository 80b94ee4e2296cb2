"""Rows of prompt and rejected made into candidate lists with samples of the model that is about to be trained."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignkit.evals.sampling import Sampled, SampleSettings, candidate_lists, prepare_prompts, sample_candidates
from alignkit.evals.sampling_engines import HuggingFaceEngine
from alignkit.evals.sampling_store import ChunkStore, fingerprint, on_first_process


def self_samples(
    dataset: Dataset,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: SampleSettings,
    directory: Path,
    *,
    weights: str,
    name: str = "train",
) -> Sampled:
    """Candidate lists of the model's own samples for rows of prompt and rejected, kept on disk. A collective.

    Args:
        dataset: The rows.
        model: Draws the samples; on its device.
        tokenizer: Its tokenizer.
        settings: How.
        directory: Where samples are kept; those of the same rows, weights and settings are found there again.
        weights: Identity of the weights, for instance ``weights_fingerprint``.
        name: What the rows are called in messages.

    Returns:
        The rows and the report, on every process.

    Raises:
        DataError: The rows cannot be sampled for.
    """
    state = PartialState()
    prompts = prepare_prompts(list(dataset), tokenizer, instruction=settings.instruction, name=name)
    engine = HuggingFaceEngine(model, tokenizer, settings.drawing, state)
    identity = {"weights": weights, "stop_token_ids": engine.stops, **asdict(settings), **prompts.settings()}
    store = ChunkStore(directory / fingerprint(identity), identity)
    limit = settings.prompt_limit(model.config)
    title = f"Sampling for {len(prompts.rows)} {name} rows"
    records = sample_candidates(prompts, engine, settings, store=store, prompt_limit=limit, state=state, progress=title)
    return on_first_process(lambda: candidate_lists(prompts, records), state)
