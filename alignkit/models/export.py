"""Merge an adapter into its base, and refuse a merge that changes what the model says.

A merge can go wrong without a word: the wrong base, a base that training saw quantised, rounding to bfloat16 that
swallows a small update, tied weights that part or come together. So the merged model is written, loaded back from disk
and run beside base + adapter on a few texts before it gets its final name.

    max |d| = largest difference of a logit            KL = mean over positions of KL(base + adapter || merged), nats

Merging is computed in float32 and rounded once. A quantised base is dequantised first: the update was learnt on exactly
those weights. Both sides run in float32 except the quantised reference, whose kernels use the precision they have.
"""

from __future__ import annotations

import json
import shlex
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from huggingface_hub import ModelCardData
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from alignkit.errors import ModelError
from alignkit.models.adapter_config import is_sparse_kind
from alignkit.models.card_file import read_card
from alignkit.models.files import CARD_OF_THE_ADAPTER, AdapterFiles, is_reward_adapter
from alignkit.models.loading import (
    DTYPES,
    ModelSource,
    RewardHead,
    check_base,
    head_of_adapter,
    is_quantized,
    load_adapter,
    load_model,
    quantization_of,
)
from alignkit.models.reward_model import dimensions_of
from alignkit.models.saved_comparison import model_difference
from alignkit.models.vocabulary import check_token_ids
from alignkit.parts.parametrization import parametrization_names
from alignkit.places import is_local
from alignkit.plain_text import markdown

TOLERANCES = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.5}
"""Largest admissible difference of a logit by the type of the merged weights; ours, some ten times the rounding errors
measured on small models."""

QUANTIZED_TOLERANCE = 1.0
"""The same against a quantised base, whose kernels round activations too."""

_EXACT = TOLERANCES["float32"]


@dataclass(frozen=True)
class LogitsDifference:
    """How far two models are apart on the same tokens.

    Attributes:
        max_abs: Largest difference of a logit.
        kl: Mean over positions of KL(first || second), nats.
        positions: Positions compared.
    """

    max_abs: float
    kl: float
    positions: int


@dataclass(frozen=True)
class MergeReport:
    """What the check of a merge found.

    Attributes:
        error: Base + adapter against the merged model as loaded back from disk.
        effect: Base + adapter against the base: what the adapter does at all.
        dtype: Type of the merged weights.
        quantization: How the base was quantised for the reference.
        tolerance: Largest admissible ``error.max_abs``.
    """

    error: LogitsDifference
    effect: LogitsDifference
    dtype: str
    quantization: str
    tolerance: float

    @property
    def problem(self) -> str | None:
        """Why the merge is refused, or None."""
        if not self.error.max_abs <= self.tolerance:
            advice = "" if self.quantization == "none" else " Serve the adapter on its quantised base instead."
            return (
                f"the merged model differs from base + adapter by up to {self.error.max_abs:.3g} in a logit "
                f"(tolerance {self.tolerance:g}).{advice}"
            )
        # With a quantised reference, the error holds the rounding of its kernels, which loses nothing.
        # Rewards have no distribution, and are compared as they are.
        error, effect = ((found.kl, found.max_abs) for found in (self.error, self.effect))
        lost = self.error.max_abs > _EXACT and error >= effect
        if lost and self.quantization == "none":
            return (
                f"rounding to {self.dtype} swallows the adapter: it moves the base by {self.effect.kl:.2g} nats (KL), "
                f"and the rounded model is off by {self.error.kl:.2g}. Write --dtype float32."
            )
        return None


def merge_adapter(
    adapter: AdapterFiles,
    source: ModelSource,
    output: Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    tolerance: float | None = None,
    device: torch.device | str = "cpu",
) -> MergeReport:
    """Merge, compare, and write model, generation config, tokenizer and card; nothing is written when refused.

    Args:
        source: Its base; ``dtype`` is the type of the merged weights, ``quantization`` how training saw the base.
        output: Folder to make; it may exist only when empty.
        tokenizer: Saved with the model.
        prompts: Token ids of the texts compared.
        tolerance: Largest admissible difference of a logit; by default the one of the types involved.
        device: Where the models run.

    Raises:
        ModelError: The output is not empty, the adapter was trained on another base, does not fit or cannot be
            merged, or the models differ.
    """
    check_output(output)
    _refuse_sparse(adapter)
    check_base(adapter, source)
    if (adapter.directory / "README.md").is_file():
        read_card(adapter.directory / "README.md")  # Before hours of merging: the merged model inherits from it.
    dtype = checkpoint_dtype(source) if source.dtype == "auto" else source.dtype
    quantization = quantization_of(source) or source.quantization
    if tolerance is None:
        tolerance = TOLERANCES[dtype] if quantization == "none" else QUANTIZED_TOLERANCE
    head = head_of_adapter(adapter) if is_reward_adapter(adapter) else None
    exact = replace(source, dtype="float32", reward_head=head)
    tuned, effect = _reference_logits(adapter, exact, tokenizer, prompts, device)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
        draft = Path(folder) / output.name
        _save_compared(_merged(adapter, exact, tokenizer, device).to(DTYPES[dtype]), draft)
        # Tokenizers and configs of remote code stay with the base; only the weights are compared here.
        written = _loaded_back(exact, draft, device)
        error = logits_difference(tuned, logits_of(written, prompts, device))
        report = MergeReport(error, effect, dtype, quantization, tolerance)
        if report.problem is not None:
            raise ModelError(f"the merge is refused and nothing was written: {report.problem}")
        tokenizer.save_pretrained(draft)
        _write_card(draft, adapter, source, report)
        if output.exists():
            output.rmdir()
        draft.rename(output)
    return report


