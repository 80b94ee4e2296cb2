"""A pruned model as a plain one: maps merged, slices taken, and nothing given its name that computes otherwise.

Weights are computed in float64 and rounded once to float32; there the model must say what the masked one says. Then
they are rounded to the type asked for, written, and loaded back by a process that knows stock transformers alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from alignkit.errors import ModelError
from alignkit.models.export import TOLERANCES, LogitsDifference, check_output, logits_difference, logits_of
from alignkit.models.loading import DTYPES
from alignkit.models.modes import evaluating
from alignkit.models.saved_comparison import model_difference
from alignkit.models.vocabulary import check_token_ids
from alignkit.pruning.families import Sizes, sizes_of
from alignkit.pruning.fold import Fold
from alignkit.pruning.masks import masked
from alignkit.pruning.plan import PruningPlan
from alignkit.pruning.slicing import pruned_model as pruned_model
from alignkit.pruning.verify import Verification, verify


@dataclass(frozen=True)
class Size:
    """What a model takes.

    Attributes:
        axes: Sizes by axis.
        parameters: Numbers in it, a matrix that is embedding and head once.
        bytes: Of its weights in the type of the export.
    """

    axes: Sizes
    parameters: int
    bytes: int


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote, and how it was checked.

    Attributes:
        dense: The model before.
        pruned: The model after.
        model_type: What it is written as.
        dtype: Type of its weights.
        is_tied: Whether embedding and head are one matrix.
        plan: Digest of the plan.
        exact: Masked model against the pruned one in float32, before rounding to ``dtype``.
        verification: Masked model against the files, as stock transformers loads them.
        notes: What other programs than transformers must know.
    """

    dense: Size
    pruned: Size
    model_type: str
    dtype: str
    is_tied: bool
    plan: str
    exact: LogitsDifference
    verification: Verification
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The report as values of JSON."""
        return asdict(self)


def export(
    model: PreTrainedModel,
    plan: PruningPlan,
    directory: Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Sequence[int]],
    folds: Mapping[str, Fold] | None = None,
    keep_tied: bool = False,
    dtype: str = "float32",
) -> ExportReport:
    """Write a pruned model that stock transformers loads; nothing is written when it is not the masked one.

    Args:
        model: A plain dense model in float32, adapters merged; it stays as it is.
        plan: What is kept; it is written beside the weights.
        directory: Folder to make; it may exist only when empty.
        tokenizer: Saved with the model.
        texts: Token ids of the texts on which the models are compared.
        folds: As for :func:`pruned_model`.
        keep_tied: As for :func:`pruned_model`.
        dtype: Type of the written weights: float32, bfloat16 or float16.

    Raises:
        ModelError: The folder is not free, no stock class loads the model, or it differs from the masked one.
    """
    check_output(directory)
    if model.dtype not in (torch.float32, torch.float64):
        raise ModelError(
            f"the model to prune has weights in {model.dtype}: load it in float32, it is rounded once only"
        )
    check_token_ids(model, tokenizer, {"a compared text": texts}, name="the model", pads=False)
    pruned = pruned_model(model, plan, folds=folds, keep_tied=keep_tied)
    reference, exact = _compared(model, pruned, plan, folds, texts)
    with _draft(directory) as draft:
        pruned.to(DTYPES[dtype]).save_pretrained(draft)
        if difference := model_difference(pruned, draft):
            raise ModelError(f"the export is refused and nothing was written, as saving lost weights: {difference}")
        tokenizer.save_pretrained(draft)
        _refuse_other_tokens(tokenizer, draft, texts)
        verification = verify(draft, texts, reference, TOLERANCES[dtype])
        plan.save(draft)
    return ExportReport(
        dense=_size(model, dtype),
        pruned=replace(_size(pruned, dtype), bytes=verification.bytes),
        model_type=pruned.config.model_type,
        dtype=dtype,
        is_tied=pruned.config.tie_word_embeddings,
        plan=plan.digest(),
        exact=exact,
        verification=verification,
        notes=tuple(_notes(model, pruned)),
    )


def _compared(
    model: PreTrainedModel,
    pruned: PreTrainedModel,
    plan: PruningPlan,
    folds: Mapping[str, Fold] | None,
    texts: Sequence[Sequence[int]],
) -> tuple[list[Tensor], LogitsDifference]:
    """Logits of the masked model, and how far the pruned one is from them before any rounding."""
    with evaluating(model), masked(model, plan, folds=folds):
        reference = logits_of(model, texts, model.device)
    exact = logits_difference(reference, logits_of(pruned, texts, pruned.device))
    if not exact.max_abs <= TOLERANCES["float32"]:
        raise ModelError(
            f"the pruned model differs from the masked one by up to {exact.max_abs:.3g} in a logit before any rounding "
            f"(tolerance {TOLERANCES['float32']:g}), and nothing was written"
        )
    return reference, exact


@contextmanager
def _draft(directory: Path) -> Iterator[Path]:
    """A folder to write into, which becomes ``directory`` unless something is raised, and is gone otherwise."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as folder:
        draft = Path(folder) / directory.name
        yield draft
        if directory.exists():
            directory.rmdir()
        draft.rename(directory)


def _refuse_other_tokens(tokenizer: PreTrainedTokenizerBase, draft: Path, texts: Sequence[Sequence[int]]) -> None:
    """Raise ModelError where the saved tokenizer is loaded as another one, as its class may follow the model type."""
    loaded = AutoTokenizer.from_pretrained(draft)
    for text in tokenizer.batch_decode(texts):
        if loaded(text)["input_ids"] != tokenizer(text)["input_ids"]:
            raise ModelError(
                f"the tokenizer, loaded beside the pruned model, cuts {text[:60]!r} otherwise than before, and nothing "
                "was written. Prune ffn or layers alone, which never change the type of a model"
            )


def _size(model: PreTrainedModel, dtype: str) -> Size:
    count = sum(parameter.numel() for parameter in model.parameters())
    return Size(sizes_of(model.config), count, count * DTYPES[dtype].itemsize)


def _notes(before: PreTrainedModel, after: PreTrainedModel) -> Iterator[str]:
    dense, pruned = before.config, after.config
    if dense.tie_word_embeddings and not pruned.tie_word_embeddings:
        extra = pruned.vocab_size * pruned.hidden_size
        yield (
            f"embedding and head are two matrices now, {extra:,} numbers more; keep_tied keeps one, unless a map "
            "behind the embedding was trained"
        )
    if pruned.model_type != dense.model_type:
        yield f"written as a {pruned.model_type}, which computes the same and loads everywhere at these sizes"
    if pruned.model_type in ("gemma", "gemma2") and not pruned.tie_word_embeddings:
        yield f"llama.cpp takes the embedding of a {pruned.model_type} as its head too, so it computes something else"
    layer_types = pruned.to_dict().get("layer_types") or []
    if "sliding_attention" in layer_types and pruned.num_hidden_layers < dense.num_hidden_layers:
        yield (
            "which layers have a sliding window is listed in the config (layer_types); a program that assumes a fixed "
            "pattern for this family, as llama.cpp does, computes something else"
        )