def _refuse_sparse(adapter: AdapterFiles) -> None:
    if is_sparse_kind(adapter.kind):
        raise ModelError(
            f"the adapter {str(adapter.directory)!r} removes structures of its base: a merge has no place for that. "
            f"Write alignkit prune --adapter {shlex.quote(str(adapter.directory))}, which exports the smaller model."
        )


def _save_compared(model: PreTrainedModel, folder: Path) -> None:
    """Save a model and compare the files with it."""
    model.save_pretrained(folder)
    _refuse_difference(model, folder)


def _refuse_difference(model: PreTrainedModel, folder: Path) -> None:
    if difference := model_difference(model, folder):
        raise ModelError(
            f"the merge is refused and nothing was written, as saving or loading lost weights: {difference}"
        )


def check_output(output: Path) -> None:
    """Raise ModelError unless ``output`` is free: absent, or an empty folder."""
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        what = "link" if output.is_symlink() else "file"
        raise ModelError(f"the output {output} is a {what}. Write a folder that does not exist yet.")
    if output.is_dir() and any(output.iterdir()):
        raise ModelError(f"the output {output} is not empty, and nothing is overwritten. Write another folder.")
    if files := [parent for parent in output.parents if parent.exists() and not parent.is_dir()]:
        raise ModelError(f"the output {output} would lie in {files[0]}, which is a file. Write another folder.")


def checkpoint_dtype(source: ModelSource) -> str:
    """Type in which the checkpoint of a model is saved: ``float32``, ``bfloat16`` or ``float16``.

    Args:
        source: The model.
    """
    options = {"revision": source.revision} if source.revision else {}
    config = AutoConfig.from_pretrained(source.model, trust_remote_code=source.trust_remote_code, **options)
    return next((name for name, dtype in DTYPES.items() if dtype == config.dtype), "float32")


@torch.no_grad()
def logits_of(model: nn.Module, prompts: Sequence[Sequence[int]], device: torch.device | str) -> list[Tensor]:
    """Logits [T, V] of each text, or the reward [1], float32 on the CPU.

    Args:
        model: A causal language model or a reward model, in evaluation mode.
        prompts: Token ids.
        device: Where the model is.
    """
    return [model(input_ids=torch.tensor([list(ids)], device=device)).logits[0].float().cpu() for ids in prompts]


def logits_difference(first: Sequence[Tensor], second: Sequence[Tensor]) -> LogitsDifference:
    """Compare the logits of two models on the same texts.

    Args:
        first: Logits [T, V] by text.
        second: The same of the other model.
    """
    largest = max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))
    divergences = []
    for a, b in zip(first, second, strict=True):
        ours, theirs = a.double().log_softmax(-1), b.double().log_softmax(-1)
        divergences.append((ours.exp() * (ours - theirs)).sum(-1).reshape(-1))
    divergence = torch.cat(divergences)
    return LogitsDifference(largest, float(divergence.mean()), divergence.numel())


def _reference_logits(
    adapter: AdapterFiles,
    source: ModelSource,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    device: torch.device | str,
) -> tuple[list[Tensor], LogitsDifference]:
    """Logits of base + adapter as trained, and how far the adapter moves them."""
    wrapped = load_adapter(load_model(source, device), adapter)
    if wrapped.active_peft_config.is_prompt_learning:
        raise ModelError(f"an adapter of kind {adapter.kind} adds virtual tokens and no weights: it cannot be merged")
    check_token_ids(wrapped, tokenizer, {"a compared text": prompts}, name=repr(source.model), pads=False)
    tuned = logits_of(wrapped, prompts, device)
    with wrapped.disable_adapter():
        return tuned, logits_difference(tuned, logits_of(wrapped, prompts, device))


def _loaded_back(source: ModelSource, folder: Path, device: torch.device | str) -> PreTrainedModel:
    """The merged model from its files, which are compared with it; ``source`` says how its base was loaded."""
    head = None if source.reward_head is None else RewardHead()
    own = replace(source, model=str(folder), revision=None, quantization="none", reward_head=head)
    written = load_model(own, device)
    _refuse_difference(written, folder)
    return written


def _merged(
    adapter: AdapterFiles, source: ModelSource, tokenizer: PreTrainedTokenizerBase, device: torch.device | str
) -> PreTrainedModel:
    """Base with the adapter merged in, float32."""
    # Always loaded afresh: a forward pass on the CPU makes bitsandbytes repack 4-bit weights, and transformers then
    # dequantises them wrongly.
    base = load_model(source, device)
    if is_quantized(base):
        base = dequantized(base)
    was_tied = is_tied(base)
    wrapped = load_adapter(base, adapter)
    if was_tied:
        part_head(base)
    try:
        merged = wrapped.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ModelError(f"the adapter {str(adapter.directory)!r} cannot be merged: {error}") from error
    if was_tied:
        tie_if_equal(merged)
    if source.reward_head is not None:
        # By which rewards are read off.
        merged.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        if source.reward_head.width > 1:
            merged.config.reward_dimensions = dimensions_of(merged, adapter)
    return merged


def dequantized(model: PreTrainedModel) -> PreTrainedModel:
    """A plain float32 model with the values that quantised weights stand for."""
    dense = model.dequantize(dtype=torch.float32)
    # Into a new model: one read from a quantised checkpoint would be saved in the form of that checkpoint.
    plain = type(dense)(dense.config)
    plain.load_state_dict(dense.state_dict())
    if dense.can_generate():
        plain.generation_config = dense.generation_config
    return plain.to(dense.device).eval()


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the input embedding and the output head are one weight."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def part_head(model: PreTrainedModel) -> None:
    """Give the head weights of its own; a merge writes into the embedding's, and would change a tied head as well."""
    for module in model.get_output_embeddings().modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach().clone()))


def tie_if_equal(model: PreTrainedModel) -> None:
    """Make one weight of embedding and head where they are equal; otherwise say in the config that they are two."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    are_equal = torch.equal(embedding.weight, head.weight)
    if are_equal:
        head.weight = embedding.weight
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = are_equal


def method_tags(tags: Sequence[str]) -> list[str]:
    """Tags of an adapter's card that are true of the merged model too.

    Args:
        tags: Those of the adapter.
    """
    return [
        tag
        for tag in tags
        if tag not in {"alignkit", "peft", *parametrization_names()} and not tag.startswith("base_model:")
    ]


def _write_card(directory: Path, adapter: AdapterFiles, source: ModelSource, report: MergeReport) -> None:
    card_of_adapter = adapter.directory / "README.md"
    inherited = read_card(card_of_adapter).data.to_dict() if card_of_adapter.is_file() else {}
    base = Path(source.model).name if is_local(source.model) else source.model
    data = ModelCardData(
        base_model=None if is_local(source.model) else source.model,
        library_name="transformers",
        pipeline_tag="text-classification" if is_reward_adapter(adapter) else "text-generation",
        tags=["alignkit", *method_tags(inherited.get("tags") or [])],
        **{key: inherited[key] for key in ("license", "language", "datasets") if key in inherited},
    )
    auto_class = "AutoModelForSequenceClassification" if is_reward_adapter(adapter) else "AutoModelForCausalLM"
    error, effect = report.error, report.effect
    quantised = "" if report.quantization == "none" else f", {report.quantization} as in training and then dequantised"
    body = f"""
# {markdown(directory.name)}

{markdown(base)}{quantised}, with a {adapter.kind} adapter merged into its weights ({report.dtype}).

| on {error.positions} tokens, against base + adapter | largest difference of a logit | KL, nats |
|---|---|---|
| this model | {error.max_abs:.2g} | {error.kl:.2g} |
| the base alone | {effect.max_abs:.2g} | {effect.kl:.2g} |

```python
from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained({json.dumps(directory.name)}, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained({json.dumps(directory.name)})
```
"""
    (directory / "README.md").write_text(f"---\n{data.to_yaml()}\n---\n{body}", encoding="utf-8")
    if card_of_adapter.is_file():
        shutil.copyfile(card_of_adapter, directory / CARD_OF_THE_ADAPTER)
